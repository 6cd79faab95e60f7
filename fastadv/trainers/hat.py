"""HAT: helper-based adversarial training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from fastadv import losses
from fastadv.trainers.method import Attacked, TrainBatch
from fastadv.trainers.number import Number
from fastadv.trainers.pair import PairMethod, PairRecipe
from fastadv.trainers.recipe import Presets, Recipe, check_field
from fastadv.trainers.schedules import OneCycle, Schedule

_ONE_CYCLE = OneCycle(peak=0.25, base_momentum=0.85, max_momentum=0.95)


@dataclass(frozen=True, kw_only=True)
class HatRecipe(PairRecipe):
    """Numbers of the authors' code, which both presets have.

    The learning rate is highest after a quarter of the run; the momentum falls from .95 to .85 until then.

    Attributes:
        beta: weight of the divergence.
        gamma: weight of the helper examples.
        reach: distance of a helper example from x, in units of x' - x; 2 is twice as far from x as x'.
    """

    epochs: int = 50
    lr: Number = 0.21
    nesterov: bool = True
    schedule: Schedule = _ONE_CYCLE
    eps: Number = 8 / 255
    alpha: Number = 2 / 255
    beta: Number = 2.5
    gamma: Number = 0.5
    reach: Number = 2.0

    presets: ClassVar[Presets] = {"paper": {}, "official": {}}

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("beta", "gamma", "reach"):
            check_field(self, name, at_least=0)


@dataclass(frozen=True)
class AttackedWithHelpers(Attacked):
    """Adversarial images with their helper examples.

    Attributes:
        helper: x + reach (x' - x), not clipped, [B, C, H, W].
        helper_y: the standard model's prediction for x', [B] int64.
    """

    helper: Tensor
    helper_y: Tensor


def helper_examples(
    standard: Callable[[Tensor], Tensor], x: Tensor, adv: Tensor, reach: float
) -> tuple[Tensor, Tensor]:
    """Return the helper examples beyond adversarial images, and the standard model's labels for them.

    Args:
        standard: a function that returns the standard model's logits for images.
        x: clean images [B, C, H, W].
        adv: x', adversarial images [B, C, H, W].
        reach: distance from x, in units of x' - x.

    Returns:
        x + reach (x' - x), not clipped, [B, C, H, W], and the standard model's prediction for x', [B] int64.
    """
    return torch.lerp(x, adv, reach), standard(adv).argmax(1)


class Hat(PairMethod[HatRecipe]):
    """HAT: TRADES' loss and gamma CE(f(x_h), y_h) on helper examples beyond the adversarial ones.

    Source: Rade and Moosavi-Dezfooli 2022; recipe as in the authors' code (imrahulr/hat).

    Cost per batch: 2KF and 1F for the attack, 1F of the standard model, 9F for training. Running statistics move
    three times: by the clean, the adversarial and the helper images.
    """

    name = "hat"
    supports = frozenset({"extra_weight"})
    recipe_class = HatRecipe
    attack_loss = "kl"
    bn_updates = 3
    images_trained = 3

    @classmethod
    def teachers_needed(cls, recipe: Recipe) -> tuple[str, ...]:
        """Return the standard model, which labels the helper examples."""
        return ("teacher",)

    def attack(self, batch: TrainBatch) -> AttackedWithHelpers:
        """Return PGD's images and the helper examples beyond them."""
        x, standard = self.perturb(batch), partial(self.teacher_output, "teacher")
        with self.runtime.phases("teacher"), torch.no_grad(), self.autocast():
            return AttackedWithHelpers(x, *helper_examples(standard, batch.x, x, self.recipe.reach))

    def objective(self, clean_logits: Tensor, adv_logits: Tensor, y: Tensor) -> Tensor:
        """Return TRADES' loss."""
        return losses.trades(clean_logits, adv_logits, y, self.recipe.beta, reduction="none")

    def image_losses(
        self, batch: TrainBatch, adv: Attacked, clean_logits: Tensor, adv_logits: Tensor
    ) -> Tensor:
        """Return TRADES' loss and the loss of the helper examples, whose logits are computed here."""
        assert isinstance(adv, AttackedWithHelpers)
        helper = losses.cross_entropy(self.model(adv.helper), adv.helper_y, reduction="none")
        return self.objective(clean_logits, adv_logits, batch.y) + self.recipe.gamma * helper

    def passes(self, epoch: int) -> float:
        """Return TRADES' cost, 3F for the helper examples and 1F for the standard model."""
        return super().passes(epoch) + 1
