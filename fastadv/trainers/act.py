"""ACT: adversarial concurrent training of a robust and a natural model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from fastadv import losses
from fastadv.trainers.method import Attacked, LossResult, TrainBatch
from fastadv.trainers.natural import NaturalMethod, NaturalRecipe
from fastadv.trainers.number import Number
from fastadv.trainers.pair import pair_metrics
from fastadv.trainers.recipe import Presets, check_field
from fastadv.trainers.schedules import MultiStep, Schedule

_FIFTH_AFTER_60_120_AND_150 = MultiStep((60, 120, 150), 0.2)
# The script counts epochs from 1: the 60th epoch already runs at a fifth.
_FIFTH_AT_60_120_AND_160 = MultiStep((59, 119, 159), 0.2)


@dataclass(frozen=True, kw_only=True)
class ActRecipe(NaturalRecipe):
    """Numbers of the paper for CIFAR.

    The preset "official", the authors' code (NeurAI-Lab/ACT), differs in the temperature, 4, in the attack, whose
    divergence is a sum, and in the drops of the learning rate. There they come with the 60th, 120th and 160th
    epoch. The paper's drops are read as after the 60th, 120th and 150th.

    The preset "imagenet" has the paper's numbers for ImageNet, and the authors' script supplies the others. Its
    batch size is per process. With the script's step size, 1, each step ends in a corner of the ball. Here the
    step size is a quarter of eps.

    Attributes:
        weight: weight of each model's divergence from the other model, alpha in the paper.
        temperature: temperature of the divergences in training; 4 in the authors' code.
        attack_divergence: the second term of the attack's loss, besides (1 - weight) CE. "mean" is weight KL.
            "sum" is weight B KL as in the authors' code, where the attack depends on the batch size B.
    """

    epochs: int = 200
    schedule: Schedule = _FIFTH_AFTER_60_120_AND_150
    pad_mode: Literal["constant", "reflect"] = "reflect"
    weight: Number = 0.9
    temperature: Number = 1.0
    attack_divergence: Literal["mean", "sum"] = "mean"

    presets: ClassVar[Presets] = {
        "paper": {},
        "official": {
            "temperature": 4.0,
            "attack_divergence": "sum",
            "schedule": _FIFTH_AT_60_120_AND_160,
        },
        "imagenet": {
            "epochs": 100,
            "batch_size": 64,
            "schedule": MultiStep((30, 60, 90), 0.1),
            "weight_decay": 1e-5,
            "weight": 0.5,
            "temperature": 4.0,
            "attack_divergence": "sum",
            "eps": 2 / 255,
            "alpha": 0.5 / 255,
            "pad": 0,
        },
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.weight <= 1:
            raise ValueError(f"weight must lie in 0..1, got {self.weight}")
        check_field(self, "temperature", at_least=1e-3)


@dataclass(frozen=True)
class AttackedWithNaturalLogits(Attacked):
    """Adversarial images, with the result of the natural model's training pass.

    Attributes:
        natural_logits: F(x) [B, C], with gradient.
    """

    natural_logits: Tensor


class Act(NaturalMethod[ActRecipe]):
    """ACT: L_G = (1 - a) CE(G(x')) + a KL(F(x) || G(x')) and L_F = (1 - a) CE(F(x)) + a KL(G(x') || F(x)).

    Source: Arani et al. 2020, algorithm 1. The robust model G sees adversarial images, which maximise L_G. The
    natural model F sees clean images. In each divergence the second model teaches the first, and gets no gradient
    itself. Each model has its own optimiser, and both are updated together. G is evaluated. During the attack G
    is in evaluation mode. The attack uses the logits of F's single training pass, as in the authors' code.

    Cost per batch: 2KF for the attack, 6F for training. Running statistics of each model move once.
    """

    name = "act"
    supports = frozenset({"extra_weight"})
    recipe_class = ActRecipe
    bn_updates = 1
    images_trained = 1

    def setup(self) -> None:
        """Build the natural model and the attack on L_G."""
        self._natural_logits: Tensor | None = None
        self.attack_loss = self._attack_objective
        super().setup()

    def _attack_objective(self, logits: Tensor, y: Tensor) -> Tensor:
        """L_G of each image, [B], with the recipe's weight of the divergence."""
        assert self._natural_logits is not None
        weight, natural = self.recipe.weight, self._natural_logits
        images = len(y) * self.runtime.ranks.world_size
        factor = images if self.recipe.attack_divergence == "sum" else 1
        divergence = losses.kl(natural, logits, reduction="none")
        hard = losses.cross_entropy(logits, y, reduction="none")
        return (1 - weight) * hard + weight * factor * divergence

    def attack(self, batch: TrainBatch) -> AttackedWithNaturalLogits:
        """Return PGD's images against L_G."""
        with self.runtime.phases("train"), self.autocast():
            natural_logits = self.natural(batch.x)
        self._natural_logits = natural_logits.detach()
        try:
            return AttackedWithNaturalLogits(self.perturb(batch), natural_logits)
        finally:
            self._natural_logits = None

    def objective(self, clean_logits: Tensor, adv_logits: Tensor, y: Tensor) -> Tensor:
        """Return L_G + L_F. Each term has a gradient only in its own model."""
        recipe = self.recipe
        pair = losses.act(
            adv_logits, clean_logits, y, recipe.weight, recipe.temperature, reduction="none"
        )
        return pair.robust + pair.natural

    def training_loss(self, batch: TrainBatch, adv: Attacked) -> LossResult:
        """Return the objective of the robust model's pass over x' and the natural model's over x."""
        assert isinstance(adv, AttackedWithNaturalLogits)
        robust_logits = self.model(adv.x)
        loss = batch.mean(self.objective(adv.natural_logits, robust_logits, batch.y))
        return LossResult(loss, pair_metrics(adv.natural_logits, robust_logits, batch.y))

    def passes(self, epoch: int) -> float:
        """Return the robust model's cost and 3F for the natural model, whose pass AWP does not repeat."""
        return super().passes(epoch) + 3
