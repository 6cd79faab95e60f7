"""Standard training on clean images. ARREST and other methods use its models as start or teacher."""

from __future__ import annotations

from fastadv.trainers.method import Attacked, LossResult, Method, TrainBatch, accuracy
from fastadv.trainers.recipe import Recipe


class Standard(Method[Recipe, Attacked]):
    """Standard training: cross-entropy of the clean images.

    Source: ARREST, section 5.1: SGD with momentum .9; learning rate .1, times .1 after epochs 75 and 90; 100
    epochs.

    Cost per batch: 3F. Running statistics move once.
    """

    name = "standard"
    supports = frozenset({"label_smoothing", "extra_weight"})
    recipe_class = Recipe

    def attack(self, batch: TrainBatch) -> Attacked:
        """Return the clean images."""
        return Attacked(batch.x)

    def training_loss(self, batch: TrainBatch, adv: Attacked) -> LossResult:
        """Return the cross-entropy."""
        logits = self.model(adv.x)
        loss = self.cross_entropy(logits, batch.y)
        return LossResult(batch.mean(loss), {"train_accuracy": accuracy(logits, batch.y)})

    def passes(self, epoch: int) -> float:
        """Return 3F, one training pass."""
        return 3
