"""Radii and steps in the units of the images, and the names of norms."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from attack_helpers import images
from test_attack_settings import model
from torch import nn

import fastadv
from fastadv.attacks import PGD, Attack

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("wide", [(0.0, 1.0), (0.0, 255.0), (-2.0, 2.5)])
def test_a_radius_is_in_the_units_of_the_images(wide: tuple[float, float]) -> None:
    width = wide[1] - wide[0]
    for kind in (fastadv.PGD, fastadv.FGSM, fastadv.FGSMRS, fastadv.MIM, fastadv.CW, fastadv.APGD):
        assert kind(model(), width, bounds=wide).eps == width
        assert kind(model(), 0, bounds=wide).eps == 0
        with pytest.raises(ValueError, match=r"eps must be at most .* in the units of the images"):
            kind(model(), 1.01 * width, bounds=wide)


@pytest.mark.parametrize(("norm", "largest"), [("linf", 1.0), ("l2", 192**0.5), ("l1", 192.0)])
def test_no_radius_is_larger_than_images_are_apart(norm: str, largest: float) -> None:
    x, y = images(4), torch.arange(4)
    for eps, attack in (
        (largest, PGD(model(), largest, norm=norm, steps=1)),
        (0.1, PGD(model(), 0.1, norm=norm)),
    ):
        assert attack(x, y, eps=largest).shape == x.shape, eps
        with pytest.raises(ValueError, match=f"eps must be at most .* in {norm}"):
            attack(x, y, eps=1.1 * largest)
    if norm != "linf":
        with pytest.raises(ValueError, match=f"eps must be at most .* in {norm}"):
            PGD(model(), 1.1 * largest, norm=norm)(x, y)
    with pytest.raises(ValueError, match="max_eps must be at most"):
        fastadv.minimum_perturbation(PGD(model(), 0.1, norm=norm), x, y, max_eps=1.1 * largest)


def test_a_step_is_in_the_units_of_the_images() -> None:
    with pytest.raises(ValueError, match=r"alpha must be below 2, .* units of the images"):
        PGD(model(), 8 / 255, alpha=2)
    assert PGD(model(), 8, alpha=2, bounds=(0, 255)).alpha == 2


@pytest.mark.parametrize("alpha", [2, 8.0, torch.tensor([0.1, 8.0]), torch.full((1, 1, 1), 2.0)])
def test_a_step_of_a_call_is_in_the_units_of_the_images(alpha: Any) -> None:
    x, y = torch.rand(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"^alpha must be below 2, .* got [28]; .* units of the"):
        PGD(model(), 8 / 255, steps=1)(x, y, alpha=alpha)
    in_l2 = PGD(model(), 0.5, alpha=0.1, steps=1, norm="l2")
    if not (isinstance(alpha, torch.Tensor) and alpha.dim() > 1):  # in l2 a step is one length
        in_l2(x, y, alpha=alpha)
        PGD(model(), 8, alpha=2, bounds=(0, 255), steps=1)(255 * x, y, alpha=alpha)


@pytest.mark.parametrize(
    ("written", "name"),
    [
        *[(w, "linf") for w in ("Linf", "LINF", "inf", "l_inf", "L-inf", np.inf, float("inf"))],
        *[(w, "l2") for w in ("L2", "2", 2, 2.0, np.int64(2))],
        *[(w, "l1") for w in ("L1", "1", 1)],
    ],
)
def test_a_norm_may_be_written_as_others_write_it(written: Any, name: str) -> None:
    x, y = images(4), torch.arange(4)
    attack = PGD(model(), 0.1, norm=written, seed=1)
    assert attack.norm == name
    assert torch.equal(attack(x, y), PGD(model_like(attack), 0.1, norm=name, seed=1)(x, y))
    start = fastadv.ops.random_start(x, 0.1, written, seed=1)
    assert torch.equal(start, fastadv.ops.random_start(x, 0.1, name, seed=1))
    stepped = fastadv.ops.pgd_step(start, x, x, 0.1, 0.05, written)
    assert torch.equal(stepped, fastadv.ops.pgd_step(start, x, x, 0.1, 0.05, name))


def model_like(attack: Attack) -> nn.Module:
    return copy.deepcopy(attack.model)  # type: ignore[arg-type]


@pytest.mark.parametrize("norm", [True, "max", "", "l", 3, 0])
def test_other_words_are_no_norm(norm: Any) -> None:
    with pytest.raises(ValueError, match="norm must be one of linf, l2, l1"):
        PGD(model(), norm=norm)
