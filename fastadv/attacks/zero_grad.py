"""PGD that ignores the smallest elements of each gradient (Golgooni et al. 2021)."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from fastadv.attacks.batch import AttackBatch
from fastadv.attacks.pgd import PGD, Direction
from fastadv.losses.common import at_least_float32
from fastadv.ops.checks import over_samples


class ZeroGradPGD(PGD):
    """PGD whose steps do not move the elements of an image whose gradients are among the image's smallest.

    Arguments as in `fastadv.PGD`.

    Attributes:
        quantile: quantile of the gradient's magnitudes in each image; elements below it do not move.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        self.quantile = 0.35
        super().__init__(*args, **options)

    def _direction(self, batch: AttackBatch) -> Direction:
        def direction(grad: Tensor) -> Tensor:
            batch.count(grad)
            sizes = at_least_float32(grad).abs()
            limits = torch.quantile(sizes.flatten(1), self.quantile, dim=1)
            return torch.where(sizes < over_samples(limits, grad), 0.0, grad)

        return direction

    def _graph_key(self) -> tuple[Hashable, ...]:
        return (*super()._graph_key(), self.quantile)
