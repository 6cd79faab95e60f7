"""Base of the methods that train on an image and its adversarial version together."""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from fastadv.ops import random_start
from fastadv.trainers.adversarial import AdversarialMethod
from fastadv.trainers.method import Attacked, LossResult, TrainBatch, accuracy
from fastadv.trainers.number import Number
from fastadv.trainers.recipe import AdversarialRecipe, check_field
from fastadv.trainers.schedules import MultiStep, Schedule

# The scripts count epochs from 1 and test `epoch >= 75`, so that the 75th epoch already runs at a tenth.
_TENTH_AT_75_90_AND_100 = MultiStep((74, 89, 99), 0.1)


@dataclass(frozen=True, kw_only=True)
class PairRecipe(AdversarialRecipe):
    """Numbers that TRADES and similar methods share, from their authors' code.

    The learning rate falls to a tenth at the 75th epoch, as in that code.

    Attributes:
        start_std: standard deviation of the Gaussian noise from which the attack starts, in units of the 0..1
            image. Without `random_start` the attack starts from the image.
    """

    eps: Number = 0.031
    alpha: Number = 0.007
    schedule: Schedule = _TENTH_AT_75_90_AND_100
    start_std: Number = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_field(self, "start_std", at_least=0)


PairT = TypeVar("PairT", bound=PairRecipe)


class PairMethod(AdversarialMethod[PairT, Attacked]):
    """A method whose loss compares the logits of clean and of adversarial images.

    The attack starts from Gaussian noise. The noise is drawn as a uniform point of the l2 ball of radius
    `start_std * sqrt(n)`, which in the n dimensions of an image is nearly Gaussian. The noisy image is clipped to
    0..1. The authors' code clips only after the first step; no preset does this.

    Cost per batch: 2KF for the attack, 1F more if the attack compares with the clean logits, 6F for training.
    Running statistics move twice, first by the clean images.
    """

    bn_updates = 2
    images_trained = 2

    def start_of(self, batch: TrainBatch) -> Tensor | None:
        """Return the images with a little Gaussian noise; None, for the images, without `random_start`."""
        if not self.recipe.random_start:
            return None
        radius = self.recipe.start_std * math.sqrt(batch.x[0].numel())
        seed = batch.seed("attack")
        return random_start(batch.x, radius, "l2", seed=seed, sample_ids=batch.ids)

    def attack(self, batch: TrainBatch) -> Attacked:
        """Return PGD's images."""
        return Attacked(self.perturb(batch))

    @abc.abstractmethod
    def objective(self, clean_logits: Tensor, adv_logits: Tensor, y: Tensor) -> Tensor:
        """Return the loss of each image, [B]."""

    def logits(self, batch: TrainBatch, adv: Attacked) -> tuple[Tensor, Tensor]:
        """Return the trained model's logits of the clean and of the adversarial images, [B, C] each."""
        return self.model(batch.x), self.model(adv.x)

    def image_losses(
        self, batch: TrainBatch, adv: Attacked, clean_logits: Tensor, adv_logits: Tensor
    ) -> Tensor:
        """Return the whole loss of each image [B]; by default it is the objective."""
        return self.objective(clean_logits, adv_logits, batch.y)

    def training_loss(self, batch: TrainBatch, adv: Attacked) -> LossResult:
        """Return the mean loss of the images."""
        clean_logits, adv_logits = self.logits(batch, adv)
        loss = batch.mean(self.image_losses(batch, adv, clean_logits, adv_logits))
        return LossResult(loss, pair_metrics(clean_logits, adv_logits, batch.y))

    def passes(self, epoch: int) -> float:
        """Return the cost of attack and training, and 1F for an attack that compares with clean logits."""
        return super().passes(epoch) + (self.attack_loss == "kl")


def pair_metrics(clean_logits: Tensor, adv_logits: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Return the metrics "train_accuracy" and "train_adv_accuracy" of a batch."""
    return {
        "train_accuracy": accuracy(clean_logits, y),
        "train_adv_accuracy": accuracy(adv_logits, y),
    }
