"""DM-AT: TRADES on images of a diffusion model, with an average of the weights and smoothed labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fastadv import losses
from fastadv.trainers.method import TrainBatch
from fastadv.trainers.number import Number
from fastadv.trainers.pair import PairMethod
from fastadv.trainers.recipe import Presets
from fastadv.trainers.schedules import EpochOneCycle, OneCycle, Schedule
from fastadv.trainers.trades import Trades, TradesRecipe

_ONE_CYCLE = OneCycle(peak=0.025, base_momentum=0.85, max_momentum=0.95)
_EPOCH_ONE_CYCLE = EpochOneCycle(peak=0.025, base_momentum=0.85, max_momentum=0.95)


@dataclass(frozen=True, kw_only=True)
class DmAtRecipe(TradesRecipe):
    """Numbers of the authors' code for WRN-28-10 on CIFAR-10 with a million generated images.

    With "official" the attack normalises by the statistics of its batch, BatchNorm's weights and biases do not
    decay, and the learning rate changes with each epoch, as in that code. `DmAt` states the remaining differences.

    Attributes:
        extra_fraction: fraction of each batch that is drawn from the generated images.
        ema_decay: decay of the moving average of the weights, tau.
    """

    epochs: int = 400
    batch_size: int = 512
    lr: Number = 0.2
    schedule: Schedule = _ONE_CYCLE
    nesterov: bool = True
    weight_decay: Number = 5e-4
    eps: Number = 8 / 255
    alpha: Number = 2 / 255
    beta: Number = 5.0
    label_smoothing: Number = 0.1
    ema_decay: Number | None = 0.995
    extra_fraction: Number = 0.7

    presets: ClassVar[Presets] = {
        "paper": {},
        "official": {
            "attack_mode": "train",
            "norm_decay": False,
            "schedule": _EPOCH_ONE_CYCLE,
        },
    }


class DmAt(Trades):
    """DM-AT: CE(f(x)) with smoothed labels + 5 KL(f(x) || f(x')); an average of the weights is evaluated.

    Source: Wang et al. 2023, on the recipe of Rebuffi et al. 2021; numbers as in the authors' code
    (wzekai99/DM-Improves-AT). `--extra FILE.npz` gives the generated images and their labels. The attack starts
    from a uniform point of the ball, in l2 from the Gaussian noise of TRADES. Differences: in that code the model
    has SiLU instead of ReLU, BatchNorm's momentum is 1 in the first step and then .01, the average begins after
    .025 of the run, and it takes BatchNorm's running statistics from the model. Here these are averaged as well.
    That code trains without the first 1,024 training images. They choose the checkpoint, by PGD-40 on the margin
    of the logits. `--holdout 1024 --monitor_images 1024 --monitor_steps 40` is the nearest option here, with the
    cross-entropy in place of the margin.

    Cost per batch: 2KF and 1F for the attack, 6F for training. Running statistics move twice.
    """

    name = "dm_at"
    takes_soft_labels = False
    supports = frozenset({"label_smoothing", "extra_weight"})
    recipe_class = DmAtRecipe

    def start_of(self, batch: TrainBatch) -> Tensor | None:
        """Return the images at which the attack starts; None for PGD's own start: a random point, or the image."""
        if self.recipe.norm == "l2":
            return super().start_of(batch)
        return super(PairMethod, self).start_of(batch)

    def objective(self, clean_logits: Tensor, adv_logits: Tensor, y: Tensor) -> Tensor:
        """Return TRADES' loss with smoothed labels."""
        apart = losses.kl(clean_logits, adv_logits, reduction="none")
        return self.cross_entropy(clean_logits, y) + self.recipe.beta * apart
