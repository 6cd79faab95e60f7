"""TLA: adversarial training with a triplet loss on features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fastadv.losses.common import at_least_float32
from fastadv.models import check_feature_split
from fastadv.ops.philox import philox
from fastadv.trainers.adversarial import AdversarialMethod
from fastadv.trainers.halves import are_maps
from fastadv.trainers.method import Attacked, LossResult, TrainBatch
from fastadv.trainers.number import Number
from fastadv.trainers.pair import pair_metrics
from fastadv.trainers.recipe import AdversarialRecipe, Presets, check_field
from fastadv.trainers.schedules import MultiStep, Schedule

# After 50,000 and 60,000 of 80,000 steps of 50 images.
_TENTH_AFTER_50_AND_60 = MultiStep((50, 60), 0.1)


@dataclass(frozen=True, kw_only=True)
class TlaRecipe(AdversarialRecipe):
    """Numbers of the authors' code for training on CIFAR-10 from scratch; both presets have them.

    With "official" images are padded by 2 pixels, and the weights and biases of BatchNorm do not decay, as in that
    code. `Tla` states the remaining differences.

    Attributes:
        weight: weight of each triplet's loss, lambda_1; 2 for CIFAR-10.
        margin: alpha, the margin by which an adversarial image must be nearer to the positive than to the
            negative.
        norm_weight: weight of the mean square of the features inside a triplet's loss, lambda_2.
        positives: the clean images that are positives: "own", the clean version of the attacked image; "class",
            another image of its class; or "both", as two triplets.
    """

    epochs: int = 80
    batch_size: int = 50
    schedule: Schedule = _TENTH_AFTER_50_AND_60
    weight_decay: Number = 2e-4
    steps: int = 7
    weight: Number = 2.0
    margin: Number = 0.03
    norm_weight: Number = 1e-3
    positives: Literal["both", "own", "class"] = "both"

    presets: ClassVar[Presets] = {"paper": {}, "official": {"pad": 2, "norm_decay": False}}

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("weight", "margin", "norm_weight"):
            check_field(self, name, at_least=0)


class Tla(AdversarialMethod[TlaRecipe, Attacked]):
    """TLA: CE(f(x')) + 2 (max(0, D(a, p) - D(a, n) + margin) + norm_weight |(a, p, n)|^2 / d) for each triplet.

    a, p and n are pooled features of x', of a clean image of its class and of the clean image of another class
    that is nearest to x'; d is their length, and D(u, v) = 1 - |cos(u, v)|.

    Source: Mao et al. 2019, equations 1 to 4; triplets, numbers and the norm's form as in the authors' code
    (columbia/Metric_Learning_Adversarial_Robustness). That code searches the negative among ten further batches,
    in evaluation mode, and draws the second positive from all images. Here both come from the same batch. Each
    process searches its own part, by the features of the training pass. An image has no triplet if its part of the
    batch has no other class. An image that is alone in its class is its own second positive.

    Cost per batch: 2KF for the attack, 6F for training. Running statistics move twice, first by the clean images.
    """

    name = "tla"
    takes_soft_labels = False
    supports = frozenset({"label_smoothing", "extra_weight"})
    recipe_class = TlaRecipe
    bn_updates = 2
    images_trained = 2

    def setup(self) -> None:
        """Build the attack and check that the model can be cut before its pooling."""
        super().setup()
        check_feature_split(self.model)

    def attack(self, batch: TrainBatch) -> Attacked:
        """Return PGD's images."""
        return Attacked(self.perturb(batch))

    def training_loss(self, batch: TrainBatch, adv: Attacked) -> LossResult:
        """Return the cross-entropy of the attacked images and the triplet losses."""
        clean_maps, clean_logits = self.features_and_logits(batch.x)
        adv_maps, adv_logits = self.features_and_logits(adv.x)
        clean, anchors = _pooled(self.model, clean_maps), _pooled(self.model, adv_maps)
        triplets = torch.zeros_like(anchors[:, 0])
        negatives, found = nearest_of_other_classes(anchors, clean, batch.y)
        for positives in self._positives(clean, batch):
            triplets = triplets + self._triplet(anchors, positives, clean[negatives])
        triplets = torch.where(found, triplets, 0.0)
        loss = self.cross_entropy(adv_logits, batch.y) + self.recipe.weight * triplets
        metrics = pair_metrics(clean_logits, adv_logits, batch.y)
        return LossResult(batch.mean(loss), {**metrics, "triplet": triplets.detach().mean()})

    def _positives(self, clean: Tensor, batch: TrainBatch) -> list[Tensor]:
        kind = self.recipe.positives
        chosen = [clean] if kind in ("own", "both") else []
        if kind in ("class", "both"):
            chosen.append(clean[partners(batch.y, batch.ids, batch.seed("positives"))])
        return chosen

    def _triplet(self, a: Tensor, p: Tensor, n: Tensor) -> Tensor:
        """Return the loss of each triplet of features [B, d], [B]."""
        recipe = self.recipe
        hinge = (_distance(a, p) - _distance(a, n) + recipe.margin).clamp_min(0)
        return hinge + recipe.norm_weight * (a.square() + p.square() + n.square()).mean(1)


def _pooled(model: Any, features: Tensor) -> Tensor:
    """Return the vectors [B, d] that the model pools from its features."""
    if are_maps(model, features):
        return at_least_float32(features).flatten(2).mean(2)
    try:  # of tokens, or maps whose channels come last, only the model knows the pooling
        pooled = model.forward_head(features, pre_logits=True)
    except TypeError as error:
        raise TypeError(
            f"model must have forward_head(features, pre_logits=True) for tla where its features are no maps "
            f"[B, C, H, W], got {type(model).__name__} with features of shape {tuple(features.shape)}"
        ) from error
    return at_least_float32(pooled)


def _distance(u: Tensor, v: Tensor) -> Tensor:
    return 1 - F.cosine_similarity(u, v).abs()


@torch.no_grad()
def nearest_of_other_classes(anchors: Tensor, clean: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Find, for each anchor, the clean image of another class whose features have the largest cosine with it.

    Args:
        anchors: features [B, d].
        clean: features of the clean images [B, d].
        y: labels of anchors and clean images [B].

    Returns:
        Indices [B], int64, and whether there is any image of another class [B], bool.
    """
    cosines = F.normalize(anchors, dim=1) @ F.normalize(clean, dim=1).T
    other = y[:, None] != y
    return cosines.masked_fill(~other, -2.0).argmax(1), other.any(1)


@torch.no_grad()
def partners(y: Tensor, ids: Tensor, seed: int) -> Tensor:
    """Draw, for each image of a batch, another image of its class; the image itself if there is no other.

    Each image gets a random number that depends only on the seed and its id. Its partner is the image of its
    class with the next larger number; after the largest number comes the smallest.

    Args:
        y: labels [B].
        ids: numbers of the images [B].
        seed: seed of the random numbers.

    Returns:
        Indices [B], int64.
    """
    keys = philox(seed, ids, 1)[:, 0]
    ahead = (keys - keys[:, None]) % 2**32
    same = y[:, None] == y
    itself = torch.eye(len(y), dtype=torch.bool, device=y.device)
    ahead = ahead.masked_fill(itself, 2**32).masked_fill(~same, 2**33)
    return ahead.argmin(1)
