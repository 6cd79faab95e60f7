"""Base of the methods that have a natural model beside the robust one."""

from __future__ import annotations

import copy

import torch
from torch import nn

from fastadv.seeding import derive_seed
from fastadv.trainers.pair import PairMethod, PairT


class NaturalMethod(PairMethod[PairT]):
    """A pair method with a model of clean images, which learns beside the robust one unless it is a teacher.

    Attributes:
        natural: where it learns, a model of the robust one's architecture, with weights and an optimiser of its
            own; else the frozen model "teacher".
    """

    @property
    def natural_learns(self) -> bool:
        """Whether the natural model is trained."""
        return True

    def setup(self) -> None:
        """Build the natural model and the attack."""
        self.natural = (
            copy.deepcopy(self.model) if self.natural_learns else self.teachers["teacher"]
        )
        super().setup()

    def initialise(self) -> None:
        """Draw weights of its own for a natural model that learns."""
        if self.natural_learns:
            torch.manual_seed(derive_seed(self.recipe.seed, "natural"))
            _reset_parameters(self.natural)

    def trainable(self) -> dict[str, nn.Module]:
        """Return the robust model, then the natural one where it learns."""
        return {"model": self.model, **({"natural": self.natural} if self.natural_learns else {})}


def _reset_parameters(model: nn.Module) -> None:
    """Draw all weights anew, as each class does on creation: layers first, then what their owners change."""
    for module in reversed(list(model.modules())):
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()
