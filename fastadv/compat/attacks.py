"""The attacks under torchattacks' names, with torchattacks' arguments and defaults."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fastadv
from fastadv.attacks import uniform_radius_start
from fastadv.compat.attack import Attack, TargetFunction
from fastadv.ops.values import check_bool, check_choice, integer, norm_name
from fastadv.seeding import draw_seed


class PGD(Attack):
    """`fastadv.PGD` in linf."""

    def __init__(
        self,
        model: nn.Module,
        eps: float = 8 / 255,
        alpha: float = 2 / 255,
        steps: int = 10,
        random_start: bool = True,
    ) -> None:
        super().__init__(model, lambda m: fastadv.PGD(m, eps, alpha, steps, random_start))


class PGDL2(Attack):
    """`fastadv.PGD` in l2, from torchattacks' random start, whose distance from the image is uniform.

    A start that is uniform in the ball lies near its surface, and needs more steps to break as many images.
    """

    def __init__(
        self,
        model: nn.Module,
        eps: float = 1.0,
        alpha: float = 0.2,
        steps: int = 10,
        random_start: bool = True,
    ) -> None:
        super().__init__(
            model, lambda m: fastadv.PGD(m, eps, alpha, steps, random_start, norm="l2")
        )

    def _perturbed(self, x: Tensor, y: Tensor, eps: float | None) -> Tensor:
        own = self.own
        if not self.random_start:
            return own(x, y, eps=eps)
        radius = own.eps if eps is None else eps
        seed = draw_seed() if own.seed is None else own.seed
        start = uniform_radius_start(x, radius, own.bounds, seed=seed)
        return own(x, y, eps=eps, start=start)


class BIM(Attack):
    """`fastadv.PGD` in linf that starts at the images."""

    def __init__(
        self, model: nn.Module, eps: float = 8 / 255, alpha: float = 2 / 255, steps: int = 10
    ) -> None:
        super().__init__(model, lambda m: fastadv.PGD(m, eps, alpha, steps, random_start=False))


class FGSM(Attack):
    """`fastadv.FGSM`."""

    def __init__(self, model: nn.Module, eps: float = 8 / 255) -> None:
        super().__init__(model, lambda m: fastadv.FGSM(m, eps))


class FFGSM(Attack):
    """`fastadv.FGSMRS`: one step from a random start."""

    def __init__(self, model: nn.Module, eps: float = 8 / 255, alpha: float = 10 / 255) -> None:
        super().__init__(model, lambda m: fastadv.FGSMRS(m, eps, alpha))


class MIFGSM(Attack):
    """`fastadv.MIM`."""

    def __init__(
        self,
        model: nn.Module,
        eps: float = 8 / 255,
        alpha: float = 2 / 255,
        steps: int = 10,
        decay: float = 1.0,
    ) -> None:
        super().__init__(model, lambda m: fastadv.MIM(m, eps, alpha, steps, decay))


class EOTPGD(Attack):
    """`fastadv.PGD` in linf on the mean of several gradients, for models that draw random numbers."""

    def __init__(
        self,
        model: nn.Module,
        eps: float = 8 / 255,
        alpha: float = 2 / 255,
        steps: int = 10,
        eot_iter: int = 2,
        random_start: bool = True,
    ) -> None:
        super().__init__(model, lambda m: fastadv.PGD(m, eps, alpha, steps, random_start))
        self.eot_iter = eot_iter


class TPGD(Attack):
    """The attack of TRADES: `fastadv.PGD` on the KL divergence from the clean logits, from normal noise."""

    def __init__(
        self, model: nn.Module, eps: float = 8 / 255, alpha: float = 2 / 255, steps: int = 10
    ) -> None:
        super().__init__(model, lambda m: fastadv.PGD(m, eps, alpha, steps, loss="kl"))

    def _perturbed(self, x: Tensor, y: Tensor, eps: float | None) -> Tensor:
        generator = torch.Generator().manual_seed(
            draw_seed() if self.own.seed is None else self.own.seed
        )
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float32, device="cpu").to(x)
        return self.own(x, y, eps=eps, start=(x + 0.001 * noise).clamp(*self.own.bounds))

    def _set_mode(self, mode: str, function: TargetFunction | None) -> None:
        if function is not None:
            raise ValueError("TPGD has no targeted mode: it does not look at labels")


class CW(Attack):
    """`fastadv.CWL2` with one constant and no search for a better one."""

    def __init__(
        self,
        model: nn.Module,
        c: float = 1.0,
        kappa: float = 0.0,
        steps: int = 50,
        lr: float = 0.01,
    ) -> None:
        super().__init__(model, lambda m: fastadv.CWL2(m, c, kappa, steps, lr, search_steps=1))

    def _perturbed(self, x: Tensor, y: Tensor, eps: float | None) -> Tensor:
        if eps is not None:
            raise ValueError(f"epsilons must be None for CW, which has no ball, got {eps}")
        return self.own(x, y)


class APGD(Attack):
    """`fastadv.APGD`."""

    def __init__(
        self,
        model: nn.Module,
        norm: str = "Linf",
        eps: float = 8 / 255,
        steps: int = 10,
        n_restarts: int = 1,
        seed: int | None = 0,
        loss: str = "ce",
        eot_iter: int = 1,
        rho: float = 0.75,
        verbose: bool = False,
    ) -> None:
        check_bool("verbose", verbose)
        check_choice("loss", loss, ("ce", "dlr"))
        super().__init__(
            model,
            lambda m: fastadv.APGD(
                m,
                eps,
                steps,
                n_restarts,
                loss=loss,  # type: ignore[arg-type]
                rho=rho,
                norm=norm_name(norm),
                seed=seed,
            ),
        )
        self.eot_iter = eot_iter


class APGDT(Attack):
    """`fastadv.APGD` on the targeted DLR loss, towards each wrong class in turn."""

    def __init__(
        self,
        model: nn.Module,
        norm: str = "Linf",
        eps: float = 8 / 255,
        steps: int = 10,
        n_restarts: int = 1,
        seed: int | None = 0,
        eot_iter: int = 1,
        rho: float = 0.75,
        verbose: bool = False,
        n_classes: int = 10,
    ) -> None:
        check_bool("verbose", verbose)
        super().__init__(
            model,
            lambda m: fastadv.APGD(
                m,
                eps,
                steps,
                n_restarts,
                loss="dlr-t",
                target_classes=integer("n_classes", n_classes, at_least=2) - 1,
                rho=rho,
                norm=norm_name(norm),
                seed=seed,
            ),
        )
        self.eot_iter = eot_iter


class FAB(Attack):
    """`fastadv.FAB`."""

    def __init__(
        self,
        model: nn.Module,
        norm: str = "Linf",
        eps: float = 8 / 255,
        steps: int = 10,
        n_restarts: int = 1,
        alpha_max: float = 0.1,
        eta: float = 1.05,
        beta: float = 0.9,
        verbose: bool = False,
        seed: int | None = 0,
        multi_targeted: bool = False,
        n_classes: int = 10,
    ) -> None:
        check_bool("verbose", verbose)
        towards_all = check_bool("multi_targeted", multi_targeted)
        classes = integer("n_classes", n_classes, at_least=2) - 1 if towards_all else None
        super().__init__(
            model,
            lambda m: fastadv.FAB(
                m,
                eps,
                steps,
                classes,
                restarts=n_restarts,
                alpha_max=alpha_max,
                eta=eta,
                beta=beta,
                norm=norm_name(norm),
                seed=seed,
            ),
        )

    def _set_mode(self, mode: str, function: TargetFunction | None) -> None:
        if function is not None:
            raise ValueError(
                "FAB has no targeted mode; multi_targeted=True goes towards every class"
            )


class Square(Attack):
    """`fastadv.Square`."""

    def __init__(
        self,
        model: nn.Module,
        norm: str = "Linf",
        eps: float = 8 / 255,
        n_queries: int = 5000,
        n_restarts: int = 1,
        p_init: float = 0.8,
        loss: str = "margin",
        resc_schedule: bool = True,
        seed: int | None = 0,
        verbose: bool = False,
    ) -> None:
        check_bool("verbose", verbose)
        check_choice("loss", loss, ("margin", "ce"))
        super().__init__(
            model,
            lambda m: fastadv.Square(
                m,
                eps,
                n_queries,
                p_init=p_init,
                restarts=n_restarts,
                loss="cw" if loss == "margin" else "ce",
                rescale_schedule=resc_schedule,
                norm=norm_name(norm),
                seed=seed,
            ),
        )
