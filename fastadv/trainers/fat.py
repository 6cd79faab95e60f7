"""FAT: friendly adversarial training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastadv.attacks import FriendlyPGD
from fastadv.trainers.friendly import FriendlyTau
from fastadv.trainers.method import Attacked, TrainBatch
from fastadv.trainers.number import Number
from fastadv.trainers.pgd_at import PGDAT
from fastadv.trainers.recipe import AdversarialRecipe, Presets
from fastadv.trainers.schedules import Piecewise, Schedule

# The script counts epochs from 1 and tests `epoch >= 60`: the 60th epoch already runs at a tenth.
_DROPS_AT_60_90_AND_110 = Piecewise((0, 59, 89, 109), (1.0, 0.1, 0.01, 0.005))


@dataclass(frozen=True, kw_only=True)
class FatRecipe(FriendlyTau, AdversarialRecipe):
    """Numbers of the authors' code; both presets have them.

    Attributes:
        tau: in the first epoch, number of steps from misclassified points after which the attack stops for an
            image.
        tau_epochs: epochs, ascending; tau grows by 1 after each of them.
    """

    epochs: int = 120
    weight_decay: Number = 2e-4
    schedule: Schedule = _DROPS_AT_60_90_AND_110
    eps: Number = 0.031
    alpha: Number = 0.007
    tau: int = 0
    tau_epochs: tuple[int, ...] = (50, 90)

    presets: ClassVar[Presets] = {"paper": {}, "official": {}}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_tau()


class Fat(PGDAT[FatRecipe]):
    """FAT: cross-entropy of the images of PGD that stops, image by image, soon after the boundary is crossed.

    Source: Zhang et al. 2020, algorithms 1 and 2; recipe as in the authors' code
    (zjfheart/Friendly-Adversarial-Training): uniform start, model in evaluation mode. In each step of the attack
    that code adds Gaussian noise of standard deviation .001, which algorithm 1 does not have; it is left out.

    Cost per batch: 2KF for the attack, 3F for training. Images that are left early stay in the passes: taking them
    out would make a GPU wait for the CPU. Running statistics move once.
    """

    name = "fat"
    recipe_class = FatRecipe
    attack_class = FriendlyPGD

    def attack(self, batch: TrainBatch) -> Attacked:
        """Return the friendly images, with the epoch's tau."""
        assert isinstance(self.pgd, FriendlyPGD)
        self.pgd.tau = self.recipe.tau_at(batch.epoch)
        return super().attack(batch)
