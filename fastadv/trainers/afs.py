"""AFS: adversarial feature stacking, one linear merger over extractors of different robustness."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from fastadv.models import Stack, copy_weights
from fastadv.models.split import logits_of_halves
from fastadv.models.stack import pooled_side_by_side
from fastadv.ops import random_start
from fastadv.trainers.adversarial import AdversarialMethod
from fastadv.trainers.method import Attacked, LossResult, TrainBatch, accuracy
from fastadv.trainers.number import Number
from fastadv.trainers.recipe import AdversarialRecipe, Presets, Recipe
from fastadv.trainers.schedules import MultiStep, Schedule

_TENTH_AFTER_3 = MultiStep((3,), 0.1)
_TENTH_AFTER_2_AND_5 = MultiStep((2, 5), 0.1)


@dataclass(frozen=True, kw_only=True)
class AfsRecipe(AdversarialRecipe):
    """Numbers of the paper for the merger; the extractors are PGD-AT networks for eps 3/255 to 8/255.

    The preset "official", the authors' code (anonymous1s8f2o/afs_code), mixes clean and attacked images in a batch
    of 100 and trains for 7 epochs, with drops of the learning rate after 2 and 5. Its attack starts from
    triangular noise and is clipped to 0..1 at its end.

    Attributes:
        weight: weight of the clean images' cross-entropy, alpha in the paper. The adversarial images have the
            weight 1 - weight.
        mix: "loss" computes both terms for every image. "batch", as in the authors' code, keeps the fraction
            `weight` of each batch clean, rounded down, and attacks the other images. Its expectation is the same,
            and it costs less.
        eps_low: draw the radius of each batch's attack uniformly from eps_low to eps, with the step size in
            proportion. By default every batch has eps. The draw depends only on the seed, the epoch and the
            iteration.
        noise: the noise from which the attack starts. "uniform" is uniform in the ball, and the images stay in
            0..1 at every step. "triangular" is the difference of two uniform draws, and only the attack's result
            is clipped to 0..1, both as in the authors' code.
    """

    epochs: int = 5
    schedule: Schedule = _TENTH_AFTER_3
    weight: Number = 0.5
    mix: Literal["loss", "batch"] = "loss"
    eps_low: Number | None = None
    noise: Literal["uniform", "triangular"] = "uniform"

    presets: ClassVar[Presets] = {
        "paper": {},
        "official": {
            "epochs": 7,
            "batch_size": 100,
            "schedule": _TENTH_AFTER_2_AND_5,
            "mix": "batch",
            "noise": "triangular",
        },
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.weight <= 1:
            raise ValueError(f"weight must lie in 0..1, got {self.weight}")
        if self.eps_low is not None and not 0 < self.eps_low <= self.eps:
            raise ValueError(
                f"eps_low must be > 0 and <= eps, {self.eps:.6g}, got {self.eps_low:.6g}"
            )
        if self.noise != "uniform" and self.norm != "linf":
            raise ValueError(f"noise must be 'uniform' with norm {self.norm!r}, got {self.noise!r}")
        if self.swa_start is not None:
            raise ValueError(
                f"swa_start must be None with afs, whose extractors keep their statistics, got {self.swa_start}"
            )


class Afs(AdversarialMethod[AfsRecipe, Attacked]):
    """AFS: weight CE(z(x)) + (1 - weight) CE(z(x')), z a linear merger of frozen extractors, x' an attack on z.

    Source: Liu and Zhao 2021, equations 1 to 4; recipe of the paper. The model is a stack, such as
    "stack:6*wrn_28_10", and each of its extractors gets the weights of a trained network. They stay in evaluation
    mode. Only the merger is trained. Its weights start at random.

    Cost per batch, F being a pass of the whole stack: 2KF for the attack and 2F for the features of x and x'; with
    mix "batch" (1 - weight) 2KF and 1F. The merger's own cost is negligible. No running statistics move.
    """

    name = "afs"
    supports = frozenset({"label_smoothing", "extra_weight"})
    recipe_class = AfsRecipe
    bn_updates = 0

    @classmethod
    def teachers_for(cls, recipe: Recipe, model: nn.Module) -> dict[str, nn.Module]:
        """Return the extractors as extractor_1, extractor_2, ..."""
        if not isinstance(model, Stack):
            raise TypeError(
                f"model must be a Stack with method afs, such as 'stack:6*wrn_28_10', got {type(model).__name__}"
            )
        return {f"extractor_{i}": extractor for i, extractor in enumerate(model.extractors, 1)}

    @property
    def stack(self) -> Stack:
        """The model that is trained."""
        return cast(Stack, self.model)

    def setup(self) -> None:
        """Freeze the extractors and build the attack."""
        self.stack.extractors.requires_grad_(False)
        for number, extractor in enumerate(self.stack.extractors, 1):
            self.halves[f"extractor_{number}"] = (extractor, logits_of_halves)
        self._compiled: Callable[[Tensor], list[Tensor]] | None = None
        super().setup()
        if self._clips_late:  # no image of the ball reaches these bounds, so PGD does not clip
            self.pgd.bounds = (-self.recipe.eps, 1 + self.recipe.eps)

    @property
    def _clips_late(self) -> bool:
        return self.recipe.noise == "triangular"

    def initialise(self) -> None:
        """Give the extractors their weights."""
        for extractor, source in zip(self.stack.extractors, self.teachers.values(), strict=True):
            copy_weights(extractor, source)
            source.cpu()  # frees the memory of the device

    def compile(self, mode: str | None = None) -> None:
        """Run the extractors' pass, which is nearly the whole cost, through torch.compile."""
        super().compile(mode)
        self._compiled = torch.compile(self.stack.pooled_features, mode=mode)

    def train_mode(self) -> None:
        """Leave the extractors in evaluation mode."""
        self.model.train()
        self.stack.extractors.eval()

    def attack(self, batch: TrainBatch) -> Attacked:
        """Return PGD's images; with mix "batch" some of them are clean."""
        self.pgd.eps = self.radius_of(batch)
        if self.recipe.eps:
            self.pgd.alpha = self.recipe.alpha * (self.pgd.eps / self.recipe.eps)
        rows: Tensor | None = None
        if self.recipe.mix == "batch":
            rows = torch.tensor(
                self._attacked_places(len(batch.y)), dtype=torch.int64, device="cpu"
            )
            rows = rows.to(batch.y.device)
        x = self.perturb(batch, rows)
        return Attacked(x.clamp(0, 1) if self._clips_late else x)

    def start_of(self, batch: TrainBatch) -> Tensor | None:
        """Return the images at which the attack starts; None for PGD's own start: a random point, or the image."""
        if not (self._clips_late and self.recipe.random_start):
            return super().start_of(batch)
        seeds = (batch.seed(purpose) for purpose in ("attack", "second half of the attack's noise"))
        halves = [
            random_start(
                torch.zeros_like(batch.x),
                self.pgd.eps / 2,
                bounds=(-1.0, 1.0),
                seed=seed,
                sample_ids=batch.ids,
            )
            for seed in seeds
        ]
        return batch.x + (halves[0] + halves[1])

    def _attacked_places(self, size: int) -> list[int]:
        """The positions, in this process's part of the batch, of the images that mix "batch" attacks.

        The clean images are spread evenly over the global batch. So they do not depend on the number of processes,
        and all processes have nearly the same number. Their total number is rounded down, as in the authors' code.
        """
        weight, first = self.recipe.weight, self.runtime.ranks.rank * size
        return [
            i for i in range(size) if int(weight * (first + i + 1)) == int(weight * (first + i))
        ]

    def radius_of(self, batch: TrainBatch) -> float:
        """Return the radius of a batch's attack, the same in all processes."""
        low, high = self.recipe.eps_low, self.recipe.eps
        if low is None:
            return high
        return low + (high - low) * (batch.seed("eps") / 2**63)

    def training_loss(self, batch: TrainBatch, adv: Attacked) -> LossResult:
        """Return the weighted cross-entropies, with gradients to the merger alone."""
        adv_logits = self._logits(adv.x)
        loss = batch.mean(self.cross_entropy(adv_logits, batch.y))
        if self.recipe.mix == "batch":
            return LossResult(loss, {"train_accuracy": accuracy(adv_logits, batch.y)})
        clean_logits = self._logits(batch.x)
        clean_loss = batch.mean(self.cross_entropy(clean_logits, batch.y))
        metrics = {
            "train_accuracy": accuracy(clean_logits, batch.y),
            "train_adv_accuracy": accuracy(adv_logits, batch.y),
        }
        return LossResult(torch.lerp(loss, clean_loss, self.recipe.weight), metrics)

    def _logits(self, x: Tensor) -> Tensor:
        stack = self.stack
        if self._compiled is not None:
            with torch.no_grad():
                parts = self._compiled(x)
            return stack.merge(parts)
        pooled = self.frozen_output("extractors", stack.extractors, x, pooled_side_by_side)
        return stack.merge(pooled.split(stack.widths, 1))

    def passes(self, epoch: int) -> float:
        """Return the cost of the attack on the attacked images, and the cost of the features."""
        both = self.recipe.mix == "loss"
        attacked = 1 if both else 1 - self.recipe.weight
        features = (2 if both else 1) * (1 + self.perturbs_weights(epoch))
        return attacked * 2 * self.recipe.steps + features
