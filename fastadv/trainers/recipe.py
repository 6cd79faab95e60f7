"""Recipes: all numbers and choices that determine the result of a training run."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias, TypeVar

from fastadv.attacks.arguments import EngineName
from fastadv.fields import check_fields
from fastadv.ops.values import check_radius, did_you_mean
from fastadv.trainers.number import Number
from fastadv.trainers.recipe_type import RecipeType, with_norm
from fastadv.trainers.schedules import MultiStep, Schedule

if TYPE_CHECKING:
    from typing_extensions import Self

Precision = Literal["auto", "fp32", "bf16"]
Presets: TypeAlias = Mapping[str, Mapping[str, Any]]
RecipeT = TypeVar("RecipeT", bound="Recipe")
_TENTH_AFTER_75_AND_90 = MultiStep((75, 90), 0.1)
_ADAMW = {"lr": 1e-3, "weight_decay": 1e-2}
# The numbers of one-step methods in l2: their step is 1.25 eps.
ONE_STEP_IN_L2: Mapping[str, Any] = {"eps": 128 / 255, "alpha": 160 / 255}


@dataclass(frozen=True, kw_only=True)
class Recipe(metaclass=RecipeType):
    """Numbers that every method has. The defaults are the numbers of standard training in the papers.

    Attributes:
        presets: for each preset, the fields in which it differs from the defaults, which are "paper". Recipes of
            methods whose authors' code is known have "official" too: the numbers of that code.
        deciding: fields from which `defaults_for` chooses the defaults of the other fields.
        epochs: passes over the training images.
        batch_size: images per iteration; the incomplete last batch of an epoch is dropped.
        lr: learning rate, which the schedule scales.
        schedule: how the learning rate changes over the run; the default scales in proportion with the epochs.
        warmup: epochs in which a linear rise from 0 goes on top of the schedule.
        optimizer: "sgd" or "adamw" (Loshchilov and Hutter 2019). With AdamW a recipe begins with PyTorch's
            default learning rate and weight decay for it, .001 and .01, unless they are given.
        momentum: momentum of SGD; a schedule that cycles the momentum has its own numbers for it.
        nesterov: Nesterov's form of the momentum.
        betas: decay of AdamW's averages of the gradient and of its square. A schedule that cycles the momentum
            cycles the first beta.
        weight_decay: weight decay of the parameters; in SGD it is part of the gradient, in AdamW it is decoupled.
        norm_decay: let the weights and biases of normalisation layers decay as well.
        clip_grad_norm: largest L2 norm of the gradient of a model; longer ones are scaled down.
        label_smoothing: fraction of the target that the cross-entropy spreads evenly over all classes;
            methods that compare the logits of clean and adversarial images do not support it.
        mixup: alpha of mixup (Zhang et al. 2018). Each image and its label are mixed with another image of the
            batch and its label. The ratio is drawn from the Beta(alpha, alpha) distribution. 0 turns mixup off.
            Only methods that support `label_smoothing` support it.
        ema_decay: decay per iteration of a moving average of the weights, which is then validated and
            evaluated. By default there is no average.
        swa_start: first epoch, counted from 1, whose last weights go into a plain average over
            the ends of epochs (SWA). From then on this average is validated and evaluated. Its
            BatchNorm statistics are computed again from the training images: 1F more per image.
        pad: pixels of padding for the random crop; 0 turns the crop off.
        pad_mode: content of the padding.
        flip: random horizontal flips.
        extra_fraction: fraction of each batch that is drawn from extra images, such as synthetic ones (Carmon
            et al. 2019). An epoch has as many iterations as without them, so it does not use all training images.
        extra_weight: weight of an extra image's loss. The weight of a training image is 1. The weighted losses
            are divided by the mean weight.
        precision: precision of the training passes. "auto" is bfloat16 autocast where the hardware has fast
            bfloat16, else float32. Weights, losses and images are float32 in any case.
        channels_last: memory layout of images and weights.
        compile: run the trained models through torch.compile, which takes minutes at the start.
        seed: seed of all random numbers of the run.
        train_images: number of training images to use, evenly over the classes; all by default.
        holdout: number of training images set aside for validation, which chooses the best checkpoint. With 0
            test images choose it, as in the papers, and its test accuracy is then slightly optimistic.
        monitor_images: number of images for validation.
        monitor_steps: steps of PGD in a validation, for methods with an eps; the others have no attack in it.
        monitor_every: epochs between two validations.
        patience: number of validations without an improvement after which the run ends early (against robust
            overfitting, Rice et al. 2020). Set `holdout` too, because otherwise test images decide it.
        max_bad_steps: consecutive iterations with a non-finite loss after which the run stops.
        sync_bn: with several processes, compute BatchNorm's mean and variance over the global batch. Otherwise
            each process normalises by its own part of the batch, and the statistics of the first process are kept.
    """

    epochs: int = 100
    batch_size: int = 128
    lr: Number = 0.1
    schedule: Schedule = _TENTH_AFTER_75_AND_90
    warmup: Number = 0.0
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: Number = 0.9
    nesterov: bool = False
    betas: tuple[Number, Number] = (0.9, 0.999)
    weight_decay: Number = 5e-4
    norm_decay: bool = True
    clip_grad_norm: Number | None = None
    label_smoothing: Number = 0.0
    mixup: Number = 0.0
    ema_decay: Number | None = None
    swa_start: int | None = None
    pad: int = 4
    pad_mode: Literal["constant", "reflect"] = "constant"
    flip: bool = True
    extra_fraction: Number = 0.0
    extra_weight: Number = 1.0
    precision: Precision = "auto"
    channels_last: bool = True
    compile: bool = False
    seed: int = 0
    train_images: int | None = None
    holdout: int = 0
    monitor_images: int = 1000
    monitor_steps: int = 10
    monitor_every: int = 1
    patience: int | None = None
    max_bad_steps: int = 5
    sync_bn: bool = False

    presets: ClassVar[Presets] = {"paper": {}}
    deciding: ClassVar[tuple[str, ...]] = ("optimizer",)

    def __post_init__(self) -> None:
        check_fields(self)
        self._check_ranges()
        self._check_combinations()

    def _check_ranges(self) -> None:
        """Check each number by itself, and the averages of the weights."""
        for name in ("epochs", "batch_size", "monitor_images", "monitor_every", "max_bad_steps"):
            check_field(self, name, at_least=1)
        for name in ("pad", "holdout", "monitor_steps"):
            check_field(self, name, at_least=0)
        for name in ("lr", "warmup", "momentum", "weight_decay", "mixup"):
            check_field(self, name, at_least=0)
        if self.clip_grad_norm is not None and not self.clip_grad_norm > 0:
            raise ValueError(f"clip_grad_norm must be > 0, got {self.clip_grad_norm}")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}")
        if self.swa_start is not None and not 1 <= self.swa_start <= self.epochs:
            raise ValueError(
                f"swa_start must be in 1 .. {self.epochs} (epochs), got {self.swa_start}"
            )
        if self.ema_decay is not None and self.swa_start is not None:
            raise ValueError(
                "ema_decay and swa_start exclude each other (there is one average of the weights), "
                f"got {self.ema_decay} and {self.swa_start}"
            )
        for name in ("patience", "train_images"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        for name in ("label_smoothing", "extra_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in 0..1, got {getattr(self, name)}")
        if not 0 < self.extra_weight < math.inf:
            raise ValueError(f"extra_weight must be > 0, got {self.extra_weight}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {self.betas}")

    def _check_combinations(self) -> None:
        """Check numbers that do not go together, and the momentum."""
        if self.mixup and self.extra_weight != 1:
            raise ValueError(f"extra_weight must be 1 with mixup, got {self.extra_weight}")
        if self.momentum >= 1:
            raise ValueError(
                f"momentum must be < 1, got {self.momentum}: no gradient would ever fade"
            )
        if self.nesterov and self.momentum == 0:
            raise ValueError(f"momentum must be > 0 with nesterov, got {self.momentum}")
        cycled = self.schedule.momentum(0.0, self.epochs) is not None
        if cycled and self.momentum != type(self).momentum:
            raise ValueError(
                f"momentum must be left at {type(self).momentum} with a {type(self.schedule).__name__} schedule "
                f"that cycles it, got {self.momentum}; set the schedule's base_momentum and max_momentum"
            )
        if cycled and self.betas[0] != type(self).betas[0]:
            raise ValueError(
                f"betas must begin with {type(self).betas[0]} with a {type(self.schedule).__name__} schedule that "
                f"cycles it, got {self.betas}; set the schedule's base_momentum and max_momentum"
            )

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Self:
        """Return the recipe with the numbers of a preset.

        Args:
            name: one of `presets`.
            changes: fields with other values than in the preset.

        Raises:
            ValueError: if the preset is unknown, or a number is out of range.
        """
        if name not in cls.presets:
            official = "; it follows no published code"
            reason = official if name == "official" else did_you_mean(name, cls.presets)
            raise ValueError(
                f"preset of {cls.__name__} must be one of {', '.join(cls.presets)}, "
                f"got {name!r}{reason}"
            )
        changes = with_norm(cls, changes)
        return cls(**{**cls.defaults_for(name, changes), **changes})

    @classmethod
    def defaults_for(cls, preset: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the defaults of a recipe, which depend on the fields that the caller sets.

        They are the numbers of `preset_defaults`, then of `threat_defaults`, then of the optimiser. For another
        number of epochs the schedule is scaled, so that the learning rate drops at the same fractions of the run.

        Args:
            preset: one of `presets`.
            given: fields that the caller sets.
        """
        adamw = _ADAMW if given.get("optimizer") == "adamw" else {}
        numbers = {**cls.preset_defaults(preset, given), **cls.threat_defaults(given), **adamw}
        planned, epochs = numbers.get("epochs", cls.epochs), given.get("epochs", 0)
        if isinstance(epochs, Integral) and int(epochs) > 0:
            schedule = numbers.get("schedule", cls.schedule)
            numbers["schedule"] = schedule.scaled(planned, int(epochs))
        return numbers

    @classmethod
    def deciders(cls) -> tuple[str, ...]:
        """Return the fields in `deciding`, including the fields of the base classes."""
        names = [name for kind in cls.__mro__ for name in vars(kind).get("deciding", ())]
        return tuple(dict.fromkeys(names))

    @classmethod
    def threat_defaults(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the numbers that depend on the given threat, such as the norm."""
        return {}

    @classmethod
    def preset_defaults(cls, preset: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields whose defaults differ from the defaults of the class.

        Args:
            preset: one of `presets`.
            given: fields that the caller sets; only the fields in `deciding` are used.
        """
        return dict(cls.presets[preset])

    def lr_at(self, epoch: float) -> float:
        """Return the learning rate at a position in the run, in epochs counted from 0.

        Raises:
            ValueError: if a schedule, such as one of your own, returns a factor that is negative or not finite.
        """
        rise = min(epoch / self.warmup, 1.0) if self.warmup else 1.0
        factor = float(self.schedule.factor(epoch, self.epochs))
        if not 0 <= factor < math.inf:
            raise ValueError(
                f"{type(self.schedule).__name__}.factor must return a finite number >= 0, got {factor} after "
                f"{epoch:g} of {self.epochs} epochs"
            )
        return self.lr * rise * factor

    def momentum_at(self, epoch: float) -> float:
        """Return the momentum at a position in the run, in epochs counted from 0."""
        cycled = self.schedule.momentum(epoch, self.epochs)
        return self.momentum if cycled is None else cycled


@dataclass(frozen=True, kw_only=True)
class AdversarialRecipe(Recipe):
    """Further numbers of methods with a PGD attack in training.

    In l2 the default radius and step size are those of robust_overfitting (Rice et al. 2020), 128/255 and 15/255.
    `dataclasses.replace` keeps both numbers when it changes the norm.

    Attributes:
        norms: norms of the balls for which the method is defined.
        norm: norm of the ball for the attack, its start and the noise.
        eps: radius of the ball, in units of the 0..1 image.
        alpha: step size of the attack, in the same units; in l2 the length of the whole step.
        steps: number of steps of the attack, K.
        random_start: start the attack from a random point of the ball.
        l2_start: how the random start is drawn in l2. "ball" is uniform in the ball. "radius" has a uniform
            direction and a uniform distance, as in robust_overfitting, and so is nearer to the image.
        attack_mode: mode of the model during the attack. "eval" is evaluation mode. "train" is training mode, in
            which an image's attack depends on its batch; BatchNorm's running statistics are restored afterwards.
            "moving" is training mode in which every pass of the attack updates them, as in robust_overfitting and
            AWP-AT.
        attack_precision: precision of the attack's passes, with the same values as `precision`.
        engine: how the attack is run; see `fastadv.PGD`. In training "auto" does not choose by measuring
            times, so that a run can be repeated and resumed to the bit.
        awp_gamma: size of AWP's perturbation of the weights, relative to the weights. 0 turns AWP off. Its paper
            has .01 for PGD-AT and .005 for TRADES. AWP costs one more training pass.
        awp_warmup: epochs from the start without AWP.
    """

    norm: Literal["linf", "l2"] = "linf"
    eps: Number = 8 / 255
    alpha: Number = 2 / 255
    steps: int = 10
    random_start: bool = True
    l2_start: Literal["ball", "radius"] = "ball"
    attack_mode: Literal["eval", "train", "moving"] = "eval"
    attack_precision: Precision = "auto"
    engine: Literal["auto", "eager", "compiled", "graph"] = "auto"
    awp_gamma: Number = 0.0
    awp_warmup: int = 0

    deciding: ClassVar[tuple[str, ...]] = ("norm",)
    norms: ClassVar[tuple[str, ...]] = ("linf", "l2")
    l2_numbers: ClassVar[Mapping[str, Any]] = {"eps": 128 / 255, "alpha": 15 / 255}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm not in self.norms:
            raise ValueError(
                f"norm must be {' or '.join(map(repr, self.norms))} for this method, got {self.norm!r}"
            )
        for name in ("eps", "alpha", "awp_gamma", "awp_warmup"):
            check_field(self, name, at_least=0)
        check_field(self, "steps", at_least=1)
        if self.alpha == 0 < self.eps:
            raise ValueError("alpha must be > 0 with eps > 0, got 0: there would be no attack")
        if self.norm == "linf" and self.alpha >= 2:
            raise ValueError(
                f"alpha must be below 2, twice the width of the images' values, got {self.alpha:g}; it is in the "
                "units of the images: 2/255, say"
            )
        if self.sync_bn and self.attack_mode != "eval":
            raise ValueError(
                "attack_mode must be 'eval' with sync_bn, whose statistics no attack gathers, "
                f"got {self.attack_mode!r}"
            )
        if self.norm == "linf":  # in l2 the check needs the size of the images
            check_radius("eps", self.eps, "linf", (0.0, 1.0))

    @property
    def attack_engine(self) -> EngineName:
        """The engine of the attack; "fixed", which chooses in a fixed order, for "auto"."""
        return "fixed" if self.engine == "auto" else self.engine

    @classmethod
    def threat_defaults(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the default radius and step size in l2; empty in linf."""
        return dict(cls.l2_numbers) if given.get("norm") == "l2" else {}


def refuses_replaced_deciders(kind: type[RecipeT]) -> type[RecipeT]:
    """Keep `dataclasses.replace` from changing a field on which other numbers of the recipe depend.

    This decorator goes above `dataclass`, on a class whose `preset_defaults` depends on the given numbers.
    `dataclasses.replace` passes every number as if the caller had given it. The class needs an `InitVar` with the
    name `replaces`: through it `dataclasses.replace` passes the recipe that it changes.
    """
    init = kind.__init__

    @functools.wraps(init)
    def checked(self: RecipeT, *, replaces: RecipeT | None = None, **numbers: Any) -> None:
        if replaces is not None:
            _check_same_deciders(replaces, numbers)
        init(self, **numbers)

    kind.__init__ = checked  # type: ignore[assignment, method-assign]
    kind.replaces = property(lambda self: self)  # type: ignore[attr-defined]
    return kind


def _check_same_deciders(recipe: Recipe, numbers: Mapping[str, Any]) -> None:
    """Refuse to change a field from which `preset_defaults` has chosen numbers that would not change with it."""
    for name in recipe.deciders():
        old, new = getattr(recipe, name), numbers[name]
        if new != old:
            kind = type(recipe).__name__
            raise ValueError(
                f"{name} must be chosen when a recipe is made, got {new!r} in place of {old!r} by "
                f"dataclasses.replace, which keeps the other numbers of {old!r}; write {kind}({name}={new!r}, ...)"
            )


def shared_numbers(recipe: Recipe, kind: type[Recipe], without: tuple[str, ...]) -> dict[str, Any]:
    """Return the numbers of a recipe for the fields that another recipe class has as well.

    Args:
        recipe: the recipe.
        kind: the other class.
        without: fields to leave out, as they mean something else in the other class.
    """
    names = {f.name for f in dataclasses.fields(kind)} - set(without)
    return {f.name: getattr(recipe, f.name) for f in dataclasses.fields(recipe) if f.name in names}


def check_field(recipe: Recipe, name: str, at_least: float) -> None:
    """Check that a recipe's number is finite and not less than a bound.

    Raises:
        ValueError: if it is not.
    """
    value = getattr(recipe, name)
    if not (math.isfinite(value) and value >= at_least):
        finite = "" if math.isfinite(value) else "finite and "
        raise ValueError(f"{name} must be {finite}>= {at_least}, got {value}")
