"""Projected gradient descent (Madry et al. 2018): the loop, as a function and as an object."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastadv.attacks.arguments import check_batch, check_seed, check_settings, check_values
from fastadv.attacks.engines import Engine, Model, make_engine, resolve_precision
from fastadv.attacks.objectives import LossFunction, Objective
from fastadv.attacks.rounding import round_towards
from fastadv.attacks.structure import structure_of
from fastadv.ops import pgd_step_, random_start
from fastadv.seeding import derive_seed, draw_seed


@dataclass(frozen=True)
class PGDSettings:
    """What a PGD attack does, checked on creation. Fields as in `pgd_fused`."""

    eps: float = 8 / 255
    alpha: float = 2 / 255
    steps: int = 10
    norm: str = "linf"
    bounds: tuple[float, float] = (0.0, 1.0)
    random_start: bool = True
    restarts: int = 1
    targeted: bool = False
    loss: str | LossFunction = "ce"
    precision: str = "auto"
    engine: str = "auto"
    train_mode: bool = False

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            TypeError: steps or restarts is no integer, loss neither a name nor callable.
            ValueError: a value out of range or an unknown word.
        """
        check_settings(
            eps=self.eps,
            alpha=self.alpha,
            steps=self.steps,
            norm=self.norm,
            bounds=self.bounds,
            restarts=self.restarts,
            random_start=self.random_start,
            precision=self.precision,
            engine=self.engine,
        )
        objective = Objective(self.loss, self.targeted)
        if objective.needs_clean_logits and not self.random_start:
            raise ValueError("random_start must be True with loss 'kl', whose gradient is 0 at x")


class PGD:
    """A PGD attack on one model, to be called many times: ``adv = PGD(model)(x, y)``.

    It holds the engine, built at the first call for the images' device and dtype, and brings the model's live
    weights over at every call. Between calls the model may be trained, moved or changed in structure.

    Args:
        model: as in `pgd_fused`.
        eps: as in `pgd_fused`.
        alpha: as in `pgd_fused`.
        steps: as in `pgd_fused`.
        random_start: as in `pgd_fused`.
        seed: of every call that names none; None draws one per call from torch's default generator.
        check_inputs: check the values of images and labels at every call. On a GPU this waits for the device
            once per call; turn it off where the data are known to be good.
        settings: the other arguments of `pgd_fused`, by name.

    Raises:
        TypeError: as in `pgd_fused`.
        ValueError: as in `pgd_fused`.
    """

    def __init__(
        self,
        model: Model,
        eps: float = 8 / 255,
        alpha: float = 2 / 255,
        steps: int = 10,
        random_start: bool = True,
        *,
        seed: int | None = None,
        check_inputs: bool = True,
        **settings: Any,
    ) -> None:
        self.settings = PGDSettings(eps, alpha, steps, random_start=random_start, **settings)
        self.model = model
        self.seed = check_seed(seed)
        self.check_inputs = check_inputs
        self._engines = EngineCache()

    def __call__(
        self,
        x: Tensor,
        y: Tensor,
        *,
        seed: int | None = None,
        sample_ids: Tensor | None = None,
    ) -> Tensor:
        """Attack a batch.

        Args:
            x: images [B, ...] within the bounds.
            y: labels, or targets, [B] int64.
            seed: of the random start, for this call.
            sample_ids: int64 [B], which random numbers each sample gets; default 0 .. B-1.

        Returns:
            Adversarial images [B, ...] in ``x``'s dtype and layout.

        Raises:
            TypeError: as in `pgd_fused`.
            ValueError: as in `pgd_fused`.
        """
        check_batch(x, y, sample_ids, self.model)
        seed = check_seed(seed)
        if x.shape[0] == 0:
            return x.detach().clone()
        if seed is None:
            seed = draw_seed() if self.seed is None else self.seed
        with _own_context(x.device):
            x, y = _usable(x), _usable(y)
            engine = self._engines.engine(self.model, x, self.settings)
            with engine.session(self.model, seed):
                return _attack(engine, self.settings, x, y, seed, sample_ids, self.check_inputs)

    def engine_for(self, x: Tensor) -> Engine:
        """The engine that a call with images like ``x`` uses, with its ``name`` and ``reason``."""
        with _own_context(x.device):
            return self._engines.engine(self.model, x, self.settings)


class EngineCache:
    """Engines of one model, kept until its structure changes."""

    def __init__(self) -> None:
        self._structure: object = None
        self._engines: dict[tuple[Any, ...], Engine] = {}

    def engine(self, model: Model, x: Tensor, settings: PGDSettings) -> Engine:
        """The engine for images like ``x``; built when there is none or the model has changed."""
        structure = structure_of(model)
        if structure != self._structure:
            self._engines.clear()
            self._structure = structure
        precision = resolve_precision(settings.precision, model, x)
        key = (x.device, precision, settings.engine, settings.train_mode)
        if key not in self._engines:
            self._engines[key] = make_engine(
                model, x, precision, settings.engine, settings.train_mode
            )
        return self._engines[key]


_CACHES: weakref.WeakKeyDictionary[nn.Module, EngineCache] = weakref.WeakKeyDictionary()


def pgd_fused(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    eps: float = 8 / 255,
    alpha: float = 2 / 255,
    steps: int = 10,
    norm: str = "linf",
    bounds: tuple[float, float] = (0.0, 1.0),
    random_start: bool = True,
    restarts: int = 1,
    targeted: bool = False,
    loss: str | LossFunction = "ce",
    precision: str = "auto",
    engine: str = "auto",
    train_mode: bool = False,
    seed: int | None = None,
    sample_ids: Tensor | None = None,
) -> Tensor:
    """Attack a batch with projected gradient descent (Madry et al. 2018, section 2.1).

    The model's modes, ``requires_grad`` flags, gradients, buffers and weights are on return, or after an
    exception, what they were. A model seen before reuses its engine, whose weights are brought up to date.

    Args:
        model: a module, or any callable, from images [B, ...] to logits [B, C]; normalisation of the
            images belongs inside it.
        x: images [B, ...] within ``bounds``, floating point.
        y: labels [B] int64; with ``targeted``, the classes to be reached.
        eps: radius of the ball, in the units of ``x``.
        alpha: step size, in the units of ``x``.
        steps: number of steps, at least 1.
        norm: ``"linf"`` or ``"l2"``.
        bounds: lowest and highest allowed value of an image.
        random_start: start from a uniform random point of the ball (`fastadv.ops.random_start`), else from ``x``.
        restarts: runs from different random starts; per sample the one with the highest loss is returned.
        targeted: lower the loss of the classes ``y`` instead of raising it.
        loss: ``"ce"``, ``"cw"`` (margin), ``"dlr"``, ``"kl"`` (TRADES, against the clean logits; needs
            ``random_start``, since its gradient is zero at ``x``) or a callable ``(logits, y) -> [B] or scalar``.
        precision: of the network: ``"fp32"``, ``"bf16"``, ``"fp16"``, or ``"auto"``: bf16 for modules where
            the hardware has it. Logits, loss and images are float32 (float64 for float64 images) always.
        engine: ``"eager"`` runs the live model; ``"compiled"`` a folded copy (with ``torch.compile`` on a GPU);
            ``"auto"`` a folded copy in narrow precision and the live model in fp32, whose result then equals
            a plain loop's bit for bit.
        train_mode: attack the model in train mode, for recipes that do so; its buffers are restored.
        seed: of the random start; None draws one from torch's default generator.
        sample_ids: int64 [B], which random numbers each sample gets; default 0 .. B-1.

    Returns:
        Adversarial images [B, ...] in ``x``'s dtype and layout, inside ball and bounds. An empty batch is
        returned as it is.

    Raises:
        TypeError: an argument of the wrong type, named in the message.
        ValueError: an argument out of range, shapes or devices that do not fit, images that are not finite
            or outside ``bounds``, labels outside the model's classes.
    """
    attack = PGD(
        model,
        eps,
        alpha,
        steps,
        random_start,
        norm=norm,
        bounds=bounds,
        restarts=restarts,
        targeted=targeted,
        loss=loss,
        precision=precision,
        engine=engine,
        train_mode=train_mode,
    )
    if isinstance(model, nn.Module):
        attack._engines = _CACHES.setdefault(model, attack._engines)
    return attack(x, y, seed=seed, sample_ids=sample_ids)


@contextmanager
def _own_context(device: torch.device) -> Iterator[None]:
    """Leave the caller's inference mode and autocast: the attack needs gradients and has its own precision."""
    with torch.inference_mode(False), torch.autocast(device.type, enabled=False):
        yield


def _usable(tensor: Tensor) -> Tensor:
    """The tensor without its gradient; a copy if it is an inference tensor, which autograd refuses to save."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def _attack(
    engine: Engine,
    settings: PGDSettings,
    x: Tensor,
    y: Tensor,
    seed: int,
    sample_ids: Tensor | None,
    check_inputs: bool,
) -> Tensor:
    centre = engine.images(x)
    objective = Objective(settings.loss, settings.targeted)
    clean_logits = engine.logits(centre) if objective.needs_clean_logits else None
    unchecked = check_inputs

    def value_of(logits: Tensor) -> Tensor:
        nonlocal unchecked
        if unchecked:  # only now is the number of classes known
            check_values(x, y, settings.bounds, logits.shape[1])
            unchecked = False
        value = objective(logits, y, clean_logits)
        if settings.restarts > 1 and value.dim() == 0:
            raise ValueError(
                "loss must return one value per sample, [B], with restarts > 1; got a scalar"
            )
        return value

    best = _run(engine, settings, centre, value_of, seed, sample_ids)
    if settings.restarts > 1:
        best_value = value_of(engine.logits(best))
    for restart in range(1, settings.restarts):
        restart_seed = derive_seed(seed, "restart", restart)
        adv = _run(engine, settings, centre, value_of, restart_seed, sample_ids)
        value = value_of(engine.logits(adv))
        better = value > best_value
        best = torch.where(better.view(-1, *[1] * (x.dim() - 1)), adv, best)
        best_value = torch.where(better, value, best_value)
    return round_towards(best, x)


def _run(
    engine: Engine,
    settings: PGDSettings,
    centre: Tensor,
    value_of: Callable[[Tensor], Tensor],
    seed: int,
    sample_ids: Tensor | None,
) -> Tensor:
    """One run of K steps from one start."""
    eps, norm, bounds = settings.eps, settings.norm, settings.bounds
    if settings.random_start:
        adv = random_start(centre, eps, norm, bounds, seed, sample_ids=sample_ids)
    else:
        adv = centre.clone()
    for _ in range(settings.steps):
        grad = engine.gradient(adv, value_of).grad
        pgd_step_(adv, grad, centre, eps, settings.alpha, norm, bounds)
    return adv
