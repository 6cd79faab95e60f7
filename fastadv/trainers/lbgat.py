"""LBGAT and BGAT: the logits of a natural model guide a robust model; the natural model is trained, or fixed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import InitVar, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastadv import losses
from fastadv.losses.common import at_least_float32
from fastadv.trainers.bases import (
    BASES,
    BaseMethod,
    BaseName,
    BaseOptionsRecipe,
    base_losses,
    build_base,
    numbers_of_base,
)
from fastadv.trainers.method import Attacked, LossResult, TrainBatch, accuracy
from fastadv.trainers.natural import NaturalMethod, NaturalRecipe
from fastadv.trainers.number import Number
from fastadv.trainers.recipe import Presets, Recipe, refuses_replaced_deciders, shared_numbers
from fastadv.trainers.schedules import Piecewise, Schedule
from fastadv.trainers.trades import TradesRecipe

# The script counts epochs from 1: .02 in the first one, a tenth of .1 from the 76th, a hundredth from the 91st.
_SLOW_FIRST_EPOCH = Piecewise((0, 1, 75, 90), (0.2, 1.0, 0.1, 0.01))


@refuses_replaced_deciders
@dataclass(frozen=True, kw_only=True)
class LbgatRecipe(NaturalRecipe, BaseOptionsRecipe):
    """Numbers of the authors' code, which has the attack of TRADES; with a base the numbers of the base.

    The preset "official" also has that code's natural model, a ResNet-18 whose second stage has stride 1. With
    "paper" the natural model has the architecture of the robust model, which fits images of every size, unless
    `natural` names another. BGAT has no published code. It has the numbers of TRADES' own recipe.

    Attributes:
        base: the guided method: "pgd_at", "trades", "mart", "alp" or "hat". Its whole loss is added. Without a
            base only beta times the divergence is added, as in the paper.
        beta: weight of the divergence between clean and adversarial logits; 0 or 6 in the paper. With a base the
            default is the base's beta.
        fixed: guide by a frozen standard model (BGAT) instead of a natural model that is trained.
    """

    epochs: int = 100
    weight_decay: Number = 2e-4
    schedule: Schedule = _SLOW_FIRST_EPOCH
    base: BaseName | None = None
    beta: Number = 0.0
    fixed: bool = False
    replaces: InitVar[object] = None  # see `refuses_replaced_deciders`

    presets: ClassVar[Presets] = {"paper": {}, "official": {"natural": "resnet18_layer2_stride1"}}
    deciding: ClassVar[tuple[str, ...]] = ("fixed", "base")

    def __post_init__(self, replaces: object) -> None:
        super().__post_init__()
        if self.fixed and self.natural is not None:
            raise ValueError(
                f"natural must be None with fixed, where the teacher takes its place, got {self.natural!r}"
            )

    @classmethod
    def preset_defaults(cls, preset: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the numbers of the preset, of the base, or of TRADES for a fixed guide without a base."""
        base, fixed = given.get("base"), given.get("fixed") is True
        if base in BASES:
            own = {} if fixed else super().preset_defaults(preset, given)
            return {**numbers_of_base(str(base), preset, cls), **own}
        if fixed:
            return shared_numbers(TradesRecipe.preset(preset), cls, without=("beta",))
        return super().preset_defaults(preset, given)


class Lbgat(NaturalMethod[LbgatRecipe]):
    """LBGAT: mean squared difference of f(x') and T(x), CE(T(x)), and beta KL(f(x) || f(x')).

    With a `base` the last term is the whole loss of the base, with its numbers, its attack and its order of
    passes: (f(x') - T(x))^2 + CE(T(x)) + L_base. BGAT has no second term.

    Source: Cui et al. 2021; recipe as in the authors' code (dvlab-research/LBGAT). The natural model T learns from
    both terms. It has an optimiser of its own with the same numbers. With `fixed` it is a teacher, and the first
    and last terms remain. The attack maximises TRADES' divergence, even if beta is 0. The order of passes is as in
    that code: f(x'), then f(x). If beta is 0, f(x) serves only BatchNorm's running statistics.

    Cost per batch: 2KF and 1F for the attack, 3F for f(x'), 3F for T (1F where it is fixed), 3F for f(x) (1F where
    beta is 0). Running statistics move twice, first by the adversarial images; T's once.
    """

    name = "lbgat"
    supports = frozenset({"extra_weight"})
    recipe_class = LbgatRecipe
    attack_loss = "kl"
    bn_updates = 2

    @classmethod
    def teachers_needed(cls, recipe: Recipe) -> tuple[str, ...]:
        """Return the name of the standard model if it guides, or if it labels HAT's helper examples."""
        assert isinstance(recipe, LbgatRecipe)
        return ("teacher",) if recipe.fixed or recipe.base == "hat" else ()

    @property
    def natural_learns(self) -> bool:
        """Whether the natural model is trained."""
        return not self.recipe.fixed

    def setup(self) -> None:
        """Build the natural model and the attack, and count the images that have a backward pass."""
        self.images_trained = 2 if self.recipe.beta else 1
        super().setup()
        self.base: BaseMethod | None = None
        if self.recipe.base is not None:
            base = build_base(
                self.recipe.base, self.recipe, self.model, self.runtime, self.teachers
            )
            self.base, self.pgd = base, base.pgd
            self.bn_updates, self.images_trained = base.bn_updates, base.images_trained

    def attack(self, batch: TrainBatch) -> Attacked:
        """Return the images of TRADES' attack, or the result of the base's attack."""
        return super().attack(batch) if self.base is None else self.base.attack(batch)

    def gauges(self) -> dict[str, Tensor]:
        """Return the fraction of exact zeros in the gradients of the attack."""
        return super().gauges() if self.base is None else self.base.gauges()

    def objective(self, clean_logits: Tensor, adv_logits: Tensor, y: Tensor) -> Tensor:
        """Return the guidance of f(x') by T(x); ``clean_logits`` are T(x)."""
        if self.recipe.fixed:
            apart = at_least_float32(adv_logits) - at_least_float32(clean_logits)
            return apart.square().mean(1)
        return losses.lbgat(adv_logits, clean_logits, y, reduction="none")

    def training_loss(self, batch: TrainBatch, adv: Attacked) -> LossResult:
        """Return the guidance, and the divergence or the base's loss."""
        if self.base is None:
            adv_logits, own = self._divergence(batch, adv)
        else:
            adv_logits, own = base_losses(self.base, batch, adv)
        fixed, x = self.recipe.fixed, batch.x
        natural_logits = self.teacher_output("teacher", x) if fixed else self.natural(x)
        loss = self.objective(natural_logits, adv_logits, batch.y)
        if own is not None:
            loss = loss + own
        metrics = {
            "train_adv_accuracy": accuracy(adv_logits, batch.y),
            "train_natural_accuracy": accuracy(natural_logits, batch.y),
        }
        return LossResult(batch.mean(loss), metrics)

    def _divergence(self, batch: TrainBatch, adv: Attacked) -> tuple[Tensor, Tensor | None]:
        """Return f(x'), and beta times the divergence of each image, or None if beta is 0."""
        beta = self.recipe.beta
        adv_logits = self.model(adv.x)
        with torch.set_grad_enabled(beta != 0):
            clean_logits = self.model(batch.x)
        if not beta:
            return adv_logits, None
        return adv_logits, beta * losses.kl(clean_logits, adv_logits, reduction="none")

    def passes(self, epoch: int) -> float:
        """Return the cost of the robust model and of T; AWP repeats all forward passes."""
        natural = (1 if self.recipe.fixed else 3) + self.perturbs_weights(epoch)
        if self.base is not None:
            return self.base.passes(epoch) + natural
        clean = 0 if self.recipe.beta else 1 + self.perturbs_weights(epoch)
        return super().passes(epoch) + natural + clean
