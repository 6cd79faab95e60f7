"""PGD with a radius, a step size and a number of steps for each image, set before the call."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastadv.attacks.batch import CallOverrides
from fastadv.attacks.pgd import PGD, checked_overrides


class StrategicPGD(PGD):
    """PGD whose calls follow a strategy: a radius, a step size and a number of steps for each image.

    It serves code that calls an attack without these arguments; `fastadv.PGD` takes them with the call. Arguments
    as in `fastadv.PGD`; the radius, the step size and the steps hold where there is no strategy.

    Attributes:
        strategy: radii [B], step sizes [B], both in the units of the images, and numbers of steps [B], int64, for
            the images of the next calls; None for the attack's own.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        self.strategy: tuple[Tensor, Tensor, Tensor] | None = None
        super().__init__(*args, **options)

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
        if self.strategy is not None:
            eps, alpha, steps = self.strategy
            overrides = checked_overrides(alpha, steps, x)
        return super()._attack(x, y, seed, sample_ids, eps, start, overrides)
