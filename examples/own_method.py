"""A training method of your own: adversarial training with logit squeezing (Kannan et al. 2018).

In Python, as below, or on the command line with everything that fastadv's own methods have:

    fastadv train examples.own_method:LogitSqueezing --data digits --run runs/squeezed --weight .1
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass

from fastadv.trainers import (
    AdversarialMethod,
    AdversarialRecipe,
    Attacked,
    LossResult,
    Number,
    TrainBatch,
    train,
)


@dataclass(frozen=True, kw_only=True)
class LogitSqueezingRecipe(AdversarialRecipe):
    """Numbers of adversarial training with logit squeezing.

    Attributes:
        weight: of the mean square of the logits.
    """

    weight: Number = 0.05


class LogitSqueezing(AdversarialMethod[LogitSqueezingRecipe, Attacked]):
    """Cross-entropy of the attacked images, and the mean square of their logits times `weight`.

    Cost per batch: 2KF for the attack, 3F for training. Running statistics move once.
    """

    name = "logit_squeezing"
    recipe_class = LogitSqueezingRecipe
    supports = frozenset({"label_smoothing", "extra_weight"})

    def attack(self, batch: TrainBatch) -> Attacked:
        """Return PGD's images."""
        return Attacked(self.perturb(batch))

    def training_loss(self, batch: TrainBatch, adv: Attacked) -> LossResult:
        """Return the loss and, for the log, how large the logits are."""
        logits = self.model(adv.x)
        squares = logits.float().square().mean(1)
        loss = batch.mean(self.cross_entropy(logits, batch.y) + self.recipe.weight * squares)
        return LossResult(loss, {"squares": squares.detach().mean()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=3)
    options = parser.parse_args()
    recipe = LogitSqueezingRecipe(
        epochs=options.epochs, batch_size=64, lr=0.05, eps=0.1, alpha=0.025, pad=0, flip=False
    )
    result = train(
        LogitSqueezing,
        recipe,
        data="digits",
        model="small_cnn",
        run_dir=tempfile.mkdtemp(),
        progress=False,
    )
    print(f"trained: {result.checkpoint}")


if __name__ == "__main__":
    main()
