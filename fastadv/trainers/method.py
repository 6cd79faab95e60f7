"""The base of a training method: an attack, a loss, and the models that they need."""

from __future__ import annotations

import abc
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from fastadv.attacks.soft_labels import hard, is_soft, soft_cross_entropy
from fastadv.engine.compiled_parts import has_compiled_parts
from fastadv.engine.training_convolution import TrainingConvolutions
from fastadv.losses import cross_entropy
from fastadv.losses.common import at_least_float32
from fastadv.models.split import Halves, logits_of_halves
from fastadv.ranks import Ranks
from fastadv.seeding import derive_seed
from fastadv.trainers.frozen_forward import FrozenForward, Output, logits_of
from fastadv.trainers.phases import PhaseTimer
from fastadv.trainers.recipe import Recipe
from fastadv.trainers.returns import check_attacked

_SINGLE_PROCESS = Ranks()


@dataclass(frozen=True)
class TrainBatch:
    """One batch and its position in the run.

    Attributes:
        x: images [B, C, H, W] in 0..1, float32.
        y: labels [B], int64; with mixup soft labels [B, K], float32.
        ids: the images' indices in the data set [B], int64.
        epoch: the epoch, counted from 0.
        step: the step within the epoch, counted from 0.
        run_seed: the recipe's seed.
        weights: weights of the images' losses [B], with mean 1 over the global batch; None if all weights are 1.
        run_step: the step within the run, counted from 0; None if a method is used without a run.
    """

    x: Tensor
    y: Tensor
    ids: Tensor
    epoch: int
    step: int
    run_seed: int
    weights: Tensor | None = None
    run_step: int | None = None

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean of the images' losses [B] with their weights, a scalar."""
        return (values if self.weights is None else values * self.weights).mean()

    def seed(self, purpose: str) -> int:
        """Return the seed of one purpose in this iteration; use it together with `ids`."""
        return derive_seed(self.run_seed, purpose, self.epoch, self.step)


@dataclass(frozen=True)
class Attacked:
    """The result of the attack, for the loss. A method whose attack computes further results has a subclass.

    Attributes:
        x: the images to train on [B, C, H, W], without gradient.
    """

    x: Tensor


@dataclass(frozen=True)
class LossResult:
    """The loss of one batch.

    Attributes:
        loss: scalar to minimise, float32.
        metrics: scalars to log, each a mean over the batch, without gradient; the same names on all ranks.
    """

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Runtime:
    """The device, the precision and the processes of a run.

    Attributes:
        device: device of models and batches.
        autocast_dtype: dtype of the passes that run under `Method.autocast`; None is float32.
        phases: collects seconds per phase.
        ranks: the processes that train together; each has its part of every batch.
        build: makes a further model by its name for `create_model`, for the images of the run, on its device and
            in its memory layout; None if a method is used without a run.
        network: the name by which the run's own model was made; None for a module.
    """

    device: torch.device
    autocast_dtype: torch.dtype | None
    phases: PhaseTimer
    ranks: Ranks = _SINGLE_PROCESS
    build: Callable[[str], nn.Module] | None = None
    network: str | None = None

    def make(self, argument: str, name: str) -> nn.Module:
        """Make a further model by its name.

        Args:
            argument: the recipe's field that holds the name, for messages.
            name: a name for `create_model`.

        Raises:
            ValueError: if the name is unknown, or if there is no run that can build the model.
        """
        if self.build is None:
            raise ValueError(
                f"Runtime.build must build {argument} {name!r}, got None, as a method without a run has it"
            )
        try:
            return self.build(name)
        except ValueError as error:
            raise ValueError(f"{argument}: {error}") from error


Update = Callable[[LossResult], bool]
RecipeT = TypeVar("RecipeT", bound=Recipe)
AttackedT = TypeVar("AttackedT", bound=Attacked)


class Method(abc.ABC, Generic[RecipeT, AttackedT]):
    """Base of the training methods.

    A method defines how a batch is attacked, and its loss. The loop does the rest: optimiser,
    schedule, precision, averaging, checkpoints, logs. A subclass defines `attack` and
    `training_loss`, and overrides other functions only where it differs. Its docstring states the
    passes per batch in F (one forward pass of the model over the batch; input gradients cost 2F,
    a training pass 3F) and the number of updates of BatchNorm's running statistics.

    Args:
        recipe: an instance of `recipe_class`.
        model: the model to train, already on the device.
        runtime: device, precision and timer.
        teachers: frozen models by the names that `teachers_needed` returned.

    Attributes:
        name: name of the method on the command line.
        recipe_class: class of the method's recipe.
        bn_updates: updates of the running statistics per batch.
        supports: the recipe's fields "label_smoothing" and "extra_weight", if the loss supports them.
            A class that defines another loss does not inherit this.
        takes_soft_labels: whether a method that supports "label_smoothing" can also be trained on mixed labels.
            Its attack and all other code that reads labels then accept soft labels.
        differentiates_twice: whether the loss contains gradients that are differentiated themselves.
        halves: models whose halves the method has run, for `check_halves` after the first iteration.
    """

    name: ClassVar[str]
    recipe_class: ClassVar[type[Recipe]]
    bn_updates: int = 1
    supports: ClassVar[frozenset[str]] = frozenset()
    takes_soft_labels: ClassVar[bool] = True
    differentiates_twice: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "heeds" in vars(cls):
            warnings.warn(
                f"{cls.__name__}.heeds is now called supports", DeprecationWarning, stacklevel=2
            )
            cls.supports = vars(cls)["heeds"]
        if "supports" not in vars(cls) and vars(cls).keys() & {"training_loss", "objective"}:
            cls.supports = frozenset()

    def __init__(
        self,
        recipe: RecipeT,
        model: nn.Module,
        runtime: Runtime,
        teachers: Mapping[str, nn.Module] | None = None,
    ) -> None:
        self.recipe = recipe
        self.model = model
        self.runtime = runtime
        self.teachers = dict(teachers or {})
        for teacher in self.teachers.values():
            teacher.eval().requires_grad_(False)
        for field_name, neutral in (("label_smoothing", 0), ("extra_weight", 1)):
            value = getattr(recipe, field_name)
            if value != neutral and field_name not in self.supports:
                raise ValueError(
                    f"{field_name} must be {neutral} for {self.name}, whose loss does not take it, "
                    f"got {value}"
                )
        if recipe.mixup and not (self.takes_soft_labels and "label_smoothing" in self.supports):
            raise ValueError(
                f"mixup must be 0 for {self.name}, whose loss takes no soft labels, got {recipe.mixup}"
            )
        self._split_pass = _features_and_logits
        self.halves: dict[str, tuple[nn.Module, Halves]] = {}
        self._frozen: dict[tuple[str, Output], FrozenForward] = {}
        fast = runtime.device.type == "cpu" and runtime.autocast_dtype == torch.bfloat16
        fast = fast and not has_compiled_parts(model)
        self._convolutions = TrainingConvolutions() if fast else None
        self.setup()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.recipe}, model={type(self.model).__name__})"

    @classmethod
    def teachers_needed(cls, recipe: Recipe) -> tuple[str, ...]:
        """Return the names of the frozen models that this recipe needs."""
        return ()

    @classmethod
    def teachers_for(cls, recipe: Recipe, model: nn.Module) -> dict[str, nn.Module]:
        """Return, by the name of each frozen model, a module with its architecture: the model or a part of it."""
        return dict.fromkeys(cls.teachers_needed(recipe), model)

    def setup(self) -> None:
        """Build the parts besides the model: attacks, further models, checks."""

    def initialise(self) -> None:
        """Set the starting weights; the weights of a resumed run replace them afterwards."""

    def trainable(self) -> dict[str, nn.Module]:
        """Return the trained models by name. Each has its own optimiser.

        The first model is validated, averaged and evaluated. Parameters that do not require gradients are not
        changed.
        """
        return {"model": self.model}

    def compile(self, mode: str | None = None) -> None:
        """Run the passes of the trained models through torch.compile. Their state dicts do not change.

        Args:
            mode: mode of ``torch.compile``; ``"reduce-overhead"`` captures the passes as CUDA graphs.
        """
        self._convolutions = None  # the compiler chooses its own convolutions
        for module in self.trainable().values():
            module.compile(mode=mode)
        self._split_pass = torch.compile(_features_and_logits, mode=mode)

    def gauges(self) -> dict[str, Tensor]:
        """Return scalars about the last batch. They are read only when a record is written.

        The names must be the same for all batches.
        """
        return {}

    def train_mode(self) -> None:
        """Put the models in the modes that an iteration needs, such as training mode."""
        for module in self.trainable().values():
            module.train()

    @abc.abstractmethod
    def attack(self, batch: TrainBatch) -> AttackedT:
        """Return the images to train on, and further results for `training_loss`."""

    @abc.abstractmethod
    def training_loss(self, batch: TrainBatch, adv: AttackedT) -> LossResult:
        """Return the loss with gradients to the trained models. Runs under `autocast`."""

    def step(self, batch: TrainBatch, update: Update) -> None:
        """Train on one batch.

        Override it for another order of steps, such as several updates per batch or a loss at
        perturbed weights.

        Args:
            batch: the batch.
            update: takes a loss, computes its gradients and updates the weights; returns False if
                it took no step because the loss or a gradient is not finite.
        """
        with self.runtime.phases("attack"):
            adv = self.attack(batch)
            check_attacked(self, adv, batch)
        with self.runtime.phases("train"):
            with self.autocast():
                result = self.training_loss(batch, adv)
            update(result)

    def state(self) -> dict[str, Tensor]:
        """Return the state between batches, besides models and optimisers, for checkpoints.

        By default it is empty. Else it has tensors by name. With several processes each returns its own part, and
        the parts may differ: tensors [n, ...] of one shape in all processes, such as one value for each place in
        the batch. A scalar is the same in all processes.
        """
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore the result of `state`; the tensors may be on another device."""

    @abc.abstractmethod
    def passes(self, epoch: int) -> float:
        """Return the largest cost per image in one epoch, counted from 0, in F."""

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context for this run's passes, which sets their precision."""
        device, dtype = self.runtime.device.type, self.runtime.autocast_dtype
        context = torch.autocast(device, dtype=dtype, enabled=dtype is not None)
        return context if self._convolutions is None else _both(context, self._convolutions)

    def cross_entropy(self, logits: Tensor, y: Tensor) -> Tensor:
        """Return the cross-entropy of each image [B], with the recipe's label smoothing.

        Args:
            logits: [B, K].
            y: labels [B], or soft labels [B, K].
        """
        smoothing = self.recipe.label_smoothing
        if is_soft(y):
            wide = at_least_float32(logits)
            target = y.to(wide.dtype) * (1 - smoothing) + smoothing / y.shape[1]
            return soft_cross_entropy(wide, target)
        return cross_entropy(logits, y, label_smoothing=smoothing, reduction="none")

    def teacher_output(self, name: str, x: Tensor, output: Output = logits_of) -> Tensor:
        """Run a frozen model without gradients, if possible by a faster copy; see `FrozenForward`.

        Args:
            name: name of the frozen model.
            x: images [B, C, H, W].
            output: a function of the model and the images that gives the result; by default it gives the logits.
                `features_of` gives the map before pooling. It must be the same object in all calls.

        Returns:
            The result of `output`, in float32 or in the dtype of the run's passes.
        """
        return self.frozen_output(name, self.teachers[name], x, output)

    def frozen_output(self, name: str, model: nn.Module, x: Tensor, output: Output) -> Tensor:
        """Run any model in evaluation mode whose weights do not change, as `teacher_output` does.

        Args:
            name: the model's name in messages.
            model: the model. If it is another model than in the last call with this name, it replaces that model.
            x: images [B, C, H, W].
            output: as for `teacher_output`.

        Returns:
            The result of `output`, in float32 or in the dtype of the run's passes.
        """
        found = self._frozen.get((name, output))
        if found is None or not found.is_of(model):
            found = FrozenForward(name, model, output, self.runtime.autocast_dtype)
            self._frozen[name, output] = found
        with torch.no_grad(), self.autocast():
            return found(x)

    def features_and_logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Run the trained model once, and return the map before pooling [B, C, H, W] and the logits [B, K]."""
        self.halves["model"] = (self.model, logits_of_halves)
        return self._split_pass(self.model, x)


@contextmanager
def _both(outer: AbstractContextManager[Any], inner: AbstractContextManager[Any]) -> Iterator[None]:
    with outer, inner:
        yield


def _features_and_logits(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    features = model.forward_features(x)
    return features, model.forward_head(features)


def accuracy(logits: Tensor, y: Tensor) -> Tensor:
    """Return the fraction of the batch that is classified correctly, as a scalar tensor.

    For soft labels the most probable class counts as the right class.
    """
    return (logits.detach().argmax(1) == hard(y)).float().mean()
