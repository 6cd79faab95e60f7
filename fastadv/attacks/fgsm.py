"""The fast gradient sign method (Goodfellow et al. 2015), and its form with a random start (Wong et al. 2020)."""

from __future__ import annotations

from dataclasses import dataclass, field

from fastadv.attacks.arguments import EngineName, Precision, TrainMode
from fastadv.attacks.attack import Attack
from fastadv.attacks.objectives import LossFunction
from fastadv.attacks.options import Setting
from fastadv.attacks.pgd import PGD
from fastadv.attacks.pgd_settings import Keep, PGDSettings
from fastadv.engine.engines import Model

FGSM_RS_STEP = 1.25  # of eps


@dataclass(frozen=True)
class FGSMSettings(PGDSettings):
    """The settings of `FGSM`, checked on creation. It has the same fields; the other settings are fixed."""

    alpha: float = field(default=0.0, init=False)
    steps: int = field(default=1, init=False)
    random_start: bool = field(default=False, init=False)
    restarts: int = field(default=1, init=False)
    keep: Keep = field(default="last", init=False)

    def __post_init__(self) -> None:
        """Check every field, and step as far as the ball reaches."""
        super().__post_init__()
        object.__setattr__(self, "alpha", self.eps)

    @property
    def step_size(self) -> float:
        """As far as the ball reaches."""
        return self.eps


class FGSM(PGD):
    """``clip(x + eps * sign(grad), bounds)``: PGD's first step, with alpha = eps and no random start.

    Source: Goodfellow et al., "Explaining and harnessing adversarial examples", ICLR 2015.

    Args:
        model: as in `fastadv.PGD`.
        eps: radius of the ball and size of the step, in the units of the images.
        norm: as in `fastadv.PGD`.
        bounds: as in `fastadv.PGD`.
        targeted: as in `fastadv.PGD`.
        loss: as in `fastadv.PGD`, but for ``"kl"``, which needs a random start.
        precision: as in `fastadv.PGD`.
        engine: as in `fastadv.PGD`.
        train_mode: as in `fastadv.PGD`.
        sparsity: as in `fastadv.PGD`.
        seed: as in `fastadv.PGD`; for models that draw random numbers.
        check_inputs: as in `fastadv.PGD`.

    Raises:
        TypeError: as in `fastadv.PGD`.
        ValueError: as in `fastadv.PGD`.
    """

    settings: FGSMSettings

    def __init__(
        self,
        model: Model,
        eps: float = 8 / 255,
        *,
        norm: str = "linf",
        bounds: tuple[float, float] = (0.0, 1.0),
        targeted: bool = False,
        loss: str | LossFunction = "ce",
        precision: Precision = "auto",
        engine: EngineName = "auto",
        train_mode: TrainMode = False,
        sparsity: float = 0.95,
        seed: int | None = None,
        check_inputs: bool = True,
    ) -> None:
        chosen = FGSMSettings(
            eps,
            norm=norm,
            bounds=bounds,
            targeted=targeted,
            loss=loss,
            precision=precision,
            engine=engine,
            train_mode=train_mode,
            sparsity=sparsity,
        )
        Attack.__init__(self, model, chosen, seed, check_inputs)


@dataclass(frozen=True)
class FGSMRSSettings(PGDSettings):
    """The settings of `FGSMRS`, checked on creation. It has the same fields; the other settings are fixed."""

    alpha: float | None = None  # type: ignore[assignment]  # else a number, as everywhere
    steps: int = field(default=1, init=False)
    random_start: bool = field(default=True, init=False)

    @property
    def step_size(self) -> float:
        """Alpha, or the paper's 1.25 eps."""
        return FGSM_RS_STEP * self.eps if self.alpha is None else self.alpha


class FGSMRS(PGD):
    """FGSM from a random start: ``clip(clamp(x + u + alpha * sign(grad), x - eps, x + eps), bounds)``.

    u is uniform in the ball. Source: Wong, Rice and Kolter, "Fast is better than free", ICLR 2020, algorithm 3.

    Args:
        model: as in `fastadv.PGD`.
        eps: radius of the ball, in the units of the images.
        alpha: size of the step; None for the paper's 1.25 * eps.
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
        seed: as in `fastadv.PGD`.
        check_inputs: as in `fastadv.PGD`.

    Raises:
        TypeError: as in `fastadv.PGD`.
        ValueError: as in `fastadv.PGD`.
    """

    settings: FGSMRSSettings
    alpha = Setting[float | None]()  # type: ignore[assignment]

    def __init__(
        self,
        model: Model,
        eps: float = 8 / 255,
        alpha: float | None = None,
        *,
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
        chosen = FGSMRSSettings(
            eps,
            alpha,
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
