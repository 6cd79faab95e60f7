"""KD-AT: distillation from teachers, added to the loss of a base method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import InitVar, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastadv import losses
from fastadv.trainers.adversarial import AdversarialMethod
from fastadv.trainers.bases import (
    BASES,
    BaseName,
    BaseOptionsRecipe,
    base_losses,
    build_base,
    numbers_of_base,
)
from fastadv.trainers.method import Attacked, LossResult, TrainBatch, accuracy
from fastadv.trainers.number import Number
from fastadv.trainers.recipe import Presets, Recipe, check_field, refuses_replaced_deciders
from fastadv.trainers.schedules import MultiStep, Schedule

_TENTH_AFTER_50_AND_150 = MultiStep((50, 150), 0.1)
_PGD_AT = "pgd_at"


@refuses_replaced_deciders
@dataclass(frozen=True, kw_only=True)
class KdAtRecipe(BaseOptionsRecipe):
    """Numbers of the authors' code; with another base than PGD-AT the numbers of the base.

    So `fastadv train trades` and `fastadv train kd_at --base trades --label_weight 1` differ only in the
    distillation.

    With "official" the model is attacked in training mode, as in that code, so running statistics move K + 1 times
    per batch.

    Attributes:
        base: the method to whose loss the distillation is added: "pgd_at", "trades", "mart", "alp" or "hat".
        label_weight: weight of the base's loss, which is the cross-entropy with the labels for PGD-AT.
        standard_weight: weight of the distillation from the standard teacher. With 0 the method needs no standard
            teacher, except for HAT's helper examples.
        robust_weight: weight of the distillation from the robust teacher. With 0 the method needs no robust
            teacher.
        temperature: temperature of both distillations.
    """

    epochs: int = 200
    schedule: Schedule = _TENTH_AFTER_50_AND_150
    eps: Number = 8 / 255
    alpha: Number = 2 / 255
    base: BaseName = "pgd_at"
    label_weight: Number = 0.3
    standard_weight: Number = 0.1
    robust_weight: Number = 0.6
    temperature: Number = 2.0
    replaces: InitVar[object] = None  # see `refuses_replaced_deciders`

    presets: ClassVar[Presets] = {"paper": {}, "official": {"attack_mode": "moving"}}
    deciding: ClassVar[tuple[str, ...]] = ("base",)

    def __post_init__(self, replaces: object) -> None:
        super().__post_init__()
        for name in ("label_weight", "standard_weight", "robust_weight"):
            check_field(self, name, at_least=0)
        check_field(self, "temperature", at_least=1e-3)

    @classmethod
    def preset_defaults(cls, preset: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the numbers of the preset, or of the base if it is another base than PGD-AT."""
        base = given.get("base", _PGD_AT)
        if base == _PGD_AT or base not in BASES:  # the recipe's own check reports an unknown base
            return super().preset_defaults(preset, given)
        return numbers_of_base(base, preset, cls)


@dataclass(frozen=True)
class AttackedWithTeachers(Attacked):
    """Adversarial images, with the teachers' logits for them.

    Attributes:
        standard_logits: logits of the standard teacher [B, C]; None if it does not teach.
        robust_logits: logits of the robust teacher [B, C]; None without a robust teacher.
        of_base: the result of the base's attack; None if it has only images.
    """

    standard_logits: Tensor | None
    robust_logits: Tensor | None
    of_base: Attacked | None = None


class KdAt(AdversarialMethod[KdAtRecipe, AttackedWithTeachers]):
    """KD-AT: .3 L_base + .1 KD(f(x'), T_std(x')) + .6 KD(f(x'), T_adv(x')), KD at temperature 2.

    L_base is the whole loss of `base`, with its numbers and its attack. For PGD-AT it is CE(f(x')), which gives
    the KD-AT of the paper. For TRADES it is CE(f(x)) + beta KL(f(x) || f(x')), and so on. The teachers teach only
    f(x'). With `label_weight` 1 and `robust_weight` 0 the loss is a base and the distillation from a standard
    model.

    Source: Chen et al. 2021, "Robust overfitting may be mitigated by properly learned smoothening", equation 2;
    recipe as in the authors' code (VITA-Group/Alleviate-Robust-Overfitting). Its two teachers are the "teacher",
    after standard training, and the "robust_teacher", after PGD-AT. Both see the adversarial images. KD is T^2 KL.
    The authors use T^2 cross-entropy with softened targets, which differs by the teachers' entropy and has the
    same gradient. The paper's averaging of the weights is an option of the recipe. The tables of VFD-Adv have KD
    around other bases than PGD-AT. The form of these losses is our choice.

    Cost per batch: the cost of the base, (2K + 3)F for PGD-AT, and 1F of each teacher. Running statistics move as
    often as in the base.
    """

    name = "kd_at"
    supports = frozenset({"label_smoothing", "extra_weight"})
    recipe_class = KdAtRecipe

    @classmethod
    def teachers_needed(cls, recipe: Recipe) -> tuple[str, ...]:
        """Return the names of the teachers that the recipe uses."""
        assert isinstance(recipe, KdAtRecipe)
        standard = recipe.standard_weight > 0 or recipe.base == "hat"
        return ("teacher",) * standard + ("robust_teacher",) * (recipe.robust_weight > 0)

    def setup(self) -> None:
        """Build the base with its attack."""
        self.base = build_base(
            self.recipe.base, self.recipe, self.model, self.runtime, self.teachers
        )
        self.pgd = self.base.pgd
        self.bn_updates, self.images_trained = self.base.bn_updates, self.base.images_trained

    def attack(self, batch: TrainBatch) -> AttackedWithTeachers:
        """Return the base's images and the teachers' logits of them."""
        adv = self.base.attack(batch)
        recipe = self.recipe
        with self.runtime.phases("teacher"), torch.no_grad(), self.autocast():
            standard, robust = (
                self.teacher_output(name, adv.x) if weight else None
                for name, weight in (
                    ("teacher", recipe.standard_weight),
                    ("robust_teacher", recipe.robust_weight),
                )
            )
            return AttackedWithTeachers(adv.x, standard, robust, adv)

    def training_loss(self, batch: TrainBatch, adv: AttackedWithTeachers) -> LossResult:
        """Return the weighted sum of the three terms."""
        recipe = self.recipe
        logits, own = base_losses(self.base, batch, adv.of_base or adv)
        loss = recipe.label_weight * own
        for weight, taught in (
            (recipe.standard_weight, adv.standard_logits),
            (recipe.robust_weight, adv.robust_logits),
        ):
            if taught is not None:
                distilled = losses.kd(logits, taught, recipe.temperature, reduction="none")
                loss = loss + weight * distilled
        return LossResult(batch.mean(loss), {"train_adv_accuracy": accuracy(logits, batch.y)})

    def gauges(self) -> dict[str, Tensor]:
        """Return the fraction of exact zeros in the gradients of the base's attack."""
        return self.base.gauges()

    def passes(self, epoch: int) -> float:
        """Return the base's cost and 1F for each teacher that is used."""
        recipe = self.recipe
        teaching = (recipe.standard_weight > 0) + (recipe.robust_weight > 0)
        return self.base.passes(epoch) + teaching
