"""PGD in which the attack on an image stops at a limit of difficulty (Sitawarin et al. 2021)."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from fastadv.attacks.batch import AttackBatch
from fastadv.attacks.pgd import PGD, StepSize
from fastadv.losses.common import at_least_float32
from fastadv.ops.checks import over_samples


class CurriculumPGD(PGD):
    """PGD in which an image no longer moves as soon as it is difficult enough.

    The difficulty is the gap of probabilities, the largest p_j of the other classes minus p_y. It is -1 if the
    model is certain and right, and above 0 if it is wrong. Images that no longer move remain in the passes, so
    that nothing waits for the device. Arguments as in `fastadv.PGD`.

    Attributes:
        gap: the largest gap at which an image still moves; 1 is plain PGD.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        self.gap = 1.0
        super().__init__(*args, **options)

    def _size_at(self, batch: AttackBatch, alpha: float | Tensor) -> StepSize:
        sizes = alpha if isinstance(alpha, Tensor) else batch.x.new_full(batch.y.shape, alpha)
        gap, own = self.gap, batch.y.long()[:, None]

        def size(logits: Tensor) -> Tensor:
            p = at_least_float32(logits).softmax(1)
            hardest = p.scatter(1, own, -1.0).amax(1)
            # Of size 0, and not left out, so that a start outside the ball is brought into it.
            moves = hardest - p.gather(1, own)[:, 0] <= gap
            return torch.where(over_samples(moves, sizes), sizes, 0.0)

        return size

    def _labels_obstacle(self) -> str | None:
        return "for CurriculumPGD, which asks how likely they are"

    def _graph_key(self) -> tuple[Hashable, ...]:
        return (*super()._graph_key(), self.gap)
