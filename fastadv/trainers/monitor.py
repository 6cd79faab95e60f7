"""Validation during a run: the clean accuracy and the accuracy under PGD."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastadv.attacks import PGD
from fastadv.data import ImageData, Loader
from fastadv.engine.frozen import frozen
from fastadv.models import check_feature_split
from fastadv.models.split import logits_of_halves
from fastadv.ops import angular_distance
from fastadv.ranks import Ranks
from fastadv.seeding import derive_seed
from fastadv.trainers.halves import check_halves
from fastadv.trainers.method import Runtime
from fastadv.trainers.recipe import AdversarialRecipe, Recipe

_SINGLE_PROCESS = Ranks()


@dataclass(frozen=True)
class Validation:
    """The result of one validation.

    Attributes:
        clean: accuracy on the clean images, 0..1.
        robust: accuracy under PGD, 0..1; None for methods without an eps.
        drift: mean angular distance of the features from the teacher's features, on the clean
            images; None without a teacher whose features are comparable.
    """

    clean: float
    robust: float | None
    drift: float | None = None

    @property
    def score(self) -> float:
        """The score that chooses the best checkpoint: the robust accuracy if there is one."""
        return self.clean if self.robust is None else self.robust

    def numbers(self) -> dict[str, float]:
        """Return the measured numbers by their names in the records."""
        numbers = {
            "clean_accuracy": self.clean,
            "robust_accuracy": self.robust,
            "drift": self.drift,
        }
        return {name: value for name, value in numbers.items() if value is not None}


class Monitor:
    """Measures a model on the same images and with the same noise every time.

    Args:
        model: the model to validate; each validation uses its current weights.
        data: the images.
        recipe: the recipe, for eps, the number of steps, batch size and seed.
        runtime: device and precision.
        teacher: the frozen model with whose features the features of the model are compared, if there is one.
        ranks: the processes that share the work; all get the same result.
    """

    def __init__(
        self,
        model: nn.Module,
        data: ImageData,
        recipe: Recipe,
        runtime: Runtime,
        teacher: nn.Module | None = None,
        ranks: Ranks = _SINGLE_PROCESS,
    ) -> None:
        self._model = model
        self._runtime = runtime
        self._ranks = ranks
        self._seed = derive_seed(recipe.seed, "monitor")
        self._loader = Loader(
            data,
            min(recipe.batch_size, len(data)),
            train=False,
            device=runtime.device,
            channels_last=recipe.channels_last,
            rank=ranks.rank,
            world_size=ranks.world_size,
        )
        self._teacher: nn.Module | None = None
        if teacher is not None and _are_comparable(model, teacher, data, runtime.device):
            self._teacher = teacher
        self._attack: PGD | None = None
        if isinstance(recipe, AdversarialRecipe) and recipe.monitor_steps > 0:
            self._attack = PGD(
                model,
                recipe.eps,
                # Methods with one step train with steps of eps and more, which are too long for several steps.
                min(recipe.alpha, recipe.eps / 4),
                recipe.monitor_steps,
                norm=recipe.norm,
                precision=recipe.attack_precision,
                engine=recipe.attack_engine,
                check_inputs=False,
            )

    @property
    def images(self) -> int:
        """The number of images for validation."""
        return len(self._loader.data)

    def validate(self) -> Validation:
        """Measure the model with its current weights."""
        device = self._runtime.device
        clean, robust, drift = (
            torch.zeros((), device=device, dtype=torch.float64) for _ in range(3)
        )
        for batch in self._loader.epoch(0):
            clean += self._correct(batch.x, batch.y)
            if self._teacher is not None:
                drift += _distances(self._model, self._teacher, batch.x).sum()
            if self._attack is not None:
                x = self._attack(batch.x, batch.y, seed=self._seed, sample_ids=batch.ids)
                robust += self._correct(x, batch.y)
        sums = self._ranks.sum(torch.stack((clean, robust, drift)))
        means = (sums / self.images).tolist()
        return Validation(
            means[0],
            means[1] if self._attack else None,
            means[2] if self._teacher else None,
        )

    def _correct(self, x: Tensor, y: Tensor) -> Tensor:
        """The number of images that are classified correctly, a scalar tensor."""
        with frozen(self._model), torch.no_grad():
            return (self._model(x).argmax(1) == y).sum()


def _distances(model: nn.Module, teacher: nn.Module, x: Tensor) -> Tensor:
    """Return the angular distances of a model's features from a teacher's, [B]."""
    with frozen(model), torch.no_grad():
        features = cast(Any, model).forward_features(x)
        taught = cast(Any, teacher).forward_features(x)
        return angular_distance(features, taught)


def _are_comparable(
    model: nn.Module, teacher: nn.Module, data: ImageData, device: torch.device
) -> bool:
    """Whether both models can be cut before their pooling, and have features of the same shape."""
    try:
        check_feature_split(model)
        check_feature_split(teacher)
        x = data.images[:2].to(device).float() / 255
        _distances(model, teacher, x)
        check_halves(
            "the drift",
            {"model": (model, logits_of_halves), "teacher": (teacher, logits_of_halves)},
            x,
        )
    except (TypeError, ValueError):
        return False
    return True
