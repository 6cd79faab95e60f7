"""The momentum iterative method (Dong et al. 2018)."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from fastadv.attacks.arguments import check_limit
from fastadv.attacks.batch import Batch
from fastadv.attacks.pgd import PGD, Direction
from fastadv.engine.engines import Model
from fastadv.ops import momentum_update_


class MIM(PGD):
    """MIM, also called MI-FGSM: PGD along the momentum of gradients of unit l1 norm.

    ``m <- decay * m + grad / ||grad||_1``, then PGD's step with m in place of the gradient. Source: Dong et al.,
    "Boosting adversarial attacks with momentum", CVPR 2018, algorithm 1; it starts from the images.

    Args:
        model: as in `fastadv.pgd_fused`.
        eps: radius of the ball, in the units of the images.
        alpha: size of a step; the paper has eps / steps.
        steps: number of steps, at least 1.
        decay: how much of the momentum is left after a step, >= 0; the paper's mu.
        seed: as in `fastadv.PGD`; used only with ``random_start=True``.
        check_inputs: as in `fastadv.PGD`.
        settings: loss, norm, sparsity, bounds, targeted, random_start (default false), restarts, keep, precision,
            engine, train_mode as in `fastadv.pgd_fused`.

    Raises:
        TypeError: as in `fastadv.pgd_fused`.
        ValueError: as in `fastadv.pgd_fused`.
    """

    def __init__(
        self,
        model: Model,
        eps: float = 8 / 255,
        alpha: float = 2 / 255,
        steps: int = 10,
        decay: float = 1.0,
        *,
        seed: int | None = None,
        check_inputs: bool = True,
        **settings: Any,
    ) -> None:
        check_limit("decay", decay)
        self.decay = float(decay)
        settings.setdefault("random_start", False)
        super().__init__(model, eps, alpha, steps, seed=seed, check_inputs=check_inputs, **settings)

    def _graph_key(self) -> tuple[Hashable, ...]:
        return (*super()._graph_key(), self.decay)

    def _direction(self, batch: Batch) -> Direction:
        momentum = torch.zeros_like(batch.x)

        def direction(grad: Tensor) -> Tensor:
            batch.count(grad)
            return momentum_update_(momentum, grad, self.decay)

        return direction
