"""MART: misclassification-aware adversarial training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fastadv import losses
from fastadv.trainers.friendly import FriendlyPairMethod, FriendlyPairRecipe
from fastadv.trainers.method import Attacked, TrainBatch
from fastadv.trainers.number import Number
from fastadv.trainers.recipe import Presets, check_field
from fastadv.trainers.schedules import MultiStep

# FAT's script counts epochs from 1 and tests `epoch >= 60` and `epoch >= 90`.
_FAT = {
    "friendly": True,
    "epochs": 90,
    "lr": 0.1,
    "weight_decay": 2e-4,
    "beta": 6.0,
    "schedule": MultiStep((59, 89), 0.1),
    "code_constants": True,
}
# MART's script counts epochs from 1 and tests `epoch >= 75`; a third drop at 100 would come after its last epoch.
_WRN = {
    "epochs": 90,
    "lr": 0.1,
    "weight_decay": 7e-4,
    "beta": 6.0,
    "schedule": MultiStep((74, 89), 0.1),
    "code_constants": True,
}


@dataclass(frozen=True, kw_only=True)
class MartRecipe(FriendlyPairRecipe):
    """Numbers of the authors' code for ResNet-18.

    The preset "official" adds the small constants of that code. The preset "wrn" has the numbers of that code for
    WRN-34-10, with the small constants. `PairMethod` states the remaining
    differences. The preset "fat" has the numbers of FAT for MART (Zhang et al. 2020,
    zjfheart/Friendly-Adversarial-Training), which uses the small constants, too. As in that script, a friendly
    attack's images go through the model before the clean ones.

    Attributes:
        beta: weight of the divergence.
        code_constants: add the small constants of the authors' code, which bound the loss and the gradient of
            images that are misclassified with confidence.
    """

    epochs: int = 120
    lr: Number = 0.01
    weight_decay: Number = 3.5e-3
    beta: Number = 5.0
    code_constants: bool = False
    tau_epochs: tuple[int, ...] = (20, 40, 60, 80)

    presets: ClassVar[Presets] = {
        "paper": {},
        "official": {"code_constants": True},
        "wrn": _WRN,
        "fat": _FAT,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_field(self, "beta", at_least=0)


class Mart(FriendlyPairMethod[MartRecipe]):
    """MART: BCE(f(x')) + beta KL(f(x) || f(x')) (1 - p_y(x)), x' made to maximise the cross-entropy.

    Source: Wang et al. 2020; recipe as in the authors' code (YisenWang/MART). That code's small constants, which
    the loss in log space does not need, are left out unless the recipe asks for them.

    Cost per batch: 2KF for the attack, 6F for training. Running statistics move twice, last by the clean
    images if the attack is friendly, else by the adversarial ones.
    """

    name = "mart"
    supports = frozenset({"extra_weight"})
    recipe_class = MartRecipe

    def logits(self, batch: TrainBatch, adv: Attacked) -> tuple[Tensor, Tensor]:
        """Return the trained model's logits of the clean and of the adversarial images, [B, C] each."""
        if not self.recipe.friendly:
            return super().logits(batch, adv)
        adv_logits = self.model(adv.x)
        return self.model(batch.x), adv_logits

    def objective(self, clean_logits: Tensor, adv_logits: Tensor, y: Tensor) -> Tensor:
        """Return MART's loss."""
        return losses.mart(
            clean_logits,
            adv_logits,
            y,
            self.recipe.beta,
            code_constants=self.recipe.code_constants,
            reduction="none",
        )
