"""ZeroGrad: one step that ignores the smallest elements of the gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastadv.attacks.zero_grad import ZeroGradPGD
from fastadv.trainers.number import Number
from fastadv.trainers.pgd_at import PGDAT
from fastadv.trainers.recipe import AdversarialRecipe, Presets
from fastadv.trainers.schedules import Cyclic, Schedule

_TRIANGLE = Cyclic(0.5)


@dataclass(frozen=True, kw_only=True)
class ZeroGradRecipe(AdversarialRecipe):
    """Numbers of the authors' code for CIFAR-10; both presets have them.

    With "official" the model is attacked in training mode, as in that code, so running statistics move twice per
    batch.

    Attributes:
        alpha: size of the step; 2 eps in the paper. Set it together with eps.
        quantile: quantile of the gradient's magnitudes in each image. Elements below it do not change. The code
            has .35 for CIFAR-10, .45 for CIFAR-100 and .7 for SVHN.
    """

    epochs: int = 30
    lr: Number = 0.2
    schedule: Schedule = _TRIANGLE
    alpha: Number = 16 / 255
    steps: int = 1
    quantile: Number = 0.35

    norms: ClassVar[tuple[str, ...]] = ("linf",)
    presets: ClassVar[Presets] = {"paper": {}, "official": {"attack_mode": "moving"}}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.quantile <= 1:
            raise ValueError(f"quantile must be in 0..1, got {self.quantile}")


class ZeroGrad(PGDAT[ZeroGradRecipe]):
    """ZeroGrad: CE(f(x')), x' one step of 2 eps from uniform noise that does not move pixels of small gradient.

    Source: Golgooni et al. 2021, algorithm 1; recipe as in the authors' code
    (rohban-lab/catastrophic_overfitting). MultiGrad is left out.

    Cost per batch: 2F for the attack, 3F for training. Running statistics move once.
    """

    name = "zero_grad"
    recipe_class = ZeroGradRecipe
    attack_class = ZeroGradPGD

    def setup(self) -> None:
        """Build the attack."""
        super().setup()
        assert isinstance(self.pgd, ZeroGradPGD)
        self.pgd.quantile = self.recipe.quantile
