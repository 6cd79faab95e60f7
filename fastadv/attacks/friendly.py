"""PGD that leaves an image soon after it is misclassified (Zhang et al. 2020)."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from fastadv.attacks.arguments import check_integer
from fastadv.attacks.batch import Batch
from fastadv.attacks.pgd import PGD, StepSize
from fastadv.engine.engines import Model


class FriendlyPGD(PGD):
    """Early-stopped PGD: an image stays where it is once tau steps were taken at misclassified points of it.

    At each of the K points the logits of the gradient's pass tell whether the image is misclassified: if so, and
    tau such points went before, it stops for good. Source: Zhang et al., "Attacks which do not kill training make
    adversarial learning stronger", ICML 2020, algorithm 1. Images that have stopped remain in the passes, so that
    nothing waits for the device, and in what `last` counts.

    Args:
        model: as in `fastadv.pgd_fused`.
        eps: radius of the ball, in the units of the images.
        alpha: size of a step.
        steps: largest number of steps, at least 1.
        random_start: as in `fastadv.pgd_fused`.
        tau: steps at misclassified points, at least 0; may be changed between calls as an attribute.
        seed: as in `fastadv.PGD`.
        check_inputs: as in `fastadv.PGD`.
        settings: loss, norm, sparsity, bounds, targeted, restarts, keep, precision, engine, train_mode as in
            `fastadv.pgd_fused`; with ``targeted`` an image stops once it is at its target.

    Raises:
        TypeError: as in `fastadv.pgd_fused`.
        ValueError: as in `fastadv.pgd_fused`, or tau is negative.
    """

    def __init__(
        self,
        model: Model,
        eps: float = 8 / 255,
        alpha: float = 2 / 255,
        steps: int = 10,
        random_start: bool = True,
        *,
        tau: int = 0,
        seed: int | None = None,
        check_inputs: bool = True,
        **settings: Any,
    ) -> None:
        check_integer("tau", tau)
        if tau < 0:
            raise ValueError(f"tau must be >= 0, got {tau}")
        self.tau = tau
        super().__init__(
            model,
            eps,
            alpha,
            steps,
            random_start,
            seed=seed,
            check_inputs=check_inputs,
            **settings,
        )

    def _graph_key(self) -> tuple[Hashable, ...]:
        return (*super()._graph_key(), self.tau)

    def _size_at(self, batch: Batch, alpha: float | Tensor) -> StepSize:
        sizes = alpha if isinstance(alpha, Tensor) else batch.x.new_full(batch.y.shape, alpha)
        left = torch.full_like(batch.y, self.tau)

        def size(logits: Tensor) -> Tensor:
            left.sub_(batch.succeeded(logits).long())
            # Of size 0, not none at all, so that a start outside the ball is brought into it.
            return torch.where(left < 0, 0.0, sizes)

        return size
