"""The fast gradient sign method (Goodfellow et al. 2015): one step of the size of the ball."""

from __future__ import annotations

from typing import Any

from fastadv.attacks.pgd import PGD, Model


class FGSM(PGD):
    """``clip(x + eps * sign(grad), bounds)``: PGD's first step, with alpha = eps and no random start.

    Args:
        model: as in `fastadv.pgd_fused`.
        eps: radius of the ball and size of the step, in the units of the images.
        seed: as in `fastadv.PGD`; used only where a setting draws random numbers.
        check_inputs: as in `fastadv.PGD`.
        settings: loss, norm, bounds, targeted, precision, engine, train_mode as in `fastadv.pgd_fused`.

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
