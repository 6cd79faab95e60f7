"""Free adversarial training: attack and training share their backward passes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastadv.ops import pgd_step
from fastadv.ops.values import check_radius
from fastadv.trainers.method import Attacked, TrainBatch, Update
from fastadv.trainers.number import Number
from fastadv.trainers.pgd_at import PGDAT
from fastadv.trainers.recipe import AdversarialRecipe, Presets
from fastadv.trainers.schedules import MultiStep, Schedule

# After 40,000 and 60,000 of 80,000 updates, at 8 updates for each of 390 batches per epoch: inside the 13th and
# the 20th epoch.
_UPDATES_PER_EPOCH = 8 * 390
_TENTH_AFTER_40000_AND_60000 = MultiStep(
    (40_000 / _UPDATES_PER_EPOCH, 60_000 / _UPDATES_PER_EPOCH), 0.1
)


@dataclass(frozen=True, kw_only=True)
class FreeRecipe(AdversarialRecipe):
    """Numbers of the authors' code for CIFAR-10, in which m is 8; "paper" and "official" have them.

    With "official" images are padded by 2 pixels, and the weights and biases of BatchNorm do not decay, as in that
    code. That code ends after 80,000 updates, inside the 26th epoch. Here a run has whole epochs: 81,120 updates.

    The preset "imagenet" has the numbers of their code for ImageNet (mahyarnajibi/FreeAdversarialTraining), in
    which m is 4 and eps 4/255: 90 epochs and drops every 30, each divided by m and rounded up. That code
    normalises the images. Here a normalisation is part of the model.

    Attributes:
        epochs: passes over the training images. Each batch is used `steps` times in a row. With 26 epochs the run
            has as many updates as 26 * 8 = 208 epochs of other methods. For another m, divide 208 by m.
        alpha: step size of the perturbation; eps in the paper, to be set with another eps.
        steps: number of replays of each batch, m; each replay is a step of the attack and an update of the
            weights.
        random_start: must be false: the perturbation starts from 0 and is never reset.
        awp_gamma: must be 0.
    """

    epochs: int = 26
    weight_decay: Number = 2e-4
    schedule: Schedule = _TENTH_AFTER_40000_AND_60000
    alpha: Number = 8 / 255
    steps: int = 8
    random_start: bool = False

    presets: ClassVar[Presets] = {
        "paper": {},
        "official": {"pad": 2, "norm_decay": False},
        "imagenet": {
            "epochs": 23,
            "batch_size": 256,
            "schedule": MultiStep((8, 16), 0.1),
            "weight_decay": 1e-4,
            "eps": 4 / 255,
            "alpha": 4 / 255,
            "steps": 4,
            "pad": 0,
        },
    }
    l2_numbers: ClassVar[Mapping[str, Any]] = {"eps": 128 / 255, "alpha": 128 / 255}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.random_start:
            raise ValueError("random_start must be false with free, whose perturbation starts at 0")
        if self.awp_gamma:
            raise ValueError(
                "awp_gamma must be 0 with free, which has no attack before the weights' gradient; "
                f"got {self.awp_gamma}"
            )


@dataclass(frozen=True)
class AttackedWithDelta(Attacked):
    """Images with the perturbation from earlier batches. Unlike for other methods they have a gradient.

    Attributes:
        delta: the perturbation [B, C, H, W], the leaf from which `x` was computed.
    """

    delta: Tensor


class Free(PGDAT[FreeRecipe]):
    """Free-m: each batch is trained on m times; the same backward pass moves the weights and the perturbation.

    With L = CE(f(clip(x + delta))): the optimiser moves the weights along grad_w L, and delta becomes
    clamp(delta + alpha sign(grad_delta L), -eps, eps), both gradients taken at the old weights and delta; in l2 it
    moves by alpha along the normalised gradient and is scaled back to length eps. It is carried from replay to
    replay and from batch to batch, by place in the batch.

    Source: Shafahi et al. 2019, algorithm 1; the rest as in the authors' code (ashafahi/free_adv_train): delta
    starts at 0, images are clipped to 0..1, and where they were, delta has gradient 0 and stays.

    delta is part of the checkpoints. A step that is not taken because something is not finite leaves it alone and
    ends the replays of its batch.

    Cost per batch: 3mF. Running statistics move m times.
    """

    name = "free"
    recipe_class = FreeRecipe

    def setup(self) -> None:
        """Start without a perturbation; there is no attack to build."""
        self.bn_updates = self.recipe.steps
        self._delta: Tensor | None = None
        self._gauges = {}

    def attack(self, batch: TrainBatch) -> AttackedWithDelta:
        """Return the images under the present perturbation."""
        recipe, elements = self.recipe, batch.x[0].numel()
        check_radius("eps", recipe.eps, recipe.norm, (0.0, 1.0), elements)
        delta = torch.zeros_like(batch.x) if self._delta is None else self._delta.detach()
        delta.requires_grad_()
        return AttackedWithDelta((batch.x + delta).clamp(0, 1), delta)

    def step(self, batch: TrainBatch, update: Update) -> None:
        """Train on the batch m times."""
        recipe = self.recipe
        with self.runtime.phases("train"):
            for _ in range(recipe.steps):
                adv = self.attack(batch)
                with self.autocast():
                    result = self.training_loss(batch, adv)
                if not update(result):
                    return
                delta, gradient = adv.delta.detach(), adv.delta.grad
                assert gradient is not None
                # A step in the ball around 0: differences of images are never outside -1..1. In l2 images that
                # were clipped to 0..1 have moved by less than delta, and so they are in the ball, too.
                self._delta = pgd_step(
                    delta,
                    gradient,
                    torch.zeros_like(delta),
                    recipe.eps,
                    recipe.alpha,
                    recipe.norm,
                    bounds=(-1.0, 1.0),
                )

    def passes(self, epoch: int) -> float:
        """Return 3F for each replay."""
        return 3 * self.recipe.steps

    def state(self) -> dict[str, Tensor]:
        """Return the perturbation."""
        return {} if self._delta is None else {"delta": self._delta}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore the perturbation.

        Raises:
            ValueError: if it is for batches of another size.
        """
        delta = state.get("delta")
        size = self.recipe.batch_size // self.runtime.ranks.world_size
        if delta is not None and len(delta) != size:
            raise ValueError(
                f"a perturbation of {len(delta)} images does not fit batches of {size}"
            )
        self._delta = None if delta is None else delta.to(self.runtime.device)
