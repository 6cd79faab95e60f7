"""LBGAT: a robust model guided by the logits of a natural one, which learns beside it or is fixed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastadv import losses
from fastadv.losses.common import at_least_float32
from fastadv.trainers.method import Attacked, LossResult, TrainBatch, accuracy
from fastadv.trainers.natural import NaturalMethod
from fastadv.trainers.number import Number
from fastadv.trainers.pair import PairRecipe
from fastadv.trainers.recipe import Presets, Recipe, check_field
from fastadv.trainers.schedules import Piecewise, Schedule

# The script counts epochs from 1: .02 in the first one, a tenth of .1 from the 76th, a hundredth from the 91st.
_SLOW_FIRST_EPOCH = Piecewise((0, 1, 75, 90), (0.2, 1.0, 0.1, 0.01))


@dataclass(frozen=True, kw_only=True)
class LbgatRecipe(PairRecipe):
    """Numbers of the authors' code, whose attack is that of TRADES; both presets have them.

    Attributes:
        beta: weight of the divergence between clean and adversarial logits; 0 or 6 in the paper.
        fixed: guide by a frozen standard model (BGAT) instead of one that learns beside.
    """

    epochs: int = 100
    weight_decay: Number = 2e-4
    schedule: Schedule = _SLOW_FIRST_EPOCH
    beta: Number = 0.0
    fixed: bool = False

    presets: ClassVar[Presets] = {"paper": {}, "official": {}}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_field(self, "beta", at_least=0)


class Lbgat(NaturalMethod[LbgatRecipe]):
    """LBGAT: mean squared difference of f(x') and T(x), CE(T(x)), and beta KL(f(x) || f(x')).

    Source: Cui et al. 2021; recipe as in the authors' code (dvlab-research/LBGAT). The natural model T learns from
    both terms, with an optimiser of its own whose numbers are the same; with `fixed` it is a teacher, and the
    first and last terms remain. The attack raises TRADES' divergence, also where beta is 0.

    Cost per batch: 2KF and 1F for the attack, 3F for f(x'), 3F for T (1F where it is fixed), 3F for f(x) where
    beta is not 0. Running statistics move once, or twice where beta is not 0; T's once.
    """

    name = "lbgat"
    heeds = frozenset({"extra_weight"})
    recipe_class = LbgatRecipe
    attack_loss = "kl"

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
        """Build the natural model and the attack, and count the passes over clean images."""
        self.bn_updates = self.images_trained = 2 if self.recipe.beta else 1
        super().setup()

    def objective(self, clean_logits: Tensor, adv_logits: Tensor, y: Tensor) -> Tensor:
        """Return the guidance of f(x') by T(x), whose logits stand in the place of the clean ones."""
        if self.recipe.fixed:
            apart = at_least_float32(adv_logits) - at_least_float32(clean_logits)
            return apart.square().mean(1)
        return losses.lbgat(adv_logits, clean_logits, y, reduction="none")

    def training_loss(self, batch: TrainBatch, adv: Attacked) -> LossResult:
        """Return the guidance and the divergence."""
        with torch.set_grad_enabled(not self.recipe.fixed):
            natural_logits = self.natural(batch.x)
        clean_logits = self.model(batch.x) if self.recipe.beta else None
        adv_logits = self.model(adv.x)
        loss = self.objective(natural_logits, adv_logits, batch.y)
        if clean_logits is not None:
            divergence = losses.kl(clean_logits, adv_logits, reduction="none")
            loss = loss + self.recipe.beta * divergence
        metrics = {
            "train_adv_accuracy": accuracy(adv_logits, batch.y),
            "train_natural_accuracy": accuracy(natural_logits, batch.y),
        }
        return LossResult(batch.mean(loss), metrics)

    def passes(self, epoch: int) -> float:
        """Return the robust model's cost and that of T, whose forward pass AWP repeats."""
        natural = 1 if self.recipe.fixed else 3
        return super().passes(epoch) + natural + self.perturbs_weights(epoch)
