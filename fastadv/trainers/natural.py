"""Base of the methods that have a natural model beside the robust one."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from fastadv.models.registry import check_plain_name
from fastadv.seeding import derive_seed
from fastadv.trainers.pair import PairMethod, PairRecipe


@dataclass(frozen=True, kw_only=True)
class NaturalRecipe(PairRecipe):
    """Numbers of a method with a natural model beside the robust one.

    Attributes:
        natural: architecture of the trained natural model, one of fastadv's names or "timm:NAME"; by default the
            architecture of the robust model.
    """

    natural: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_plain_name("natural", self.natural)


NaturalT = TypeVar("NaturalT", bound=NaturalRecipe)


class NaturalMethod(PairMethod[NaturalT]):
    """A pair method with a model of clean images, which learns beside the robust one unless it is a teacher.

    Attributes:
        natural: if it is trained, a model with its own weights and optimiser, of the architecture that the recipe
            names or of the robust model's architecture; else the frozen model "teacher".
    """

    @property
    def natural_learns(self) -> bool:
        """Whether the natural model is trained."""
        return True

    def setup(self) -> None:
        """Build the natural model and the attack."""
        self._is_copy = False
        self.natural = self._build_natural() if self.natural_learns else self.teachers["teacher"]
        super().setup()

    def _build_natural(self) -> nn.Module:
        name = self.recipe.natural
        if name is None and ":" in (self.runtime.network or ""):
            # A network of other packages may draw its weights only when it is built: a copy could not draw again.
            name = self.runtime.network
        if name is None:
            self._is_copy = True
            return copy.deepcopy(self.model)
        torch.manual_seed(derive_seed(self.recipe.seed, "natural"))
        return self.runtime.make("natural", name)

    def initialise(self) -> None:
        """Draw new weights for a natural model that was made as a copy of the robust model.

        A warning names the trained parameters that cannot be drawn again, and so have the robust model's values.
        """
        if self._is_copy:
            torch.manual_seed(derive_seed(self.recipe.seed, "natural"))
            kept = _reset_parameters(self.natural)
            if kept:
                warnings.warn(
                    f"the natural model begins with the model's own values of {', '.join(kept[:3])}"
                    f"{' and others' if len(kept) > 3 else ''}, which no reset_parameters of its modules draws "
                    "again; natural names an architecture that is built anew",
                    stacklevel=2,
                )

    def trainable(self) -> dict[str, nn.Module]:
        """Return the robust model, then the natural model if it is trained."""
        models = {"model": self.model}
        if self.natural_learns:
            models["natural"] = self.natural
        return models


def _reset_parameters(model: nn.Module) -> list[str]:
    """Draw all weights again, as each class does when it is created: inner modules first, then their owners.

    Returns:
        The names of the trained parameters of which no module that holds them has `reset_parameters`.
    """
    drawn: set[int] = set()
    for module in reversed(list(model.modules())):
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()
            # A module without the function of its own leaves its parameters to the modules around it.
            drawn |= {id(parameter) for parameter in module.parameters()}
    return [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in drawn]
