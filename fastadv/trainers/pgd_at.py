"""PGD adversarial training."""

from __future__ import annotations

from fastadv.trainers.adversarial import AdversarialMethod, AdversarialT
from fastadv.trainers.method import Attacked, LossResult, TrainBatch, accuracy
from fastadv.trainers.recipe import AdversarialRecipe


class PGDAT(AdversarialMethod[AdversarialT, Attacked]):
    """PGD adversarial training: cross-entropy of images that PGD made to maximise it.

    Source: Madry et al. 2018, equation 2.1, with the numbers of the ARREST paper's baseline: eps
    8/255, alpha 2/255, K 10, and the schedule of standard training. The paper leaves open in which
    mode the model is attacked; here it is evaluation mode, as in most published code.

    Cost per batch: 2KF for the attack, 3F for training. Running statistics move once.
    """

    name = "pgd_at"
    supports = frozenset({"label_smoothing", "extra_weight"})
    recipe_class = AdversarialRecipe

    def attack(self, batch: TrainBatch) -> Attacked:
        """Return PGD's images."""
        return Attacked(self.perturb(batch))

    def training_loss(self, batch: TrainBatch, adv: Attacked) -> LossResult:
        """Return the cross-entropy of the attacked images."""
        logits = self.model(adv.x)
        loss = self.cross_entropy(logits, batch.y)
        return LossResult(batch.mean(loss), {"train_adv_accuracy": accuracy(logits, batch.y)})
