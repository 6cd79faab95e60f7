"""PGD in which the attack on an image stops soon after it is misclassified (Zhang et al. 2020)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastadv.attacks.arguments import EngineName, Precision, TrainMode
from fastadv.attacks.attack import Attack
from fastadv.attacks.batch import AttackBatch
from fastadv.attacks.objectives import LossFunction
from fastadv.attacks.options import Setting
from fastadv.attacks.pgd import PGD, StepSize
from fastadv.attacks.pgd_settings import Keep, PGDSettings
from fastadv.attacks.soft_labels import hard
from fastadv.engine.engines import Model
from fastadv.ops.checks import over_samples
from fastadv.ops.values import integer


@dataclass(frozen=True)
class FriendlyPGDSettings(PGDSettings):
    """The settings of `FriendlyPGD`, checked on creation. It has the same fields."""

    tau: int = 0

    def __post_init__(self) -> None:
        """Check every field."""
        super().__post_init__()
        integer("tau", self.tau, at_least=0)


class FriendlyPGD(PGD):
    """Early-stopped PGD: an image no longer moves once tau steps were made at misclassified points.

    At each of the K points the logits of the gradient's pass show whether the image is misclassified. If it is,
    and tau earlier points were misclassified, the image stops. Source: Zhang et al., "Attacks which do not kill
    training make adversarial learning stronger", ICML 2020, algorithm 1. Images that have stopped remain in the
    passes, so that nothing waits for the device, and in the counts of `last`.

    Args:
        model: as in `fastadv.PGD`.
        eps: radius of the ball, in the units of the images.
        alpha: size of a step.
        steps: largest number of steps, at least 1.
        random_start: as in `fastadv.PGD`.
        tau: number of steps at misclassified points, at least 0.
        norm: as in `fastadv.PGD`.
        bounds: as in `fastadv.PGD`.
        restarts: as in `fastadv.PGD`.
        targeted: as in `fastadv.PGD`; an image then stops once it is at its target.
        loss: as in `fastadv.PGD`.
        precision: as in `fastadv.PGD`.
        engine: as in `fastadv.PGD`.
        train_mode: as in `fastadv.PGD`.
        keep: as in `fastadv.PGD`.
        sparsity: as in `fastadv.PGD`.
        seed: as in `fastadv.PGD`.
        check_inputs: as in `fastadv.PGD`.

    Raises:
        TypeError: as in `fastadv.PGD`.
        ValueError: as in `fastadv.PGD`, or tau is negative.
    """

    settings: FriendlyPGDSettings
    tau = Setting[int]()

    def __init__(
        self,
        model: Model,
        eps: float = 8 / 255,
        alpha: float = 2 / 255,
        steps: int = 10,
        random_start: bool = True,
        *,
        tau: int = 0,
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
        chosen = FriendlyPGDSettings(
            eps,
            alpha,
            steps,
            random_start,
            tau=tau,
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

    def _labels_obstacle(self) -> str | None:
        return "for FriendlyPGD, which stops where an image is misclassified"

    def _size_at(self, batch: AttackBatch, alpha: float | Tensor) -> StepSize:
        sizes = alpha if isinstance(alpha, Tensor) else batch.x.new_full(batch.x.shape[:1], alpha)
        left = torch.full_like(hard(batch.y), self.tau)
        # With keep "best" the run itself counts the points whose logits are NaN.
        succeeded = batch.is_success if self.settings.keep == "best" else batch.succeeded

        def size(logits: Tensor) -> Tensor:
            left.sub_(succeeded(logits).long())
            # The step has size 0 and is not left out, so that a start outside the ball is brought into it.
            return torch.where(over_samples(left < 0, sizes), 0.0, sizes)

        return size
