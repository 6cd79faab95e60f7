"""The momentum iterative method (Dong et al. 2018)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastadv.attacks.arguments import EngineName, Precision, TrainMode
from fastadv.attacks.attack import Attack
from fastadv.attacks.batch import AttackBatch
from fastadv.attacks.objectives import LossFunction
from fastadv.attacks.options import Setting
from fastadv.attacks.pgd import PGD, Direction
from fastadv.attacks.pgd_settings import Keep, PGDSettings
from fastadv.engine.engines import Model
from fastadv.ops import momentum_update_
from fastadv.ops.values import limit


@dataclass(frozen=True)
class MIMSettings(PGDSettings):
    """The settings of `MIM`, checked on creation. It has the same fields."""

    random_start: bool = False
    decay: float = 1.0

    def __post_init__(self) -> None:
        """Check every field."""
        super().__post_init__()
        limit("decay", self.decay)


class MIM(PGD):
    """MIM, also called MI-FGSM: PGD along the momentum of gradients of unit l1 norm.

    ``m <- decay * m + grad / ||grad||_1``, then PGD's step with m in place of the gradient. Source: Dong et al.,
    "Boosting adversarial attacks with momentum", CVPR 2018, algorithm 1; it starts from the images.

    Args:
        model: as in `fastadv.PGD`.
        eps: radius of the ball, in the units of the images.
        alpha: size of a step; the paper has eps / steps.
        steps: number of steps, at least 1.
        decay: factor of the momentum after each step, >= 0; the paper's mu.
        random_start: as in `fastadv.PGD`, but by default false.
        norm: as in `fastadv.PGD`.
        bounds: as in `fastadv.PGD`.
        restarts: as in `fastadv.PGD`.
        targeted: as in `fastadv.PGD`.
        loss: as in `fastadv.PGD`.
        precision: as in `fastadv.PGD`.
        engine: as in `fastadv.PGD`.
        train_mode: as in `fastadv.PGD`.
        keep: as in `fastadv.PGD`.
        sparsity: as in `fastadv.PGD`.
        seed: as in `fastadv.PGD`; used only with ``random_start=True``.
        check_inputs: as in `fastadv.PGD`.

    Raises:
        TypeError: as in `fastadv.PGD`.
        ValueError: as in `fastadv.PGD`.
    """

    settings: MIMSettings
    decay = Setting[float]()

    def __init__(
        self,
        model: Model,
        eps: float = 8 / 255,
        alpha: float = 2 / 255,
        steps: int = 10,
        decay: float = 1.0,
        *,
        random_start: bool = False,
        norm: str = "linf",
        bounds: tuple[float, float] = (0.0, 1.0),
        restarts: int = 1,
        targeted: bool = False,
        loss: str | LossFunction = "ce",
        precision: Precision = "auto",
        engine: EngineName = "auto",
        train_mode: TrainMode = False,
        keep: Keep = "last",
        sparsity: float = 0.95,
        seed: int | None = None,
        check_inputs: bool = True,
    ) -> None:
        chosen = MIMSettings(
            eps,
            alpha,
            steps,
            random_start,
            decay=decay,
            norm=norm,
            bounds=bounds,
            restarts=restarts,
            targeted=targeted,
            loss=loss,
            precision=precision,
            engine=engine,
            train_mode=train_mode,
            keep=keep,
            sparsity=sparsity,
        )
        Attack.__init__(self, model, chosen, seed, check_inputs)

    def _direction(self, batch: AttackBatch) -> Direction:
        momentum = torch.zeros_like(batch.x)

        def direction(grad: Tensor) -> Tensor:
            batch.count(grad)
            return momentum_update_(momentum, grad, self.decay)

        return direction
