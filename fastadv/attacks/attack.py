"""The base of every attack: a model, settings, an engine that is built once, and a call on a batch."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastadv.attacks.arguments import (
    EngineName,
    Precision,
    TrainMode,
    check_batch,
    check_images,
    check_labels,
    check_limits,
    check_model,
    check_seed,
    check_start,
    check_step_sizes,
)
from fastadv.attacks.attack_warnings import (
    warn_of_gradients,
    warn_of_modes,
    warn_of_probabilities,
    warn_of_settings,
)
from fastadv.attacks.batch import AttackBatch, CallOverrides
from fastadv.attacks.options import Checked, Configured, Setting, names_checked
from fastadv.attacks.report import AttackReport, outside_share
from fastadv.attacks.rounding import round_towards
from fastadv.engine.engines import Engine, Model
from fastadv.engine.frozen import frozen, in_mode
from fastadv.engine.layout import naming_layout
from fastadv.engine.network_lock import locked
from fastadv.engine.request import EngineRequest
from fastadv.engine.selection import EngineCache
from fastadv.fields import check_fields
from fastadv.ops import checks
from fastadv.ops.pgd_step_per_channel import Bounds
from fastadv.ops.values import check_bool, check_radius, integer, largest_radius, limit, shown
from fastadv.seeding import draw_seed


@dataclass(frozen=True)
class AttackSettings:
    """The settings that all attacks have in common, checked on creation. Fields as in `fastadv.PGD`."""

    eps: float = 8 / 255
    _: KW_ONLY
    norm: str = "linf"
    bounds: tuple[float, float] = (0.0, 1.0)
    targeted: bool = False
    precision: Precision = "auto"
    engine: EngineName = "auto"
    train_mode: TrainMode = False

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            TypeError: a field of another type.
            ValueError: a value out of range or an unknown word.
        """
        for name in ("eps", "alpha", "bounds"):
            _check_no_tensor(name, getattr(self, name, None))
        object.__setattr__(self, "norm", checks.norm_name(self.norm))
        object.__setattr__(self, "bounds", checks.check_bounds(self.bounds))
        check_fields(self)
        self._check_eps()

    def _check_eps(self) -> None:
        limit("eps", self.eps)
        if self.norm == "linf":  # in other norms the check needs the size of the images
            check_radius("eps", self.eps, self.norm, self.bounds)


def _check_no_tensor(name: str, value: object) -> None:
    """Refuse a tensor: settings are compared, shown and hashed."""
    entries = value if isinstance(value, tuple | list) else (value,)
    found = next((entry for entry in entries if isinstance(entry, Tensor)), None)
    if found is not None:
        kind = "a pair of numbers (low, high)" if name == "bounds" else "a number"
        raise TypeError(
            f"{name} must be {kind}, got {shown(found)}; attacks by steps "
            f"take tensors, such as one per channel, with the call: attack(x, y, {name}=...)"
        )


class Attack(Configured):
    """An attack on one model, to be called many times: ``adv = attack(x, y)``.

    It holds the engine, built at the first call for the images' device and dtype, and reads the model's live
    weights at every call. Between calls the model may be trained, moved or changed in structure. After
    a call, and after an exception, its modes, ``requires_grad`` flags, gradients, buffers and weights are
    restored, except the buffers with ``train_mode="moving"``.

    Args:
        model: a module, or any callable, from images [B, ...] to logits [B, C].
        settings: the settings of the attack.
        seed: seed of every call without a seed; None draws a seed per call from torch's default generator.
        check_inputs: check the values of images and labels at every call, which on a GPU waits for the device.

    Attributes:
        model: the attacked model.
        settings: all settings. Each is also an attribute, such as ``eps``, and may be set for the next calls.
        passes: number of passes through the network for one gradient, which is their mean; 1 unless set. More
            passes are for models that draw random numbers (EOT, expectation over transformations). Attacks without
            a gradient ignore it.

    Raises:
        ValueError: ``engine="graph"`` for an attack that cannot be recorded.
    """

    model = Checked[Model](check_model)
    settings: AttackSettings
    eps = Setting[float]()
    norm = Setting[str]()
    bounds = Setting[tuple[float, float]]()
    targeted = Setting[bool]()
    precision = Setting[Precision]()
    engine = Setting[EngineName]()
    train_mode = Setting[TrainMode]()
    seed = Checked(check_seed)
    check_inputs = Checked(partial(check_bool, "check_inputs"))
    passes = Checked(partial(integer, "passes", at_least=1))

    def __init__(
        self, model: Model, settings: AttackSettings, seed: int | None, check_inputs: bool
    ) -> None:
        self.model = model
        self.passes = 1  # before the settings, whose check reads it
        self.settings = settings
        warn_of_settings(settings)
        self._warned_of = settings  # settings that are set later are checked at the next call
        self._warned_of_modes = False
        self.seed = seed
        self.check_inputs = check_inputs
        self._engines = EngineCache()
        self._last: AttackReport | None = None

    @names_checked
    def __call__(
        self,
        x: Tensor,
        y: Tensor | None = None,
        *,
        seed: int | None = None,
        sample_ids: Tensor | None = None,
        eps: float | Tensor | None = None,
        start: Tensor | None = None,
    ) -> Tensor:
        """Attack a batch.

        Args:
            x: images [B, ...] within the bounds.
            y: labels, or targets, [B], int64 or another integer dtype; or soft labels [B, C], floating point, for
                attacks on the losses "ce" and "kl" or on a callable. None for attacks that do not look at labels:
                on the loss "kl" with ``keep="last"``, except `FriendlyPGD`.
            seed: seed of the random numbers, for this call.
            sample_ids: int64 [B], which random numbers each sample gets; default 0 .. B-1. Equal ids, seeds
                and images give equal results whatever else is in the batch, up to the rounding of the network.
            eps: radius for this call, a number or one per image [B]. Step sizes change in proportion.
            start: images within the bounds to begin from, [B, ...], in place of the attack's own start; they are
                brought into the ball first. Of several restarts only the first begins there.

        Returns:
            Adversarial images [B, ...] in ``x``'s dtype and layout.

        Raises:
            TypeError: as in `fastadv.PGD`.
            ValueError: as in `fastadv.PGD`.
        """
        return self._attack(x, y, seed, sample_ids, eps, start)

    def _attack(
        self,
        x: Tensor,
        y: Tensor | None,
        seed: int | None,
        sample_ids: Tensor | None,
        eps: float | Tensor | None,
        start: Tensor | None,
        overrides: CallOverrides = CallOverrides(),  # noqa: B008, it is immutable
    ) -> Tensor:
        """Do the work of `__call__`; ``overrides`` has the step sizes, numbers of steps and bounds of the call."""
        obstacles = (self._soft_labels_obstacle(), self._labels_obstacle())
        y = check_batch(x, y, sample_ids, self.model, *obstacles)
        seed = check_seed(seed)
        bounds = self.settings.bounds if overrides.bounds is None else overrides.bounds
        radius = self._radius(x, eps, bounds)
        if start is not None:
            checks.check_float("start", start)
            checks.check_same_shape("start", start, "x", x)
        settings, self._last = self.settings, None
        if settings is not self._warned_of:
            warn_of_settings(settings)
            self._warned_of = settings
        if not self._warned_of_modes and not settings.train_mode:
            self._warned_of_modes = warn_of_modes(self.model)
        if x.shape[0] == 0:
            nothing = torch.zeros(2, dtype=torch.int64, device="cpu")
            self._last = AttackReport(
                "none", "the batch is empty", "none", 0, nothing, nothing[0], (), nothing[0]
            )
            return x.detach().clone()
        if seed is None:
            seed = draw_seed() if self.seed is None else self.seed
        in_its_mode = in_mode(self.model, bool(settings.train_mode))
        with self._alone(), _own_context(x.device), in_its_mode, naming_layout("x", self.model, x):
            x, y, start = (
                _for_autograd(x),
                _for_autograd(y),
                None if start is None else _for_autograd(start),
            )
            call = _CallArguments(x, y, seed, sample_ids, radius, start, bounds, overrides)
            if self.check_inputs:
                call.check_values(settings.norm)
            trial = self._engines.trial(self.model, x, self._request())
            run = partial(self._run_by, call)
            batch, adv = trial.unproven(run) or trial.proven(self._ready(x), run)
            outside = outside_share(adv, x, radius, settings.norm, bounds)
            self._last = report = batch.counters.report(batch.engine.precision, outside)
        if self.check_inputs and x.device.type == "cpu":  # elsewhere it would wait for the attack
            # Not `_last`, which is None again if another thread has begun a call by now.
            warn_of_gradients(report, settings)
            warn_of_probabilities(batch.counters.first_logits, settings)
        return adv

    def _run_by(self, call: _CallArguments, engine: Engine) -> tuple[AttackBatch, Tensor]:
        """Attack the images of a call by one engine, and return the batch with its counters, and the result."""
        settings = self.settings
        with engine.session(self.model, call.seed, current=True):
            images = engine.images(call.x)
            batch = AttackBatch(
                engine,
                images,
                call.y,
                call.radius,
                settings.norm,
                call.bounds,
                settings.targeted,
                call.sample_ids,
                partial(check_labels, call.y) if self.check_inputs else None,
                None if call.start is None else engine.images(call.start).to(images.dtype),
                passes=self.passes,
                overrides=call.overrides,
            )
            return batch, round_towards(self._perturb(batch, call.seed), call.x)

    def _ready(self, x: Tensor) -> Engine:
        return self._engines.ready(self.model, x, self._request())

    def _request(self) -> EngineRequest:
        settings = self.settings
        return EngineRequest(settings.precision, settings.engine, settings.train_mode)

    def _alone(self) -> AbstractContextManager[object]:
        """A context in which other threads wait if they attack the model or one that shares a network with it."""
        return locked(self.model)

    def __setattr__(self, name: str, value: Any) -> None:
        before = vars(self).get(name)
        super().__setattr__(name, value)
        if name == "settings" or (name == "passes" and "settings" in vars(self)):
            try:
                self._check_settings(before if name == "settings" else self.settings)
            except (TypeError, ValueError):
                vars(self)[name] = before
                raise

    def _check_settings(self, before: AttackSettings | None) -> None:
        kind = AttackSettings if before is None else type(before)
        if not isinstance(self.settings, kind):
            raise TypeError(f"settings must be {kind.__name__}, got {type(self.settings).__name__}")
        obstacle = self._graph_obstacle() if self.settings.engine == "graph" else None
        if obstacle is not None:
            raise ValueError(
                "engine must be 'auto', 'eager' or 'compiled' for this attack, got 'graph': "
                f"{obstacle}"
            )

    @abstractmethod
    def _perturb(self, batch: AttackBatch, seed: int) -> Tensor:
        """Move the images of a batch: [B, ...] within ball and bounds, not an alias of ``batch.x``."""

    def _graph_obstacle(self) -> str | None:
        """The reason why the attack cannot be recorded as one CUDA graph; None if it can."""
        return f"{type(self).__name__} is run step by step"

    def _soft_labels_obstacle(self) -> str | None:
        """Why the attack takes no soft labels, to follow "y must hold class indices"; None if it takes them."""
        return f"for {type(self).__name__}"

    def _labels_obstacle(self) -> str | None:
        """Why the attack needs labels, to follow "y must be the labels [B]"; None if it does not look at them."""
        return f"for {type(self).__name__}"

    @property
    def last(self) -> AttackReport:
        """The facts of the last call: gradients, losses, engine, and a check of its result.

        Raises:
            RuntimeError: if there was no call, or the last call failed.
        """
        if self._last is None:
            raise RuntimeError("last must be read after a call of the attack that succeeded")
        return self._last

    def engine_for(self, x: Tensor) -> Engine:
        """The engine that a call with images like ``x`` uses, with its ``name`` and ``reason``."""
        with self._alone(), _own_context(x.device):
            return self._ready(x)

    def share_engines(self, other: Attack) -> None:
        """Use the engines that another attack on the same model has built or will build, and the memory they take.

        Raises:
            ValueError: if ``other`` attacks another model.
        """
        if other.model is not self.model:
            raise ValueError("other must be an attack on the same model, got one on another model")
        self._engines = other._engines

    def unchanged(self) -> AbstractContextManager[None]:
        """A context in which the caller does not change the model, so that one proof serves for several calls."""
        return self._engines.still()

    def logits_of_model(self, x: Tensor) -> Tensor:
        """The model's own logits of images, in eval mode and without a gradient."""
        with self.held(x.device), frozen(self.model), torch.no_grad():
            return self.model(x)

    @contextmanager
    def held(self, device: torch.device) -> Iterator[None]:
        """Keep other threads from attacking the model, and the caller's inference mode and autocast out."""
        with self._alone(), _own_context(device):
            yield

    def _radius(self, x: Tensor, eps: float | Tensor | None, bounds: Bounds) -> float | Tensor:
        eps = self.settings.eps if eps is None else eps
        number, values = checks.per_sample("eps", eps, x)
        if values is not None:
            return values
        low, high = bounds
        if not (isinstance(low, Tensor) or isinstance(high, Tensor)):
            check_radius("eps", number, self.settings.norm, (low, high), x.shape[1:].numel())
        return number


class _CallArguments(NamedTuple):
    """The arguments of one call of an attack, after the checks of types, shapes and devices.

    Attributes:
        x: images [B, ...], without gradient.
        y: labels [B], or soft labels [B, C].
        seed: seed of the random numbers.
        sample_ids: int64 [B], or None.
        radius: radius of the ball, a number or a tensor as `AttackBatch` has it.
        start: the points at which the attack starts, [B, ...], or None.
        bounds: lowest and highest value.
        overrides: the step sizes, numbers of steps and bounds that the call gives.
    """

    x: Tensor
    y: Tensor
    seed: int
    sample_ids: Tensor | None
    radius: float | Tensor
    start: Tensor | None
    bounds: Bounds
    overrides: CallOverrides

    def check_values(self, norm: str) -> None:
        """Check the values of images, radii, step sizes and start, which on a GPU waits for the device."""
        check_images(self.x, self.bounds)
        largest = largest_radius(self.bounds, norm, self.x.shape[1:].numel())
        check_limits("eps", self.radius, largest)
        check_step_sizes(self.overrides.alpha, norm, self.bounds)
        if self.start is not None:
            check_start(self.start)


@contextmanager
def _own_context(device: torch.device) -> Iterator[None]:
    """Leave the caller's inference mode and autocast: the attack needs gradients and has its own precision."""
    with torch.inference_mode(False), torch.autocast(device.type, enabled=False):
        yield


def _for_autograd(tensor: Tensor) -> Tensor:
    """The tensor without its gradient; a copy if it is an inference tensor, which autograd refuses to save."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()
