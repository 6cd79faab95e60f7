"""GradAlign: one step, with gradients kept parallel over the ball."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fastadv.losses.common import at_least_float32
from fastadv.trainers.method import Attacked, LossResult, TrainBatch
from fastadv.trainers.number import Number
from fastadv.trainers.pgd_at import PGDAT
from fastadv.trainers.recipe import ONE_STEP_IN_L2, AdversarialRecipe, Presets, check_field
from fastadv.trainers.schedules import Cyclic, Schedule

_TRIANGLE = Cyclic(0.4)


@dataclass(frozen=True, kw_only=True)
class GradAlignRecipe(AdversarialRecipe):
    """Numbers of the authors' code for CIFAR-10 at eps 8/255; both presets have them.

    With "official" the model is attacked in training mode, as in that code. There the attack and the regulariser
    share a pass over x, so running statistics move three times as well, but in the order x, x', x + u.

    Attributes:
        alpha: size of the step; 1.25 eps in the code. Set it together with eps.
        lam: weight of the regulariser, lambda.
        compile: must be false: torch.compile does not differentiate twice.
    """

    epochs: int = 30
    lr: Number = 0.3
    schedule: Schedule = _TRIANGLE
    alpha: Number = 10 / 255
    steps: int = 1
    random_start: bool = False
    lam: Number = 0.2

    presets: ClassVar[Presets] = {"paper": {}, "official": {"attack_mode": "train"}}
    l2_numbers: ClassVar[Mapping[str, Any]] = ONE_STEP_IN_L2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_field(self, "lam", at_least=0)
        if self.compile:
            raise ValueError("compile must be false with grad_align, which differentiates twice")


class GradAlign(PGDAT[GradAlignRecipe]):
    """GradAlign: CE(f(x')) + .2 (1 - cos(g(x), g(x + u))), g the input gradient of CE, u uniform in the ball.

    x' is one step from the image itself, clipped to the ball and to 0..1. x + u is not clipped. The mean of the
    cosine leaves out images with a gradient of 0.

    Source: Andriushchenko and Flammarion 2020, equation 5; recipe as in the authors' code
    (tml-epfl/understanding-fast-adv-training), in which no gradient flows through g(x). Both gradients of the
    regulariser use training mode.

    Cost per batch: 2F for the attack, 3F for training, about 8F for the regulariser. Running statistics move three
    times: by x', x and x + u.
    """

    name = "grad_align"
    supports = frozenset({"label_smoothing", "extra_weight"})
    recipe_class = GradAlignRecipe
    bn_updates = 3
    differentiates_twice = True

    def training_loss(self, batch: TrainBatch, adv: Attacked) -> LossResult:
        """Return the cross-entropy of the attacked images and the regulariser."""
        result = super().training_loss(batch, adv)
        near = self.random_point(batch, "alignment", clip=False)
        here = self._input_gradient(batch.x, batch.y, keep=False)
        there = self._input_gradient(near, batch.y, keep=True)
        present = (here != 0).any(1) & (there.detach() != 0).any(1)
        # A gradient of 0 has no direction, and the derivative of its norm is not finite.
        safe = torch.where(present[:, None], there, 1.0)
        cosines = F.cosine_similarity(here, safe, dim=1, eps=0.0)
        apart = torch.where(present, 1 - cosines, 0.0)
        ranks = self.runtime.ranks
        # The mean is over the images of the global batch that have both gradients.
        among = ranks.sum(present.sum().float()).clamp_min(1) / ranks.world_size
        gap = batch.mean(apart) * len(present) / among
        metrics = {**result.metrics, "misalignment": gap.detach()}
        return LossResult(result.loss + self.recipe.lam * gap, metrics)

    def _input_gradient(self, x: Tensor, y: Tensor, keep: bool) -> Tensor:
        """Return the gradient of each image's cross-entropy [B, n]; with ``keep`` it can be differentiated."""
        leaf = x.detach().clone().requires_grad_()
        loss = F.cross_entropy(at_least_float32(self.model(leaf)), y, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=keep)
        return gradient.flatten(1)

    def passes(self, epoch: int) -> float:
        """Return the cost of attack and training, and 8F for the regulariser, twice with AWP."""
        return super().passes(epoch) + 8 * (1 + self.perturbs_weights(epoch))
