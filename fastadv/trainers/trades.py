"""TRADES: cross-entropy of the clean images, and the divergence of the adversarial from the clean predictions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fastadv import losses
from fastadv.trainers.friendly import FriendlyPairMethod, FriendlyPairRecipe
from fastadv.trainers.number import Number
from fastadv.trainers.recipe import Presets, check_field
from fastadv.trainers.schedules import MultiStep

# FAT's script counts epochs from 1 and tests `epoch >= 75`; a second drop at 90 would come after its last epoch.
_FAT = {
    "friendly": True,
    "epochs": 85,
    "schedule": MultiStep((74,), 0.1),
}


@dataclass(frozen=True, kw_only=True)
class TradesRecipe(FriendlyPairRecipe):
    """Numbers of the authors' code, which both presets have.

    `Trades` and its base class state the differences of "official" from that code. The preset "fat" has the
    numbers of FAT for TRADES (Zhang et al. 2020, zjfheart/Friendly-Adversarial-Training).

    Attributes:
        beta: weight of the divergence, 1 / lambda in the paper.
    """

    epochs: int = 76
    weight_decay: Number = 2e-4
    beta: Number = 6.0
    tau_epochs: tuple[int, ...] = (30, 50, 70)

    presets: ClassVar[Presets] = {"paper": {}, "official": {}, "fat": _FAT}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_field(self, "beta", at_least=0)


class Trades(FriendlyPairMethod[TradesRecipe]):
    """TRADES: CE(f(x)) + beta KL(f(x) || f(x')), x' made to maximise the divergence.

    Source: Zhang et al. 2019, equation 5; recipe as in the authors' code (yaodongyu/TRADES).

    Cost per batch: 2KF and 1F for the attack, whose clean logits are computed once, 6F for training. Running
    statistics move twice (three times in the authors' code, which runs the clean images once more).
    """

    name = "trades"
    supports = frozenset({"extra_weight"})
    recipe_class = TradesRecipe
    attack_loss = "kl"

    def objective(self, clean_logits: Tensor, adv_logits: Tensor, y: Tensor) -> Tensor:
        """Return TRADES' loss."""
        return losses.trades(clean_logits, adv_logits, y, self.recipe.beta, reduction="none")
