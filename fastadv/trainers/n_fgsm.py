"""N-FGSM: one step from strong noise, without clipping to the ball."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fastadv.ops import random_start
from fastadv.trainers.method import TrainBatch
from fastadv.trainers.number import Number
from fastadv.trainers.pgd_at import PGDAT
from fastadv.trainers.recipe import AdversarialRecipe, Presets, check_field
from fastadv.trainers.schedules import Cyclic, Schedule

_TRIANGLE = Cyclic(0.5, base_momentum=0.8, max_momentum=0.9)


@dataclass(frozen=True, kw_only=True)
class NFgsmRecipe(AdversarialRecipe):
    """Numbers of the authors' code for CIFAR-10; both presets have them.

    With "official" the model is attacked in training mode, as in that code, so running statistics move twice per
    batch.

    Attributes:
        alpha: size of the step; eps in the paper. Set it together with eps.
        steps: must be 1.
        random_start: must be true.
        noise: radius of the uniform noise, in units of eps.
    """

    epochs: int = 30
    lr: Number = 0.2
    schedule: Schedule = _TRIANGLE
    alpha: Number = 8 / 255
    steps: int = 1
    noise: Number = 2.0

    norms: ClassVar[tuple[str, ...]] = ("linf",)
    presets: ClassVar[Presets] = {"paper": {}, "official": {"attack_mode": "moving"}}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_field(self, "noise", at_least=0)
        if self.steps != 1:
            raise ValueError(f"steps must be 1 with n_fgsm, got {self.steps}")
        if not self.random_start:
            raise ValueError(
                "random_start must be true with n_fgsm; noise 0 is FGSM from the image"
            )
        if self.noise * self.eps + self.alpha > 1:
            raise ValueError(
                f"noise * eps + alpha must be <= 1, the range of the images, got {self.noise}, {self.eps} and "
                f"{self.alpha}"
            )


class NFgsm(PGDAT[NFgsmRecipe]):
    """N-FGSM: CE(f(x')), x' = clip(z + alpha sign(grad CE(f(z)))), z = clip(x + u), u uniform in -2 eps .. 2 eps.

    x' can be as far as 2 eps + alpha from x.

    Source: de Jorge et al. 2022, equation 4; recipe as in the authors' code (pdejorge/N-FGSM).

    Cost per batch: 2F for the attack, 3F for training. Running statistics move once.
    """

    name = "n_fgsm"
    recipe_class = NFgsmRecipe

    def setup(self) -> None:
        """Build the attack, with a ball that is large enough for noise and step together."""
        super().setup()
        self.pgd.eps = self.recipe.noise * self.recipe.eps + self.recipe.alpha

    def start_of(self, batch: TrainBatch) -> Tensor | None:
        """Return the images with noise."""
        radius, seed = self.recipe.noise * self.recipe.eps, batch.seed("attack")
        return random_start(batch.x, radius, seed=seed, sample_ids=batch.ids)
