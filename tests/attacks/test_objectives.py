"""Objectives with a gradient by formula."""

from __future__ import annotations

import pytest
import torch
from attack_helpers import digits_test, trained_small_cnn

import fastadv
from fastadv.attacks.objectives import LabelCrossEntropy, Objective


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_cross_entropy_has_the_bits_of_autograd(classes: int, targeted: bool) -> None:
    logits, y = 5 * torch.randn(64, classes), torch.randint(classes, (64,))
    y[3] = -100  # which torch leaves out
    objective = LabelCrossEntropy(y, targeted)
    for factor in (1.0, 0.3, 40.0):  # what is kept from call to call does not depend on the logits
        leaf = (factor * logits).requires_grad_()
        wanted = Objective("ce", targeted)(leaf, y)
        (gradient,) = torch.autograd.grad(wanted.sum(), leaf)
        value, found = objective.value_and_gradient(leaf.detach())
        assert torch.equal(value, wanted) and torch.equal(found, gradient)
        assert torch.equal(objective(leaf), wanted) and not value.requires_grad


@pytest.mark.parametrize("targeted", [False, True])
def test_an_attack_on_a_copy_does_the_same_with_autograd(targeted: bool) -> None:
    x, y = digits_test(16)
    options = {"precision": "bf16", "engine": "compiled", "targeted": targeted, "seed": 3}

    def plain(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(logits, y, reduction="none")

    by_formula = fastadv.PGD(trained_small_cnn(), 0.1, 0.02, 4, loss="ce", **options)
    by_autograd = fastadv.PGD(trained_small_cnn(), 0.1, 0.02, 4, loss=plain, **options)
    assert torch.equal(by_formula(x, y), by_autograd(x, y))
    assert all(map(torch.equal, by_formula.last.losses, by_autograd.last.losses))
