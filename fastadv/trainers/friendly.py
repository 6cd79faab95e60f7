"""Friendly versions of the pair methods: the attack on an image stops soon after it succeeds."""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from typing import TypeVar

from fastadv.attacks import PGD, FriendlyPGD
from fastadv.trainers.method import Attacked, TrainBatch
from fastadv.trainers.pair import PairMethod, PairRecipe


class FriendlyTau:
    """The part of a recipe that says how far a friendly attack goes on for an image.

    The recipe, a dataclass, has the fields `tau` and `tau_epochs`.
    """

    tau: int
    tau_epochs: tuple[int, ...]

    def check_tau(self) -> None:
        """Check the fields.

        Raises:
            ValueError: if tau is negative, or the epochs are not ascending.
        """
        if self.tau < 0:
            raise ValueError(f"tau must be >= 0, got {self.tau}")
        if list(self.tau_epochs) != sorted(self.tau_epochs):
            raise ValueError(f"tau_epochs must be ascending, got {self.tau_epochs}")

    def tau_at(self, epoch: int) -> int:
        """Return tau in an epoch, counted from 0: one more after each of `tau_epochs`."""
        return self.tau + bisect.bisect_right(self.tau_epochs, epoch)


@dataclass(frozen=True, kw_only=True)
class FriendlyPairRecipe(FriendlyTau, PairRecipe):
    """Options of TRADES and MART that come from FAT. Its paper calls the results FAT for TRADES and FAT for MART.

    Attributes:
        friendly: attack with `fastadv.attacks.FriendlyPGD` in place of PGD.
        tau: for a friendly attack in the first epoch, number of steps from misclassified points after which the
            attack stops for an image.
        tau_epochs: epochs, ascending; tau grows by 1 after each of them.
    """

    friendly: bool = False
    tau: int = 0
    tau_epochs: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_tau()


FriendlyT = TypeVar("FriendlyT", bound=FriendlyPairRecipe)


class FriendlyPairMethod(PairMethod[FriendlyT]):
    """A pair method whose recipe can ask for a friendly attack.

    Images whose attack has stopped stay in the passes, so that the attack costs as much as PGD.
    """

    def setup(self) -> None:
        """Build the attack, a friendly one if the recipe asks for it."""
        self.attack_class = FriendlyPGD if self.recipe.friendly else PGD
        super().setup()

    def attack(self, batch: TrainBatch) -> Attacked:
        """Return the images of PGD, or of friendly PGD with the epoch's tau."""
        if isinstance(self.pgd, FriendlyPGD):
            self.pgd.tau = self.recipe.tau_at(batch.epoch)
        return super().attack(batch)
