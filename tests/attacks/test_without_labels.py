"""Attacks that do not look at labels are called without them; all others say that they need them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attack_helpers import digits_test, trained_small_cnn

import fastadv
from fastadv.attacks.curriculum import CurriculumPGD

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS: dict[str, Any] = {"eps": 0.1, "alpha": 0.03, "steps": 3, "loss": "kl", "seed": 3}


@pytest.mark.parametrize("restarts", [1, 2])
@pytest.mark.parametrize("kind", [fastadv.PGD, fastadv.MIM])
def test_a_divergence_needs_no_labels(kind: Any, restarts: int) -> None:
    model, (x, y) = trained_small_cnn(half=False), digits_test(8)
    attack = kind(model, **STEPS, restarts=restarts, random_start=True)
    adv = attack(x)
    assert attack.last.loss_per_step[-1] > 0 and (adv - x).abs().amax() > 0.05
    assert torch.equal(adv, attack(x, y)) and torch.equal(adv, attack(x, (y + 3) % 10))


def test_one_step_and_the_function_need_none_either() -> None:
    model, (x, y) = trained_small_cnn(half=False), digits_test(8)
    step = fastadv.FGSMRS(model, 0.1, 0.12, loss="kl", seed=3)
    assert torch.equal(step(x), step(x, y))
    adv = fastadv.pgd_fused(model, x, **STEPS)
    assert torch.equal(adv, fastadv.pgd_fused(model, x, y, **STEPS))
    assert fastadv.pgd_fused(model, x[:0], **STEPS).shape == x[:0].shape


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        (fastadv.PGD, {}, "with loss 'ce'"),
        (fastadv.FGSM, {}, "with loss 'ce'"),
        (fastadv.PGD, {"loss": "kl", "keep": "best"}, "with keep 'best'"),
        (fastadv.FriendlyPGD, {"loss": "kl"}, "for FriendlyPGD, which stops"),
        (CurriculumPGD, {"loss": "kl"}, "for CurriculumPGD, which asks"),
        (fastadv.APGD, {}, "for APGD"),
        (fastadv.Square, {}, "for Square"),
        (fastadv.FAB, {}, "for FAB"),
        (fastadv.CWL2, {}, "for CWL2"),
    ],
)
def test_attacks_that_look_at_labels_say_why(kind: Any, options: Any, reason: str) -> None:
    attack, (x, _) = kind(trained_small_cnn(half=False), **options), digits_test(2)
    for missing in ((), (None,)):
        with pytest.raises(TypeError, match=rf"y must be the labels \[B\] {reason}.*got None"):
            attack(x, *missing)
