"""ARREST: adversarial fine-tuning that keeps the representations of a standard model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from fastadv import losses
from fastadv.attacks.best import where_images
from fastadv.engine.feature_tap import FeatureTap
from fastadv.engine.frozen import frozen
from fastadv.losses.common import at_least_float32
from fastadv.models import check_feature_split, copy_weights
from fastadv.models.split import logits_of_halves
from fastadv.ops import noisy_replay, replay_mask
from fastadv.trainers.adversarial import AdversarialMethod
from fastadv.trainers.frozen_forward import features_of
from fastadv.trainers.halves import are_maps
from fastadv.trainers.method import Attacked, LossResult, TrainBatch, accuracy
from fastadv.trainers.number import Number
from fastadv.trainers.recipe import AdversarialRecipe, Recipe, check_field
from fastadv.trainers.schedules import Piecewise, Schedule

# The learning rate is .025 in epochs 1 to 10 and .02 from epoch 11; then it is halved every two epochs.
_FINE_TUNING = Piecewise((0, 10, 12, 14, 16, 18), (1.0, 0.8, 0.4, 0.2, 0.1, 0.05))

_DISTANCES_OF_LOGITS = ("logits_mse", "logits_kl")


@dataclass(frozen=True, kw_only=True)
class ArrestRecipe(AdversarialRecipe):
    """Numbers of the ARREST paper, section 5.1, and the variants of its tables 2 and 4 and figure 4.

    Attributes:
        finetune: start from the standard weights (AFT); otherwise from random weights.
        distill: keep the model close to the standard one (RGKD).
        replay: do not attack images whose features have drifted (NR).
        distance: distance that the distillation minimises. "angular" is the angular distance of features. The
            alternatives are "mse", the mean squared difference of features; "attention", the distance of attention
            maps; "logits_mse", the mean squared difference of logits, LBGAT's loss, as in table 4; and
            "logits_kl", Hinton's divergence of logits, T^2 KL(f_std(x) || f(x')).
        temperature: T of "logits_kl".
        replay_with: replacement of drifted images: "noise", a random point of the ball, or "clean", the clean
            image.
        lam: weight of the distillation, lambda; the default is meant for the angular distance.
        phi: angle in degrees beyond which features count as drifted; tau = 1 - cos(phi). The
            paper has 30, 37.5 and 45 for CIFAR-10, 30, 32.5 and 35 for CIFAR-100.
        replay_epochs: number of epochs with replay, from the start of the run.
    """

    epochs: int = 20
    lr: Number = 0.025
    schedule: Schedule = _FINE_TUNING
    finetune: bool = True
    distill: bool = True
    replay: bool = True
    distance: Literal["angular", "mse", "attention", "logits_mse", "logits_kl"] = "angular"
    temperature: Number = 4.0
    replay_with: Literal["noise", "clean"] = "noise"
    lam: Number = 50.0
    phi: Number = 30.0
    replay_epochs: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        check_field(self, "temperature", at_least=1e-3)
        check_field(self, "lam", at_least=0)
        check_field(self, "replay_epochs", at_least=0)
        if not 0 <= self.phi <= 90:
            raise ValueError(f"phi must be between 0 and 90 degrees, got {self.phi}")

    @property
    def tau(self) -> float:
        """The largest angular distance at which an image is still attacked."""
        return 1 - math.cos(math.radians(self.phi))


@dataclass(frozen=True)
class Replayed(Attacked):
    """Images after noisy replay.

    Attributes:
        teacher_features: the standard model's features of the clean images [B, C, H, W]; None
            if no part of the method needs them.
        teacher_logits: the standard model's logits [B, K]; None unless logits are distilled.
        replayed: fraction of the batch that was replayed, a scalar.
    """

    teacher_features: Tensor | None = None
    teacher_logits: Tensor | None = None
    replayed: Tensor | None = None


class Arrest(AdversarialMethod[ArrestRecipe, Replayed]):
    """ARREST: CE(f(x')) + lam * angular(h(x'), h_std(x)), with noisy replay.

    Source: Suzuki et al., "ARREST", equations 3 to 5. In the first `replay_epochs` epochs an image
    gets uniform noise of the same size instead of an attack, if its features are further than tau from the
    features of the standard model. With all parts off the method is PGD-AT with this recipe.

    Choices where the paper leaves something open: the teacher, the drift and the attack are computed in
    evaluation mode. The attack starts from uniform noise. Replayed noise is clipped to 0..1. Inputs are not
    normalised. Attention maps are taken only from the features before pooling. For logits, table 4 cites LBGAT,
    whose loss is their squared difference. The KL divergence, at temperature 4, is the most common alternative.

    Cost per batch: 2KF for the attack of the images that are not replayed, 1F of the teacher for
    both replay and distillation, 1F of the model for the drift while there is replay, 3F for
    training. Running statistics move once.
    """

    name = "arrest"
    supports = frozenset({"label_smoothing", "extra_weight"})
    recipe_class = ArrestRecipe

    @classmethod
    def teachers_needed(cls, recipe: Recipe) -> tuple[str, ...]:
        """Return the standard model, unless all three parts are off."""
        assert isinstance(recipe, ArrestRecipe)
        return ("teacher",) if recipe.finetune or recipe.distill or recipe.replay else ()

    def setup(self) -> None:
        """Build the attack and check that the models can be cut before their pooling."""
        super().setup()
        self._tap = FeatureTap()
        if self.recipe.distill or self.recipe.replay:
            check_feature_split(self.model)
            check_feature_split(self.teachers["teacher"])

    def initialise(self) -> None:
        """Start from the standard weights (AFT)."""
        if self.recipe.finetune:
            copy_weights(self.model, self.teachers["teacher"])

    def attack(self, batch: TrainBatch) -> Replayed:
        """Return PGD's images; images whose features have drifted are replaced."""
        with self.pgd.unchanged():  # the weights stay the same between the drift and the attack
            return self._attacked(batch)

    def _attacked(self, batch: TrainBatch) -> Replayed:
        replaying = self._replaying(batch.epoch)
        if not (replaying or self.recipe.distill):
            return Replayed(self.perturb(batch))
        teacher_features, teacher_logits = self._teacher_pass(batch.x)
        if not replaying:
            return Replayed(self.perturb(batch), teacher_features, teacher_logits)
        with self.runtime.phases("replay"):
            distance, drifted = replay_mask(
                self._drifting_features(batch.x), teacher_features, self.recipe.tau
            )
        images = self.perturb(batch, (~drifted).nonzero().flatten())  # the drifted ones stay clean
        if self.recipe.replay_with == "noise" and self.recipe.norm == "l2":
            images = where_images(drifted, self.random_point(batch, "replay"), images)
        elif self.recipe.replay_with == "noise":
            images = noisy_replay(
                batch.x,
                images,
                distance,
                self.recipe.tau,
                self.recipe.eps,
                seed=batch.seed("replay"),
                sample_ids=batch.ids,
            )
        return Replayed(images, teacher_features, teacher_logits, drifted.float().mean())

    def training_loss(self, batch: TrainBatch, adv: Replayed) -> LossResult:
        """Return equation 4, with the recipe's distance, or the cross-entropy alone without distillation."""
        if self.recipe.distill:
            features, logits = self.features_and_logits(adv.x)
        else:  # a network without the feature split will do
            features, logits = None, self.model(adv.x)
        metrics = {"train_adv_accuracy": accuracy(logits, batch.y)}
        if adv.replayed is not None:
            metrics["replayed"] = adv.replayed
        loss = self.cross_entropy(logits, batch.y)
        if features is None:
            return LossResult(batch.mean(loss), metrics)
        distance = self._distance(features, logits, adv)
        metrics["distance"] = distance.detach().mean()
        return LossResult(batch.mean(loss + self.recipe.lam * distance), metrics)

    def passes(self, epoch: int) -> float:
        """Return PGD-AT's cost, plus 1F for the teacher and 1F for the model if they are needed."""
        replaying = self._replaying(epoch)
        return super().passes(epoch) + (replaying or self.recipe.distill) + replaying

    def _replaying(self, epoch: int) -> bool:
        return self.recipe.replay and epoch < self.recipe.replay_epochs

    def _teacher_pass(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the standard model's features, and its logits if they are distilled."""
        teacher = cast(Any, self.teachers["teacher"])
        self.halves["teacher"] = (teacher, logits_of_halves)
        with self.runtime.phases("teacher"), torch.no_grad(), self.autocast():
            features = self.teacher_output("teacher", x, features_of)
            wanted = self.recipe.distill and self.recipe.distance in _DISTANCES_OF_LOGITS
            return features, teacher.forward_head(features) if wanted else None

    def _distance(self, features: Tensor, logits: Tensor, adv: Replayed) -> Tensor:
        """Return each image's distance from the standard model's features of the clean image, [B]."""
        recipe = self.recipe
        if recipe.distance == "logits_kl":
            assert adv.teacher_logits is not None
            return losses.kd(logits, adv.teacher_logits, recipe.temperature, reduction="none")
        if recipe.distance == "logits_mse":
            assert adv.teacher_logits is not None
            apart = at_least_float32(logits) - at_least_float32(adv.teacher_logits)
            return apart.square().mean(1)
        assert adv.teacher_features is not None
        if recipe.distance == "attention" and not are_maps(self.model, features):
            raise ValueError(
                "distance must be another than 'attention' for a model whose features are no maps [B, C, H, W], "
                f"got {type(self.model).__name__} with features of shape {tuple(features.shape)}"
            )
        return losses.feature_distance(features, adv.teacher_features, recipe.distance)

    def _drifting_features(self, x: Tensor) -> Tensor:
        """Return the model's features in evaluation mode, if possible from the engine that runs the attack."""
        self.halves["model"] = (self.model, logits_of_halves)
        if self.runtime.autocast_dtype == torch.bfloat16 and self.recipe.attack_mode == "eval":
            with self.pgd.held(x.device):
                found = self._tap.features(self.pgd.engine_for(x), self.model, x)
            if found is not None:
                return found
        with frozen(self.model), torch.no_grad(), self.autocast():
            return cast(Any, self.model).forward_features(x)
