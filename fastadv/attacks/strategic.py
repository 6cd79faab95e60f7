"""PGD with a radius, a step size and a number of steps for each image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastadv.attacks.batch import Batch
from fastadv.attacks.pgd import PGD, StepSize


class StrategicPGD(PGD):
    """PGD whose next call follows a strategy: a radius, a step size and a number of steps for each image.

    All images remain in the passes for as many steps as the longest strategy has; an image whose steps are taken
    stays where it is. Arguments as in `fastadv.PGD`; those of radius, step size and steps hold where there is no
    strategy.

    Attributes:
        strategy: radii [B], step sizes [B], both in the units of the images, and numbers of steps [B], int64, for
        the
            images of the next call; None for the attack's own.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        self.strategy: tuple[Tensor, Tensor, Tensor] | None = None
        super().__init__(*args, **options)

    def follow(self, radii: Tensor, sizes: Tensor, steps: Tensor) -> None:
        """Set the strategy. It waits for the device, to know the largest number of steps."""
        self.steps = int(steps.max())
        self.strategy = (radii, sizes, steps)

    def _radius(self, x: Tensor, eps: float | Tensor | None) -> float | Tensor:
        if eps is None and self.strategy is not None:
            eps = self.strategy[0]
        return super()._radius(x, eps)

    def _alpha(self, batch: Batch) -> float | Tensor:
        return super()._alpha(batch) if self.strategy is None else self.strategy[1]

    def _size_at(self, batch: Batch, alpha: float | Tensor) -> StepSize:
        if self.strategy is None:
            return super()._size_at(batch, alpha)
        _, sizes, left = self.strategy
        left = left.clone()

        def size(logits: Tensor) -> Tensor:
            now = torch.where(left > 0, sizes, 0.0)
            left.sub_(1)
            return now

        return size

    def _graph_obstacle(self) -> str | None:
        return "its strategy is another for each batch"
