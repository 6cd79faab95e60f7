"""The attacks of Carlini and Wagner (2017): their margin in an eps-ball, and their smallest l2 perturbation."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from fastadv.attacks.arguments import EngineName, Precision, TrainMode
from fastadv.attacks.attack import Attack, AttackSettings
from fastadv.attacks.batch import AttackBatch
from fastadv.attacks.best import where_images
from fastadv.attacks.objectives import LossFunction, Objective
from fastadv.attacks.options import Setting
from fastadv.attacks.pgd import PGD
from fastadv.attacks.pgd_settings import Keep, PGDSettings
from fastadv.engine.engines import Model
from fastadv.ops.checks import over_samples
from fastadv.ops.pgd_step_per_channel import Bounds
from fastadv.ops.values import integer, limit

_INSIDE = 0.999999  # of the way to a bound: at the bound itself the inverse of tanh is infinite
_OTHER_ATTACK = "the attack with c, kappa, steps and lr, which other libraries call CW, is CWL2"
_BETAS, _ADAM_EPS = (0.9, 0.999), 1e-8


@dataclass(frozen=True)
class CWSettings(PGDSettings):
    """The settings of `CW`, checked on creation. It has the same fields."""

    loss: str | LossFunction = field(default="cw", init=False)
    _without_steps: ClassVar[str] = _OTHER_ATTACK

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            TypeError: a field of another type.
            ValueError: a value out of range or an unknown word. A step size of 0 may be another library's kappa.
        """
        if not isinstance(self.random_start, bool | np.bool_):
            raise TypeError(
                f"random_start must be True or False, got {self.random_start!r}; {_OTHER_ATTACK}"
            )
        super().__post_init__()


class CW(PGD):
    """PGD on the margin of Carlini and Wagner: ``max_{j != y} z_j - z_y`` is raised within the eps-ball.

    Robustness papers list this attack as C&W in linf. `CWL2` is the attack of Carlini and Wagner's paper. Other
    libraries call the attack of the paper CW: ``CW(model, c, kappa, steps, lr)``. These arguments are refused
    here.

    Source of the margin: Carlini and Wagner, "Towards evaluating the robustness of neural networks", S&P 2017, f6.

    Args:
        model: as in `fastadv.PGD`.
        eps: as in `fastadv.PGD`.
        alpha: as in `fastadv.PGD`.
        steps: as in `fastadv.PGD`.
        random_start: as in `fastadv.PGD`.
        norm: as in `fastadv.PGD`.
        bounds: as in `fastadv.PGD`.
        restarts: as in `fastadv.PGD`.
        targeted: as in `fastadv.PGD`.
        precision: as in `fastadv.PGD`.
        engine: as in `fastadv.PGD`.
        train_mode: as in `fastadv.PGD`.
        keep: as in `fastadv.PGD`.
        sparsity: as in `fastadv.PGD`.
        seed: as in `fastadv.PGD`.
        check_inputs: as in `fastadv.PGD`.

    Raises:
        TypeError: as in `fastadv.PGD`.
        ValueError: as in `fastadv.PGD`.
    """

    settings: CWSettings

    def __init__(
        self,
        model: Model,
        eps: float = 8 / 255,
        alpha: float = 2 / 255,
        steps: int = 10,
        random_start: bool = True,
        *,
        norm: str = "linf",
        bounds: tuple[float, float] = (0.0, 1.0),
        restarts: int = 1,
        targeted: bool = False,
        precision: Precision = "auto",
        engine: EngineName = "auto",
        train_mode: TrainMode = False,
        keep: Keep = "last",
        sparsity: float = 0.95,
        seed: int | None = None,
        check_inputs: bool = True,
    ) -> None:
        chosen = CWSettings(
            eps,
            alpha,
            steps,
            random_start,
            norm=norm,
            bounds=bounds,
            restarts=restarts,
            targeted=targeted,
            precision=precision,
            engine=engine,
            train_mode=train_mode,
            keep=keep,
            sparsity=sparsity,
        )
        Attack.__init__(self, model, chosen, seed, check_inputs)


@dataclass(frozen=True)
class CWL2Settings(AttackSettings):
    """The settings of `CWL2`, checked on creation. It has the same fields."""

    eps: float = field(default=math.inf, init=False)
    norm: str = field(default="l2", init=False)
    c: float = 1e-3
    kappa: float = 0.0
    steps: int = 1000
    lr: float = 0.01
    search_steps: int = 9

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            TypeError: a field of another type.
            ValueError: a value out of range or an unknown word.
        """
        super().__post_init__()
        limit("kappa", self.kappa)
        for name in ("c", "lr"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name} must be finite and > 0, got {getattr(self, name)}")
        integer("steps", self.steps, at_least=1)
        integer("search_steps", self.search_steps, at_least=1)
        if self.bounds[0] == self.bounds[1]:
            raise ValueError(f"bounds must have low < high, got {self.bounds}")
        if self.precision == "fp16":  # whose engine scales each sample's gradient
            raise ValueError("precision must be 'auto', 'fp32' or 'bf16', got 'fp16'")

    def _check_eps(self) -> None:
        """There is no ball."""


class CWL2(Attack):
    """The smallest l2 perturbation that Carlini and Wagner's method finds; there is no ball.

    ``||x' - x||_2^2 + c max(z_y - max_{j != y} z_j, -kappa)`` is minimised by Adam over w with
    ``x' = (tanh(w) + 1) / 2``, scaled to the bounds; per sample c is searched for by bisection, and multiplied
    by 10 until there is a success. The perturbation is measured in units of the width of the bounds. Source:
    Carlini and Wagner, "Towards evaluating the robustness of neural networks", S&P 2017, sections V and VI-A.

    Unlike its authors' code it does not stop early, which would make a sample depend on the others of its
    batch. It draws no random numbers. Its result lies on the boundary that the attack saw, so leave it at full
    precision unless you do not mind that a float32 model gets part of it right.

    Args:
        model: as in `fastadv.PGD`.
        c: first value of the search for c, > 0.
        kappa: margin that the logits must reach, >= 0.
        steps: number of Adam's steps for each c.
        lr: learning rate of Adam, > 0.
        search_steps: number of values of c that are tried.
        bounds: as in `fastadv.PGD`; the lower bound must be below the upper bound.
        targeted: as in `fastadv.PGD`.
        precision: ``"fp32"``, ``"bf16"`` or ``"auto"``.
        engine: as in `fastadv.PGD`, but for ``"graph"``.
        train_mode: as in `fastadv.PGD`.
        seed: as in `fastadv.PGD`; for models that draw random numbers.
        check_inputs: as in `fastadv.PGD`.

    Raises:
        TypeError: as in `fastadv.PGD`.
        ValueError: as in `fastadv.PGD`.
    """

    settings: CWL2Settings
    c = Setting[float]()
    kappa = Setting[float]()
    steps = Setting[int]()
    lr = Setting[float]()
    search_steps = Setting[int]()

    def __init__(
        self,
        model: Model,
        c: float = 1e-3,
        kappa: float = 0.0,
        steps: int = 1000,
        lr: float = 0.01,
        search_steps: int = 9,
        *,
        bounds: tuple[float, float] = (0.0, 1.0),
        targeted: bool = False,
        precision: Literal["auto", "fp32", "bf16"] = "fp32",
        engine: Literal["auto", "fixed", "eager", "compiled"] = "auto",
        train_mode: TrainMode = False,
        seed: int | None = None,
        check_inputs: bool = True,
    ) -> None:
        chosen = CWL2Settings(
            c,
            kappa,
            steps,
            lr,
            search_steps,
            bounds=bounds,
            targeted=targeted,
            precision=precision,
            engine=engine,
            train_mode=train_mode,
        )
        super().__init__(model, chosen, seed, check_inputs)

    def _radius(self, x: Tensor, eps: float | Tensor | None, bounds: Bounds) -> float:
        if eps is not None:
            raise TypeError("eps must not be given to CWL2, which has no ball")
        return math.inf

    def _perturb(self, batch: AttackBatch, seed: int) -> Tensor:
        if batch.given_start is not None:
            raise ValueError("start must be None for CWL2, which begins at the images")
        ones = torch.ones(batch.x.shape[0], dtype=batch.x.dtype, device=batch.x.device)
        largest = torch.finfo(ones.dtype).max / 16  # ten times as much is finite as well
        low, high, c = 0 * ones, torch.inf * ones, min(self.settings.c, largest) * ones
        best, best_distance = batch.x.clone(), torch.inf * ones
        for _ in range(self.settings.search_steps):
            adv, distance = self._minimise(batch, c)
            found = distance.isfinite()
            best = where_images(distance < best_distance, adv, best)
            best_distance = torch.minimum(distance, best_distance)
            high = torch.where(found, torch.minimum(high, c), high)
            low = torch.where(found, low, torch.maximum(low, c))
            c = torch.where(high.isfinite(), low / 2 + high / 2, (c * 10).clamp(max=largest))
        return best

    def _minimise(self, batch: AttackBatch, c: Tensor) -> tuple[Tensor, Tensor]:
        """Adam for one c per sample: the nearest images that succeeded, and their squared distances, else inf."""
        settings, x = self.settings, batch.x
        low, high = settings.bounds
        half = (high - low) / 2
        margin = Objective("cw", settings.targeted)

        def value_of(logits: Tensor) -> Tensor:
            return margin(logits, batch.y).clamp(max=settings.kappa)

        w = torch.atanh(((x - low) / half - 1).clamp(-1, 1) * _INSIDE)
        # Adam's moments are those of the gradient over this scale, whose squares would overflow for a large c.
        scale = c.clamp(min=1)
        distance_weight, margin_weight = (over_samples(n / scale, x) for n in (1, c))
        first, second = torch.zeros_like(w), torch.zeros_like(w)
        nearest, nearest_distance = x, torch.full_like(c, torch.inf)
        for step in range(1, settings.steps + 1):
            tanh = w.tanh()
            adv = (low + half * (tanh + 1)).clamp(low, high)
            delta = (adv - x) / (2 * half)
            distance = delta.flatten(1).square().sum(1)
            found = batch.gradient(adv, value_of)
            batch.count(found.grad)
            succeeded = batch.succeeded(found.logits) & (found.value >= settings.kappa)
            nearer = succeeded & (distance < nearest_distance)
            nearest = where_images(nearer, adv, nearest)
            nearest_distance = torch.where(nearer, distance, nearest_distance)
            # d/dw of the objective, through x' = low + half (tanh(w) + 1)
            grad = distance_weight * delta / half - margin_weight * found.grad
            grad = grad * half * (1 - tanh.square())
            first = torch.lerp(grad, first, _BETAS[0])
            second = torch.lerp(grad.square(), second, _BETAS[1])
            correction = math.sqrt(1 - _BETAS[1] ** step)
            rate = settings.lr * correction / (1 - _BETAS[0] ** step)
            w = w - rate * first / (second.sqrt() + correction * _ADAM_EPS * distance_weight)
        return nearest, nearest_distance
