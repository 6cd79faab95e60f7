"""RST: robust self-training on pseudo-labelled images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fastadv.trainers.method import Attacked, TrainBatch
from fastadv.trainers.number import Number
from fastadv.trainers.recipe import Presets
from fastadv.trainers.schedules import Cosine, EpochCosine, Schedule
from fastadv.trainers.trades import Trades, TradesRecipe

_COSINE, _EPOCH_COSINE = Cosine(), EpochCosine()


@dataclass(frozen=True, kw_only=True)
class RstRecipe(TradesRecipe):
    """Numbers of the authors' code for CIFAR-10 with 500,000 pseudo-labelled images; both presets have them.

    The cosine falls with each iteration. With "official" it falls with each epoch, as in the code.

    Attributes:
        extra_fraction: fraction of each batch that is drawn from the pseudo-labelled images.
    """

    epochs: int = 200
    batch_size: int = 256
    schedule: Schedule = _COSINE
    nesterov: bool = True
    weight_decay: Number = 5e-4
    extra_fraction: Number = 0.5

    presets: ClassVar[Presets] = {"paper": {}, "official": {"schedule": _EPOCH_COSINE}}


class Rst(Trades):
    """RST: CE(f(x)) + 6 KL(f(x) || f(x')), TRADES, on batches in which one half has pseudo-labels.

    Source: Carmon et al. 2019, equations 5 and 6 with adversarial training; recipe as in the authors' code
    (yaircarmon/semisup-adv). `--extra FILE` gives the images. It reads the published file
    ti_500K_pseudo_labeled.pickle. The number of iterations in an epoch is the same as without these images. The
    order of passes is as in that code: f(x'), then f(x).

    Cost per batch: 2KF and 1F for the attack, 6F for training. Running statistics move twice, first by the
    adversarial images.
    """

    name = "rst"
    supports = frozenset({"extra_weight"})
    recipe_class = RstRecipe

    def logits(self, batch: TrainBatch, adv: Attacked) -> tuple[Tensor, Tensor]:
        """Return the trained model's logits of the clean and of the adversarial images, [B, C] each."""
        adv_logits = self.model(adv.x)
        return self.model(batch.x), adv_logits
