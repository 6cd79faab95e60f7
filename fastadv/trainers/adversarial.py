"""Base of the methods that attack with PGD."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from fastadv.attacks import PGD
from fastadv.attacks.objectives import LossFunction
from fastadv.trainers.method import AttackedT, Method, TrainBatch
from fastadv.trainers.recipe import AdversarialRecipe

AdversarialT = TypeVar("AdversarialT", bound=AdversarialRecipe)


class AdversarialMethod(Method[AdversarialT, AttackedT]):
    """A method whose attack is PGD on the trained model in evaluation mode.

    Attributes:
        attack_loss: what PGD maximises; a name or a callable as `fastadv.pgd_fused` takes it.
    """

    attack_loss: str | LossFunction = "ce"

    def setup(self) -> None:
        """Build the attack; it follows the weights of the model as they are trained."""
        recipe = self.recipe
        self.pgd = PGD(
            self.model,
            recipe.eps,
            recipe.alpha,
            recipe.steps,
            recipe.random_start,
            loss=self.attack_loss,
            precision=recipe.attack_precision,
            engine=recipe.engine,
            check_inputs=False,  # images and labels of an ImageData are in range
        )

    def start_of(self, batch: TrainBatch) -> Tensor | None:
        """Return where the attack starts; None leaves it to PGD: uniform noise, or the image itself."""
        return None

    def perturb(self, batch: TrainBatch, rows: Tensor | None = None) -> Tensor:
        """Attack a batch, or some of it.

        Args:
            batch: the batch.
            rows: int64 indices of the images to attack; the others are returned as they are. The
                result of a row does not depend on which others are attacked with it.

        Returns:
            Images [B, C, H, W].
        """
        seed = batch.seed("attack")
        if rows is None:
            start = self.start_of(batch)
            return self.pgd(batch.x, batch.y, seed=seed, sample_ids=batch.ids, start=start)
        if rows.numel() == 0:
            return batch.x
        some = self.pgd(batch.x[rows], batch.y[rows], seed=seed, sample_ids=batch.ids[rows])
        return torch.index_copy(batch.x, 0, rows, some)

    def passes(self, epoch: int) -> float:
        """Return 2F for each step of the attack and 3F for one training pass."""
        return 2 * self.recipe.steps + 3
