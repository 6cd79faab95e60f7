"""Base of the methods that attack with PGD."""

from __future__ import annotations

from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from fastadv.attacks import PGD
from fastadv.attacks.arguments import TrainMode
from fastadv.attacks.objectives import LossFunction
from fastadv.attacks.starts import uniform_radius_start
from fastadv.ops import random_start
from fastadv.trainers.awp import WeightPerturbation
from fastadv.trainers.method import AttackedT, LossResult, Method, TrainBatch, Update
from fastadv.trainers.recipe import AdversarialRecipe
from fastadv.trainers.returns import check_attacked, check_loss

_MODES: dict[str, TrainMode] = {"eval": False, "train": True, "moving": "moving"}
AdversarialT = TypeVar("AdversarialT", bound=AdversarialRecipe)


class AdversarialMethod(Method[AdversarialT, AttackedT]):
    """A method whose attack is PGD on the trained model, in evaluation mode unless its recipe has another mode.

    Its recipe can ask for AWP, `WeightPerturbation`, around the training loss. The loss is then computed twice,
    with the same attacked images, and the log has the loss at the perturbed weights.

    Attributes:
        attack_loss: the loss that PGD maximises; a name or a callable, as for `fastadv.PGD`.
        attack_class: PGD, or a subclass with the same arguments.
        images_trained: number of images that the trained model sees in the training loss for each image of the
            batch.
    """

    attack_loss: str | LossFunction = "ce"
    attack_class: type[PGD] = PGD
    images_trained: int = 1

    def setup(self) -> None:
        """Build the attack; it follows the weights of the model as they are trained."""
        recipe = self.recipe
        if recipe.attack_mode != "eval" and not self.bn_updates:
            raise ValueError(
                f"attack_mode must be 'eval' for {self.name}, which trains no BatchNorm, "
                f"got {recipe.attack_mode!r}"
            )
        self.pgd = self.attack_class(
            self.model,
            recipe.eps,
            recipe.alpha,
            recipe.steps,
            recipe.random_start,
            norm=recipe.norm,
            loss=self.attack_loss,
            precision=recipe.attack_precision,
            engine=recipe.attack_engine,
            train_mode=_MODES[recipe.attack_mode],
            check_inputs=False,  # images and labels of an ImageData are in range
        )
        self._gauges: dict[str, Tensor] = {}
        if recipe.attack_mode == "moving":
            self.bn_updates += recipe.steps + (self.attack_loss == "kl")

    def start_of(self, batch: TrainBatch) -> Tensor | None:
        """Return the images at which the attack starts; None for PGD's own start: a random point, or the image."""
        recipe = self.recipe
        drawn = recipe.random_start and recipe.norm == "l2" and recipe.l2_start == "radius"
        return self.random_point(batch, "attack") if drawn else None

    def random_point(self, batch: TrainBatch, purpose: str, clip: bool = True) -> Tensor:
        """Return a random point of the ball around each image, drawn by the recipe's `l2_start`.

        Args:
            batch: the images.
            purpose: the purpose of the random numbers; another purpose gives other numbers.
            clip: move points outside 0..1 to the nearest point inside.

        Returns:
            Images [B, C, H, W], in 0..1 with `clip`.
        """
        recipe, seed = self.recipe, batch.seed(purpose)
        eps = (
            self.pgd.eps
        )  # differs from the recipe's eps if the method draws a radius for each batch
        high = 1 + recipe.eps
        bounds = (0.0, 1.0) if clip else (1 - high, high)  # the latter hold every point of the ball
        if recipe.norm == "l2" and recipe.l2_start == "radius":
            return uniform_radius_start(batch.x, eps, bounds, seed=seed, sample_ids=batch.ids)
        return random_start(batch.x, eps, recipe.norm, bounds, seed, sample_ids=batch.ids)

    def perturb(self, batch: TrainBatch, rows: Tensor | None = None) -> Tensor:
        """Attack a batch, or some of its images.

        Args:
            batch: the batch.
            rows: int64 indices of the images to attack; the other images are returned unchanged. The result of an
                image does not depend on the other images that are attacked with it.

        Returns:
            Images [B, C, H, W].
        """
        seed = batch.seed("attack")
        self._gauges = {
            "zero_gradients": torch.zeros((), device=batch.x.device, dtype=torch.float32)
        }
        if rows is not None and rows.numel() == 0:
            return batch.x
        start = self.start_of(batch)
        if rows is None:
            adv = self.pgd(batch.x, batch.y, seed=seed, sample_ids=batch.ids, start=start)
        else:
            some = self.pgd(
                batch.x[rows],
                batch.y[rows],
                seed=seed,
                sample_ids=batch.ids[rows],
                start=None if start is None else start[rows],
            )
            adv = torch.index_copy(batch.x, 0, rows, some)
        seen = self.pgd.last
        self._gauges = {"zero_gradients": seen.counts[0] / max(seen.elements, 1)}
        return adv

    def gauges(self) -> dict[str, Tensor]:
        """Return the fraction of exact zeros in the gradients of the attack, a sign of gradient masking."""
        return self._gauges

    def perturbs_weights(self, epoch: int) -> bool:
        """Whether AWP perturbs the weights in an epoch, counted from 0."""
        return self.recipe.awp_gamma > 0 and epoch >= self.recipe.awp_warmup

    @cached_property
    def _perturbation(self) -> WeightPerturbation:
        models = list(self.trainable().values())
        return WeightPerturbation(models, self.recipe.awp_gamma, self.runtime.ranks)

    def step(self, batch: TrainBatch, update: Update) -> None:
        """Train on one batch; with AWP the gradient is taken at perturbed weights."""
        if not self.perturbs_weights(batch.epoch):
            super().step(batch, update)
            return
        with self.runtime.phases("attack"):
            adv = self.attack(batch)
            check_attacked(self, adv, batch)

        def loss() -> LossResult:
            with self.autocast():
                result = self.training_loss(batch, adv)
            check_loss(self, result)
            return result

        with self.runtime.phases("perturb"):
            moves = self._perturbation.moves(loss)
        with self.runtime.phases("train"):
            self._perturbation.step(moves, loss, update)

    def passes(self, epoch: int) -> float:
        """Return 2F for each step of the attack and 3F for each image that is trained on, twice with AWP."""
        training = 3 * self.images_trained
        return 2 * self.recipe.steps + training * (1 + self.perturbs_weights(epoch))
