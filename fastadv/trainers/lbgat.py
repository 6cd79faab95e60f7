"""LBGAT: a robust model guided by the logits of a natural one, which learns beside it or is fixed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import InitVar, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastadv import losses
from fastadv.losses.common import at_least_float32
from fastadv.trainers.method import Attacked, LossResult, TrainBatch, accuracy
from fastadv.trainers.natural import NaturalMethod, NaturalRecipe
from fastadv.trainers.number import Number
from fastadv.trainers.recipe import Presets, Recipe, check_field, follows_start, shared_numbers
from fastadv.trainers.schedules import Piecewise, Schedule
from fastadv.trainers.trades import TradesRecipe

# The script counts epochs from 1: .02 in the first one, a tenth of .1 from the 76th, a hundredth from the 91st.
_SLOW_FIRST_EPOCH = Piecewise((0, 1, 75, 90), (0.2, 1.0, 0.1, 0.01))


@follows_start
@dataclass(frozen=True, kw_only=True)
class LbgatRecipe(NaturalRecipe):
    """Numbers of the authors' code, whose attack is that of TRADES.

    The preset "official" also has its natural model, a ResNet-18 whose second stage has stride 1. BGAT, for which
    there is no code, has the numbers of TRADES' own recipe, whichever of them are not given.

    Attributes:
        beta: weight of the divergence between clean and adversarial logits; 0 or 6 in the paper.
        fixed: guide by a frozen standard model (BGAT) instead of one that learns beside.
    """

    epochs: int = 100
    weight_decay: Number = 2e-4
    schedule: Schedule = _SLOW_FIRST_EPOCH
    beta: Number = 0.0
    fixed: bool = False
    replaces: InitVar[object] = None  # see `follows_start`

    presets: ClassVar[Presets] = {"paper": {}, "official": {"natural": "resnet18_layer2_stride1"}}
    deciding: ClassVar[tuple[str, ...]] = ("fixed",)

    def __post_init__(self, replaces: object) -> None:
        super().__post_init__()
        check_field(self, "beta", at_least=0)
        if self.fixed and self.natural is not None:
            raise ValueError(
                f"natural must be None with fixed, where the teacher takes its place, got {self.natural!r}"
            )

    @classmethod
    def start(cls, preset: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the numbers of the preset, or with a fixed guide those of TRADES."""
        if given.get("fixed") is True:
            return shared_numbers(TradesRecipe.preset(preset), cls, without=("beta",))
        return super().start(preset, given)


class Lbgat(NaturalMethod[LbgatRecipe]):
    """LBGAT: mean squared difference of f(x') and T(x), CE(T(x)), and beta KL(f(x) || f(x')).

    Source: Cui et al. 2021; recipe as in the authors' code (dvlab-research/LBGAT). The natural model T learns from
    both terms, with an optimiser of its own whose numbers are the same; with `fixed` it is a teacher, and the
    first and last terms remain. The attack raises TRADES' divergence, also where beta is 0. The passes are
    in that code's order: f(x'), then f(x). Where beta is 0 the latter serves BatchNorm's running statistics alone.

    Cost per batch: 2KF and 1F for the attack, 3F for f(x'), 3F for T (1F where it is fixed), 3F for f(x) (1F where
    beta is 0). Running statistics move twice, first by the adversarial images; T's once.
    """

    name = "lbgat"
    heeds = frozenset({"extra_weight"})
    recipe_class = LbgatRecipe
    attack_loss = "kl"
    bn_updates = 2

    @classmethod
    def teachers_needed(cls, recipe: Recipe) -> tuple[str, ...]:
        """Return the standard model where it is fixed."""
        assert isinstance(recipe, LbgatRecipe)
        return ("teacher",) if recipe.fixed else ()

    @property
    def natural_learns(self) -> bool:
        """Whether the natural model is trained."""
        return not self.recipe.fixed

    def setup(self) -> None:
        """Build the natural model and the attack, and count the images with a backward pass."""
        self.images_trained = 2 if self.recipe.beta else 1
        super().setup()

    def objective(self, clean_logits: Tensor, adv_logits: Tensor, y: Tensor) -> Tensor:
        """Return the guidance of f(x') by T(x), whose logits stand in the place of the clean ones."""
        if self.recipe.fixed:
            apart = at_least_float32(adv_logits) - at_least_float32(clean_logits)
            return apart.square().mean(1)
        return losses.lbgat(adv_logits, clean_logits, y, reduction="none")

    def training_loss(self, batch: TrainBatch, adv: Attacked) -> LossResult:
        """Return the guidance and the divergence."""
        beta = self.recipe.beta
        adv_logits = self.model(adv.x)
        with torch.set_grad_enabled(beta != 0):
            clean_logits = self.model(batch.x)
        with torch.set_grad_enabled(not self.recipe.fixed):
            natural_logits = self.natural(batch.x)
        loss = self.objective(natural_logits, adv_logits, batch.y)
        if beta:
            loss = loss + beta * losses.kl(clean_logits, adv_logits, reduction="none")
        metrics = {
            "train_adv_accuracy": accuracy(adv_logits, batch.y),
            "train_natural_accuracy": accuracy(natural_logits, batch.y),
        }
        return LossResult(batch.mean(loss), metrics)

    def passes(self, epoch: int) -> float:
        """Return the robust model's cost and that of T; AWP repeats all forward passes."""
        natural = 1 if self.recipe.fixed else 3
        clean = 0 if self.recipe.beta else 1 + self.perturbs_weights(epoch)
        return super().passes(epoch) + natural + self.perturbs_weights(epoch) + clean
