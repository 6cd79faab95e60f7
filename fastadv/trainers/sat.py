"""SAT: adversarial training on a curriculum of difficulty."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastadv.attacks.curriculum import CurriculumPGD
from fastadv.trainers.method import Attacked, TrainBatch
from fastadv.trainers.number import Number
from fastadv.trainers.pgd_at import PGDAT
from fastadv.trainers.recipe import AdversarialRecipe, Presets
from fastadv.trainers.schedules import MultiStep, Schedule

_TENTH_AFTER_40_60_AND_80 = MultiStep((40, 60, 80), 0.1)


@dataclass(frozen=True, kw_only=True)
class SatRecipe(AdversarialRecipe):
    """Numbers of the authors' code for CIFAR-10; both presets have them.

    Attributes:
        gap: the largest gap of probabilities at which the attack on an image goes on, in the first epochs. The gap
            is the probability of the most probable other class minus the probability of the image's own class,
            from -1 to 1.
        final_gap: the largest gap in the last epochs.
        gap_start: number of epochs before the gap begins to grow.
        gap_end: number of epochs after which the gap stays constant. From `gap_start` to `gap_end` it grows by the
            same amount with each epoch.
    """

    epochs: int = 100
    lr: Number = 0.05
    schedule: Schedule = _TENTH_AFTER_40_60_AND_80
    gap: Number = 0.0
    final_gap: Number = 0.4
    gap_start: int = 30
    gap_end: int = 70

    presets: ClassVar[Presets] = {"paper": {}, "official": {}}

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("gap", "final_gap"):
            if not -1 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in -1..1, got {getattr(self, name)}")
        if not 0 <= self.gap_start < self.gap_end:
            raise ValueError(
                f"gap_start must be >= 0 and below gap_end, got {self.gap_start} and {self.gap_end}"
            )

    def gap_at(self, epoch: int) -> float:
        """Return the gap in an epoch, counted from 0."""
        steps = min(max(epoch - self.gap_start + 1, 0), self.gap_end - self.gap_start)
        return self.gap + (self.final_gap - self.gap) * steps / (self.gap_end - self.gap_start)


class Sat(PGDAT[SatRecipe]):
    """SAT: cross-entropy of the images of PGD that stops, image by image, where max_j p_j - p_y exceeds a limit.

    The limit grows with the epochs.

    Source: Sitawarin et al. 2021, the variant P-SAT; attack, limits and recipe as in the authors' code
    (chawins/adv-exp), which calls it ATES. The variant H-SAT, whose difficulty is the largest eigenvalue of the
    Hessian, is left out.

    Cost per batch: 2KF for the attack, 3F for training. Images that stop early stay in the passes: taking them out
    would make a GPU wait for the CPU. Running statistics move once.
    """

    name = "sat"
    takes_soft_labels = False
    recipe_class = SatRecipe
    attack_class = CurriculumPGD

    def attack(self, batch: TrainBatch) -> Attacked:
        """Return the images at the epoch's limit."""
        assert isinstance(self.pgd, CurriculumPGD)
        self.pgd.gap = self.recipe.gap_at(batch.epoch)
        return super().attack(batch)
