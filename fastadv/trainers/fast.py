"""FGSM-RS, "fast" adversarial training: one step from a random start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from fastadv.trainers.number import Number
from fastadv.trainers.pgd_at import PGDAT
from fastadv.trainers.recipe import ONE_STEP_IN_L2, AdversarialRecipe, Presets
from fastadv.trainers.schedules import Cyclic, Interpolated, Schedule

_TRIANGLE = Cyclic(0.5, base_momentum=0.8, max_momentum=0.9)


@dataclass(frozen=True, kw_only=True)
class FastRecipe(AdversarialRecipe):
    """Numbers of the paper for CIFAR-10: 15 epochs of one triangle of the learning rate, a step of 1.25 eps.

    The top of the triangle is in the middle of the run. The momentum falls from .9 to .8 towards it, as in the
    authors' code (locuslab/fast_adversarial). Set the step, which must be below 2 eps, together with eps. "paper"
    and "official" have these numbers. With "official" the model is attacked in training mode, as in that code, so
    running statistics move twice per batch.

    The preset "imagenet" has the numbers of that code for ImageNet with eps 4/255, and its learning rates in every
    epoch. That code uses 128, 224 and 288 pixels in turn, with batches of 512, 224 and 128. Here a run has one
    image size and the first batch size. BatchNorm's weights and biases do not decay, as in that code. That code
    normalises the images. Here a normalisation is part of the model.
    """

    epochs: int = 15
    lr: Number = 0.2
    schedule: Schedule = _TRIANGLE
    alpha: Number = 10 / 255
    steps: int = 1

    presets: ClassVar[Presets] = {
        "paper": {},
        "official": {"attack_mode": "moving"},
        "imagenet": {
            "lr": 0.4,
            "batch_size": 512,
            "schedule": Interpolated((0, 1, 6, 12, 15), (0.0, 1.0, 0.1, 0.01, 0.001)),
            "weight_decay": 1e-4,
            "norm_decay": False,
            "eps": 4 / 255,
            "alpha": 5 / 255,
            "pad": 0,
        },
    }
    l2_numbers: ClassVar[Mapping[str, Any]] = ONE_STEP_IN_L2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm == "linf" and self.alpha >= 2 * self.eps > 0:
            raise ValueError(
                f"alpha must be below 2 eps, {2 * self.eps:g}, from where on every random start leads to the same "
                f"corner of the ball, got {self.alpha:g}; the paper has 1.25 eps, {1.25 * self.eps:g}"
            )


class Fast(PGDAT[FastRecipe]):
    """FGSM-RS: cross-entropy of images one step of 1.25 eps from a uniform random start.

    Source: Wong et al. 2020, algorithm 3. It can fall into catastrophic overfitting, in which the accuracy under
    PGD drops to 0 within an epoch: watch the monitored accuracy.

    Cost per batch: 2F for the attack, 3F for training. Running statistics move once.
    """

    name = "fast"
    recipe_class = FastRecipe
