"""Whether gradients lead anywhere at the points at which an attack gave up."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastadv.evaluation.attack_list import BallAttack
from fastadv.evaluation.context import Model, private_generators
from fastadv.seeding import derive_seed

BLIND_SHARE = 0.1  # share of useless gradients above which figures are in doubt
_CHECKED = 256  # images at most, spread evenly


@dataclass(frozen=True)
class LastPoints:
    """Looks at the gradients of images that withstood an attack, at the attack's last points.

    Attributes:
        model: the model whose gradient the attack followed.
        by_entropy: whether it followed the cross-entropy; else it followed the margin.
        seed: seed of the evaluation, for models that draw random numbers.
        every: only images whose index is a multiple of it are looked at.
    """

    model: Model
    by_entropy: bool
    seed: int
    every: int

    @classmethod
    def of(cls, attack: BallAttack | None, model: Model, seed: int, n: int) -> LastPoints | None:
        """For an attack on n images; None where it follows no gradients, or only the gradients of the images.

        The gradients of the images themselves are checked before the first attack.
        """
        moves = attack is not None and (attack.steps > 1 or attack.random_start)
        if attack is None or not attack.follows_gradients or not moves:
            return None
        return cls(model, follows_entropy(attack), seed, max(1, math.ceil(n / _CHECKED)))

    def count(self, adv: Tensor, y: Tensor, right: Tensor, indices: Tensor) -> tuple[int, int]:
        """The number of images with a useless gradient, and the number of images that were looked at.

        Args:
            adv: the last points [B, ...].
            y: labels [B].
            right: [B] bool, the images that withstood the attack.
            indices: [B] int64 on the CPU, the indices of the images in the data.
        """
        rows = (right.cpu() & (indices % self.every == 0)).nonzero().flatten().to(adv.device)
        if len(rows) == 0:
            return 0, 0
        x, y = adv[rows].clone().requires_grad_(True), y[rows]
        seed = derive_seed(self.seed, "evaluate/last points", int(indices[0]))
        with private_generators(seed), torch.enable_grad():
            logits = self.model(x)
            if not logits.requires_grad:  # attacks refuse such a model themselves
                return 0, 0
            value = (entropy_sum if self.by_entropy else margin_sum)(logits.float(), y)
            (gradient,) = torch.autograd.grad(value, x)
        return count_useless_gradients(gradient), len(rows)


def note_of_last_points(blind: int, followed: int) -> str:
    """The note for an attack's row, from the counts of `LastPoints`; empty where there is no doubt."""
    if blind <= BLIND_SHARE * followed:
        return ""
    return (
        f"at the attack's last points, the gradient of {blind} of {followed} images that withstood it is zero "
        "everywhere or not finite: the attack could go no further, and finds too little; run square, too, or "
        "autoattack"
    )


def follows_entropy(attack: BallAttack) -> bool:
    """Whether an attack follows the cross-entropy; all other losses are differences of logits."""
    return attack.loss == "ce" and not attack.kind.startswith("fab")


def entropy_sum(logits: Tensor, y: Tensor) -> Tensor:
    """The sum of the cross-entropies of logits [B, C] and labels [B]."""
    return torch.nn.functional.cross_entropy(logits, y, reduction="sum")


def margin_sum(logits: Tensor, y: Tensor) -> Tensor:
    """The sum of the margins: the label's logit less the largest other logit."""
    label = logits.gather(1, y.view(-1, 1))
    others = logits.scatter(1, y.view(-1, 1), -torch.inf)
    return (label - others.amax(1, keepdim=True)).sum()


def count_useless_gradients(gradient: Tensor) -> int:
    """The number of images whose gradient [B, ...] is zero everywhere or not finite somewhere."""
    flat = gradient.flatten(1)
    return int(((flat == 0).all(1) | ~flat.isfinite().all(1)).sum())
