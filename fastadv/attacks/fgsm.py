"""The fast gradient sign method (Goodfellow et al. 2015), and its form with a random start (Wong et al. 2020)."""

from __future__ import annotations

from typing import Any

from fastadv.attacks.arguments import check_limit
from fastadv.attacks.pgd import PGD
from fastadv.engine.engines import Model

FGSM_RS_STEP = 1.25  # of eps


class FGSM(PGD):
    """``clip(x + eps * sign(grad), bounds)``: PGD's first step, with alpha = eps and no random start.

    Args:
        model: as in `fastadv.pgd_fused`.
        eps: radius of the ball and size of the step, in the units of the images.
        seed: as in `fastadv.PGD`; used only where a setting draws random numbers.
        check_inputs: as in `fastadv.PGD`.
        settings: loss, norm, sparsity, bounds, targeted, precision, engine, train_mode as in `fastadv.pgd_fused`.

    Raises:
        TypeError: as in `fastadv.pgd_fused`.
        ValueError: as in `fastadv.pgd_fused`.
    """

    def __init__(
        self,
        model: Model,
        eps: float = 8 / 255,
        *,
        seed: int | None = None,
        check_inputs: bool = True,
        **settings: Any,
    ) -> None:
        super().__init__(
            model,
            eps,
            alpha=eps,
            steps=1,
            random_start=False,
            seed=seed,
            check_inputs=check_inputs,
            **settings,
        )


class FGSMRS(PGD):
    """FGSM from a random start: ``clip(clamp(x + u + alpha * sign(grad), x - eps, x + eps), bounds)``.

    u is uniform in the ball. Source: Wong, Rice and Kolter, "Fast is better than free", ICLR 2020, algorithm 3.

    Args:
        model: as in `fastadv.pgd_fused`.
        eps: radius of the ball, in the units of the images.
        alpha: size of the step; None for the paper's 1.25 * eps.
        seed: as in `fastadv.PGD`.
        check_inputs: as in `fastadv.PGD`.
        settings: loss, norm, sparsity, bounds, targeted, restarts, keep, precision, engine, train_mode as in
            `fastadv.pgd_fused`.

    Raises:
        TypeError: as in `fastadv.pgd_fused`.
        ValueError: as in `fastadv.pgd_fused`.
    """

    def __init__(
        self,
        model: Model,
        eps: float = 8 / 255,
        alpha: float | None = None,
        *,
        seed: int | None = None,
        check_inputs: bool = True,
        **settings: Any,
    ) -> None:
        check_limit("eps", eps)
        super().__init__(
            model,
            eps,
            alpha=FGSM_RS_STEP * eps if alpha is None else alpha,
            steps=1,
            random_start=True,
            seed=seed,
            check_inputs=check_inputs,
            **settings,
        )
