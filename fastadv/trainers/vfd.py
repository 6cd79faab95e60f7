"""VFD-Adv: vanilla feature distillation on top of another method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import InitVar, dataclass
from functools import partial
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor, nn

from fastadv import losses
from fastadv.losses.common import Reduction, at_least_float32, reduced
from fastadv.models import check_layer, layer_and_logits, layer_output
from fastadv.models.stages import LAST
from fastadv.trainers.bases import BASES, numbers_of_base
from fastadv.trainers.hat import helper_examples
from fastadv.trainers.method import Attacked, LossResult, TrainBatch
from fastadv.trainers.number import Number
from fastadv.trainers.pair import PairMethod, PairRecipe, pair_metrics
from fastadv.trainers.recipe import Recipe, check_field, refuses_replaced_deciders
from fastadv.trainers.trades import TradesRecipe


def _alp(
    clean_logits: Tensor,
    adv_logits: Tensor,
    y: Tensor,
    beta: float,
    weight: float = 0.5,
    *,
    reduction: Reduction = "mean",
) -> Tensor:
    """CE(f(x)) + beta (CE(f(x')) + weight mean_k (f_k(x) - f_k(x'))^2)."""
    apart = at_least_float32(clean_logits) - at_least_float32(adv_logits)
    hard = losses.cross_entropy(adv_logits, y, reduction="none")
    clean = losses.cross_entropy(clean_logits, y, reduction="none")
    return reduced(clean + beta * (hard + weight * apart.square().mean(1)), reduction)


def _mart(
    clean_logits: Tensor,
    adv_logits: Tensor,
    y: Tensor,
    beta: float,
    weight: float = 5.0,
    *,
    code_constants: bool = False,
    reduction: Reduction = "mean",
) -> Tensor:
    """CE(f(x)) + beta MART(f(x), f(x')); `weight` is the weight of the divergence."""
    mart = losses.mart(
        clean_logits, adv_logits, y, weight, code_constants=code_constants, reduction=reduction
    )
    return losses.cross_entropy(clean_logits, y, reduction=reduction) + beta * mart


def _layer_of(model: nn.Module, x: Tensor, layer: str) -> Tensor:
    return layer_output(model, layer, x)


def _logits_beyond(model: nn.Module, x: Tensor, layer: str) -> Tensor:
    return layer_and_logits(model, layer, x)[1]


_Loss: TypeAlias = Callable[..., Tensor]
# For each base the loss L_clean + beta L_adv, a function of clean logits, adversarial logits, labels and beta; and
# the base's own recipe.
_BASES: dict[str, tuple[_Loss, type[Recipe]]] = {
    name: (loss, BASES[name].recipe_class)
    for name, loss in (
        ("alp", _alp),
        ("trades", losses.trades),
        ("mart", _mart),
        ("hat", losses.trades),
    )
}
# For a base whose L_adv has two terms, the field of its recipe that weighs the second; beta of L_adv is then 1.
_INNER_WEIGHTS = {"alp": "weight", "mart": "beta"}


@refuses_replaced_deciders
@dataclass(frozen=True, kw_only=True)
class VfdRecipe(PairRecipe):
    """Options that are not given have the numbers of the base's recipe: epochs, learning rate, radius and others.

    So `fastadv train mart` and `fastadv train vfd --base mart` differ only in the distillation and in L_clean.

    Attributes:
        base: the method to which the distillation is added: "alp", "trades", "mart" or "hat".
        beta: weight of the base's adversarial loss L_adv, 1 to 6 in the paper on TRADES; by default TRADES 6,
            HAT 2.5, ALP and MART 1.
        weight: weight of ALP's pairing or MART's divergence inside L_adv; by default the number of the base's
            recipe, .5 and 5. The other bases have no such weight.
        code_constants: add the small constants of MART's code, with base "mart".
        lam: weight of the distillation, lambda; 0 to .04 in the paper.
        layer: the layer k of the distilled features. "layer1", "layer2", ... are the maps after the network's
            stages, "last" is the map before pooling, and "logits" are the logits.
        gamma: weight of the helper examples, with base "hat".
        reach: distance of the helper examples from x, in units of x' - x, with base "hat".
    """

    epochs: int = (
        TradesRecipe.epochs
    )  # TRADES is the default base; `preset_defaults` has the numbers of other bases
    weight_decay: Number = TradesRecipe.weight_decay
    base: Literal["alp", "trades", "mart", "hat"] = "trades"
    beta: Number | None = None
    weight: Number | None = None
    code_constants: bool = False
    lam: Number = 0.02
    layer: str = LAST
    gamma: Number = 0.5
    reach: Number = 2.0
    replaces: InitVar[object] = None  # see `refuses_replaced_deciders`

    deciding: ClassVar[tuple[str, ...]] = ("base",)

    def __post_init__(self, replaces: object) -> None:
        super().__post_init__()
        if self.weight is not None and self.base not in _INNER_WEIGHTS:
            raise ValueError(
                f"weight must be None with base {self.base!r}, whose adversarial loss is one term, "
                f"got {self.weight}"
            )
        if self.code_constants and self.base != "mart":
            raise ValueError(f"code_constants must be False with base {self.base!r}, got True")
        for name in ("base_weight", "inner_weight", "lam", "gamma", "reach"):
            check_field(self, name, at_least=0)

    @classmethod
    def preset_defaults(cls, preset: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the numbers of the base's recipe."""
        base = given.get("base", cls.base)
        if base not in _BASES:  # the recipe's own check reports an unknown base
            return {}
        own = {"beta", "weight"}  # they mean something else in the base's recipe
        numbers = {k: v for k, v in numbers_of_base(base, preset, cls).items() if k not in own}
        return {**numbers, **super().preset_defaults(preset, given)}

    @property
    def base_weight(self) -> float:
        """Beta; by default the beta of the base."""
        if self.beta is not None:
            return self.beta
        return 1.0 if self.base in _INNER_WEIGHTS else float(self._of_base("beta"))

    @property
    def inner_weight(self) -> float:
        """The weight inside L_adv; by default the weight of the base, or 0 if L_adv has one term."""
        if self.weight is not None:
            return self.weight
        if self.base not in _INNER_WEIGHTS:
            return 0.0
        return float(self._of_base(_INNER_WEIGHTS[self.base]))

    def _of_base(self, name: str) -> Any:
        return getattr(_BASES[self.base][1], name)


@dataclass(frozen=True)
class Guided(Attacked):
    """Adversarial images with the features of the vanilla model.

    Attributes:
        vanilla_features: output of the vanilla model's layer for the clean images: [B, C, H, W], or logits [B, K].
        helper: HAT's helper examples [B, C, H, W]; None with another base.
        helper_y: labels of the helper examples [B]; None with another base.
    """

    vanilla_features: Tensor
    helper: Tensor | None = None
    helper_y: Tensor | None = None


class Vfd(PairMethod[VfdRecipe]):
    """VFD-Adv: CE(f(x)) + beta L_adv + lam (||h(x') - h_v(x)|| + ||h(x) - h_v(x)||), h_v a frozen standard model.

    h is the map before pooling, or the output of another `layer`. Norms are L2 norms of an image's whole h, not
    squared.

    L_adv is the adversarial part of a base's loss: KL(f(x) || f(x')) for TRADES and HAT, CE(f(x')) and .5 times
    the pairing for ALP, the whole loss for MART. HAT keeps its helper examples as well.

    Source: the VFD-Adv paper, equations 5 and 6 and algorithm 1; no code of its authors is known. Choices where
    the paper leaves something open: the part of ALP and MART that is L_adv. Training starts from random weights.
    The attack is the base's attack. Every base passes clean and adversarial images one after the other.

    Cost per batch: the cost of the base, and up to 1F of the vanilla model, which runs as far as the layer.
    Running statistics move as often as in the base.
    """

    name = "vfd"
    supports = frozenset({"extra_weight"})
    recipe_class = VfdRecipe

    @classmethod
    def teachers_needed(cls, recipe: Recipe) -> tuple[str, ...]:
        """Return the vanilla model."""
        return ("teacher",)

    def setup(self) -> None:
        """Take the base's attack, and check that both models have the layer."""
        self.attack_loss = BASES[self.recipe.base].attack_loss
        self.bn_updates = self.images_trained = 3 if self.recipe.base == "hat" else 2
        super().setup()
        check_layer(self.model, self.recipe.layer)
        check_layer(self.teachers["teacher"], self.recipe.layer, "teacher")
        self._layer_pass = layer_and_logits
        self._vanilla_layer = partial(_layer_of, layer=self.recipe.layer)
        halves = partial(_logits_beyond, layer=self.recipe.layer)
        for role, model in (("model", self.model), ("teacher", self.teachers["teacher"])):
            self.halves[role] = (model, halves)

    def compile(self, mode: str | None = None) -> None:
        """Run the passes of the trained model through torch.compile."""
        super().compile(mode)
        self._layer_pass = torch.compile(layer_and_logits, mode=mode)

    def attack(self, batch: TrainBatch) -> Guided:
        """Return PGD's images, the vanilla features, and HAT's helper examples."""
        x, vanilla = self.perturb(batch), partial(self.teacher_output, "teacher")
        with self.runtime.phases("teacher"), torch.no_grad(), self.autocast():
            features = vanilla(batch.x, self._vanilla_layer)
            if self.recipe.base != "hat":
                return Guided(x, features)
            return Guided(x, features, *helper_examples(vanilla, batch.x, x, self.recipe.reach))

    def objective(self, clean_logits: Tensor, adv_logits: Tensor, y: Tensor) -> Tensor:
        """Return L_clean + beta L_adv without helper examples."""
        recipe = self.recipe
        options: dict[str, Any] = {"reduction": "none"}
        if recipe.base in _INNER_WEIGHTS:
            options["weight"] = recipe.inner_weight
        if recipe.code_constants:
            options["code_constants"] = True
        loss, _ = _BASES[recipe.base]
        return loss(clean_logits, adv_logits, y, recipe.base_weight, **options)

    def training_loss(self, batch: TrainBatch, adv: Attacked) -> LossResult:
        """Return equation 6: the losses of clean and adversarial images, and the distillation."""
        assert isinstance(adv, Guided)
        layer = self.recipe.layer
        clean_features, clean_logits = self._layer_pass(self.model, layer, batch.x)
        adv_features, adv_logits = self._layer_pass(self.model, layer, adv.x)
        loss = self.objective(clean_logits, adv_logits, batch.y)
        if adv.helper is not None and adv.helper_y is not None:
            helper_logits = self.model(adv.helper)
            helper = losses.cross_entropy(helper_logits, adv.helper_y, reduction="none")
            loss = loss + self.recipe.gamma * helper
        distance = losses.vfd(adv_features, clean_features, adv.vanilla_features, reduction="none")
        metrics = {
            **pair_metrics(clean_logits, adv_logits, batch.y),
            "distance": distance.detach().mean(),
        }
        return LossResult(batch.mean(loss + self.recipe.lam * distance), metrics)

    def passes(self, epoch: int) -> float:
        """Return the base's cost and 1F or 2F for the vanilla model."""
        return super().passes(epoch) + (2 if self.recipe.base == "hat" else 1)
