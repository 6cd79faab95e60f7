"""PGD that ignores the smallest elements of each gradient (Golgooni et al. 2021)."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from fastadv.attacks.batch import AttackBatch
from fastadv.attacks.pgd import PGD, Direction
from fastadv.losses.common import at_least_float32


class ZeroGradPGD(PGD):
    """PGD whose steps leave alone the elements of an image whose gradient is among the smallest of that image.

    Arguments as in `fastadv.PGD`.

    Attributes:
        quantile: of the gradient's magnitudes in each image; elements below it do not move.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        self.quantile = 0.35
        super().__init__(*args, **options)

    def _direction(self, batch: AttackBatch) -> Direction:
        def direction(grad: Tensor) -> Tensor:
            batch.count(grad)
            sizes = at_least_float32(grad).abs()
            limits = torch.quantile(sizes.flatten(1), self.quantile, dim=1)
            return torch.where(sizes < limits.view(-1, *[1] * (grad.dim() - 1)), 0.0, grad)

        return direction

    def _graph_key(self) -> tuple[Hashable, ...]:
        return (*super()._graph_key(), self.quantile)
