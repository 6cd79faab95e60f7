"""ALP: adversarial logit pairing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastadv import losses
from fastadv.trainers.method import Attacked, TrainBatch
from fastadv.trainers.number import Number
from fastadv.trainers.pair import PairMethod, PairRecipe
from fastadv.trainers.recipe import check_field
from fastadv.trainers.schedules import MultiStep, Schedule

_TENTH_AFTER_75_AND_90 = MultiStep((75, 90), 0.1)


@dataclass(frozen=True, kw_only=True)
class AlpRecipe(PairRecipe):
    """The schedule of standard training, and the weight that is used in practice.

    Attributes:
        weight: weight of the logit pairing.
    """

    schedule: Schedule = _TENTH_AFTER_75_AND_90
    weight: Number = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_field(self, "weight", at_least=0)


class Alp(PairMethod[AlpRecipe]):
    """ALP: cross-entropy of clean and adversarial images, and the mean squared difference of their logits.

    Source: Kannan et al. 2018, section 3. Both kinds of images pass the network together.

    Cost per batch: 2KF for the attack, 6F for training. Running statistics move once, by all 2B images.
    """

    name = "alp"
    supports = frozenset({"extra_weight"})
    recipe_class = AlpRecipe
    bn_updates = 1

    def objective(self, clean_logits: Tensor, adv_logits: Tensor, y: Tensor) -> Tensor:
        """Return ALP's loss."""
        return losses.alp(clean_logits, adv_logits, y, self.recipe.weight, reduction="none")

    def logits(self, batch: TrainBatch, adv: Attacked) -> tuple[Tensor, Tensor]:
        """Return the logits of clean and adversarial images from one joint pass."""
        clean_logits, adv_logits = self.model(torch.cat((batch.x, adv.x))).chunk(2)
        return clean_logits, adv_logits
