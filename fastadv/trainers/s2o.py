"""S2O: adversarial training with second-order statistics of the logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fastadv import losses
from fastadv.losses.common import at_least_float32
from fastadv.ranks import Ranks
from fastadv.trainers.method import TrainBatch
from fastadv.trainers.number import Number
from fastadv.trainers.pair import PairMethod, PairRecipe
from fastadv.trainers.recipe import Presets, check_field
from fastadv.trainers.schedules import MultiStep, Schedule

# The scripts count epochs from 1 and test `epoch >= 100`, so that the 100th epoch already runs at a tenth.
_TENTH_AT_100_AND_150 = MultiStep((99, 149), 0.1)
_WEIGHTS = {"pgd_at": 0.1, "trades": 0.3}


@dataclass(frozen=True, kw_only=True)
class S2oRecipe(PairRecipe):
    """Numbers of the authors' code, the same for both bases; both presets have them.

    `S2o` states the differences of "official" from that code.

    Attributes:
        base: the method to which the statistics are added, "pgd_at" or "trades".
        beta: weight of the divergence, with base "trades".
        weight: weight w of the statistics' term. The cross-entropy has 1 - w. The default is .1 with base "pgd_at"
            and .3 with "trades".
        own: target probability of an image's own class; .2 in the code for 10 classes, .02 for 100.
    """

    epochs: int = 200
    schedule: Schedule = _TENTH_AT_100_AND_150
    eps: Number = 8 / 255
    alpha: Number = 2 / 255
    base: Literal["pgd_at", "trades"] = "pgd_at"
    beta: Number = 6.0
    weight: Number | None = None
    own: Number = 0.2

    presets: ClassVar[Presets] = {"paper": {}, "official": {}}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_field(self, "beta", at_least=0)
        for name in ("term_weight", "own"):
            if not 0 <= getattr(self, name) <= 1:
                shown = name.removeprefix("term_")
                raise ValueError(f"{shown} must be in 0..1, got {getattr(self, name)}")

    @property
    def term_weight(self) -> float:
        """The weight of the statistics' term; by default the weight for the base."""
        return _WEIGHTS[self.base] if self.weight is None else self.weight


class S2o(PairMethod[S2oRecipe]):
    """S2O: (1 - w) CE(f(x')) + w / 2 (KL(t || f(x)) + KL(t' || f(x'))), with soft targets t and t' of each class.

    With base "trades" the cross-entropy is CE(f(x)), and 6 KL(f(x) || f(x')) is added.

    The soft targets t of each class come from the second moments M = sum over the batch of f f^T. The own class
    has .2. The other classes share .8, class j in proportion to max_k |M_yk| - |M_yj|. So the target of a class is
    small if its logits vary together with the logits of y. t uses the clean logits and t' the adversarial logits,
    both without gradient.

    Source: Jin et al. 2022; the loss follows the authors' code (Alexkael/S2O), in which it replaces the paper's
    term in the correlation of the weights. Choices where the code leaves something open: if the shares of all
    other classes are 0, as with two classes, they are equal here. With several processes M is the sum over the
    global batch.

    The code runs both kinds of images twice in training mode, once for the moments and once for the divergences,
    and with base "trades" a third time for TRADES' divergence. Here each kind runs once. With base "pgd_at" the
    attack starts from uniform noise, and `start_std` has no effect.

    Cost per batch: 2KF for the attack (1F more with base "trades"), 6F for training. Running statistics move twice
    (in the authors' code four times, with base "trades" six times).
    """

    name = "s2o"
    supports = frozenset({"extra_weight"})
    recipe_class = S2oRecipe

    def setup(self) -> None:
        """Build the base's attack."""
        self.attack_loss = "kl" if self.recipe.base == "trades" else "ce"
        super().setup()

    def start_of(self, batch: TrainBatch) -> Tensor | None:
        """Return the images at which the base's attack starts; None for PGD's own start."""
        if self.recipe.base == "trades":
            return super().start_of(batch)
        return super(PairMethod, self).start_of(batch)  # the start of PGD-AT

    def objective(self, clean_logits: Tensor, adv_logits: Tensor, y: Tensor) -> Tensor:
        """Return the whole loss of each image."""
        recipe, own, ranks = self.recipe, self.recipe.own, self.runtime.ranks
        hard = clean_logits if recipe.base == "trades" else adv_logits
        loss = (1 - recipe.term_weight) * losses.cross_entropy(hard, y, reduction="none")
        for logits in (clean_logits, adv_logits):
            targets = second_order_targets(logits, own, ranks)[y]
            log_p = at_least_float32(logits).log_softmax(1)
            apart = F.kl_div(log_p, targets, reduction="none").sum(1)
            loss = loss + recipe.term_weight / 2 * apart
        if recipe.base == "trades":
            loss = loss + recipe.beta * losses.kl(clean_logits, adv_logits, reduction="none")
        return loss


@torch.no_grad()
def second_order_targets(logits: Tensor, own: float, ranks: Ranks) -> Tensor:
    """Return the soft targets of each class.

    Args:
        logits: logits of this process's part of the batch, [B, K].
        own: target probability of the own class.
        ranks: the processes whose parts make up the batch.

    Returns:
        Targets [K, K]: a row for each class, which sums to 1.
    """
    with torch.autocast(logits.device.type, enabled=False):
        values = at_least_float32(logits)
        moments = ranks.sum(values.T @ values).abs()
    shares = (moments.amax(1, keepdim=True) - moments).fill_diagonal_(0.0)
    totals = shares.sum(1, keepdim=True)
    even = torch.full_like(shares, 1 / max(len(shares) - 1, 1)).fill_diagonal_(0.0)
    shares = torch.where(totals > 0, shares / totals, even)
    return ((1 - own) * shares).fill_diagonal_(own)
