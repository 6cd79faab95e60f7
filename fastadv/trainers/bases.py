"""Base methods to which other methods add terms: VFD-Adv, KD-AT, BGAT and LBGAT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from torch import Tensor, nn

from fastadv.trainers.alp import Alp
from fastadv.trainers.hat import Hat
from fastadv.trainers.mart import Mart
from fastadv.trainers.method import Attacked, Runtime, TrainBatch
from fastadv.trainers.number import Number
from fastadv.trainers.pair import PairMethod, PairRecipe
from fastadv.trainers.pgd_at import PGDAT
from fastadv.trainers.recipe import Recipe, check_field, shared_numbers
from fastadv.trainers.trades import Trades

BaseName = Literal["pgd_at", "trades", "mart", "alp", "hat"]
BaseMethod: TypeAlias = "PGDAT[Any] | PairMethod[Any]"
BASES: dict[str, type[PGDAT[Any]] | type[PairMethod[Any]]] = {
    method.name: method for method in (PGDAT, Trades, Mart, Alp, Hat)
}


@dataclass(frozen=True, kw_only=True)
class BaseOptionsRecipe(PairRecipe):
    """Options of the base, under the base's names, in the recipe of a method that adds terms to the base.

    Attributes:
        beta: weight of the divergence, with base "trades", "hat" or "mart"; by default the beta of the base's
            recipe.
        weight: weight of the logit pairing, with base "alp"; by default .5.
        code_constants: add the small constants of MART's code, with base "mart".
        gamma: weight of the helper examples, with base "hat"; by default .5.
        reach: distance of the helper examples from x, in units of x' - x, with base "hat"; by default 2.
    """

    beta: Number = 0.0
    weight: Number = 0.0
    code_constants: bool = False
    gamma: Number = 0.0
    reach: Number = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("beta", "weight", "gamma", "reach"):
            check_field(self, name, at_least=0)


def numbers_of_base(base: str, preset: str, kind: type[Recipe]) -> dict[str, Any]:
    """Return the numbers of a base's own recipe for the fields that another recipe class has as well.

    Args:
        base: a name in `BASES`.
        preset: the preset; "paper" is used if the base has no such preset.
        kind: the other recipe class.
    """
    recipe = BASES[base].recipe_class
    return shared_numbers(recipe.preset(preset if preset in recipe.presets else "paper"), kind, ())


def build_base(
    base: str,
    recipe: Recipe,
    model: nn.Module,
    runtime: Runtime,
    teachers: Mapping[str, nn.Module],
) -> BaseMethod:
    """Make the base method, with its own attack and its own loss.

    Args:
        base: a name in `BASES`.
        recipe: the recipe of the method that adds terms. Its fields with the base's names hold the base's numbers.
        model: the trained model.
        runtime: device, precision and timer of the method that adds terms.
        teachers: the frozen models of the method that adds terms; HAT needs "teacher".
    """
    kind = BASES[base]
    needed = kind.teachers_needed(recipe)
    own = kind.recipe_class(**shared_numbers(recipe, kind.recipe_class, ()))
    return kind(own, model, runtime, {name: teachers[name] for name in needed})


def base_losses(base: BaseMethod, batch: TrainBatch, adv: Attacked) -> tuple[Tensor, Tensor]:
    """Return f(x') [B, C], and the base's loss of each image of a batch [B]."""
    if isinstance(base, PairMethod):
        clean_logits, adv_logits = base.logits(batch, adv)
        return adv_logits, base.image_losses(batch, adv, clean_logits, adv_logits)
    adv_logits = base.model(adv.x)
    return adv_logits, base.cross_entropy(adv_logits, batch.y)


def unused_of_base(base: str | None) -> list[str]:
    """Return the fields of `BaseOptionsRecipe`, and "start_std", that a base lacks; all if base is None."""
    names = ("beta", "weight", "code_constants", "gamma", "reach", "start_std")
    if base not in BASES:
        return list(names)
    return [name for name in names if not hasattr(BASES[base].recipe_class, name)]
