"""What losses and ops take, and what they refuse: kinds of loss on every backend, numbers that are none."""

from __future__ import annotations

import importlib.util
import inspect
import re
from typing import Any

import pytest
import torch
from attack_helpers import images
from torch import Tensor

import fastadv
from fastadv import losses
from fastadv.ops.softmax_formulas import KINDS
from fastadv.ops.softmax_losses import softmax_losses

pytestmark = pytest.mark.usefixtures("one_thread")

A, B, Y = torch.randn(4, 10), torch.randn(4, 10), torch.arange(4)
has_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


@pytest.mark.parametrize("kind", ["tradse", "TRADES", "", None, "mse"])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_an_unknown_kind_of_loss_is_refused(kind: Any, backend: str) -> None:
    with fastadv.backend(backend), pytest.raises(ValueError, match="kind must be"):
        softmax_losses(kind, A, B, Y, weight=1.0)
    if isinstance(kind, str):
        raw = torch.ops.fastadv.softmax_losses
        with fastadv.backend(backend), pytest.raises(ValueError, match="kind must be"):
            raw(A, B, Y, kind, 1.0, 1.0, True, False, False)


@has_triton
@pytest.mark.parametrize("kind", ["tradse", "TRADES", ""])
def test_an_unknown_kind_of_loss_is_refused_by_triton(kind: str) -> None:
    from fastadv.kernels import softmax_losses as kernels

    for other in (None, B):
        with pytest.raises(
            ValueError, match=r"kind must be one of .* with (one|two) kinds? of logits"
        ):
            kernels.softmax_losses(A, other, Y, kind, 1.0, 1.0, True, False, False)


@has_triton
def test_all_backends_know_the_same_kinds_of_loss() -> None:
    from fastadv.kernels import softmax_losses as kernels

    for takes_other, names in kernels.KINDS.items():
        assert set(names) == {
            name for name, kind in KINDS.items() if kind.takes_other == takes_other
        }
    for name, kind in KINDS.items():
        labels = Y if kind.takes_labels else None
        other = B if kind.takes_other else None
        for backend in ("native", "reference"):
            with fastadv.backend(backend):
                softmax_losses(name, A, other, labels, weight=0.5)


@pytest.mark.parametrize("name", list(KINDS))
def test_a_kind_takes_its_own_arguments_alone(name: str) -> None:
    kind = KINDS[name]
    wrong = (None if kind.takes_other else B, Y if kind.takes_labels else None)
    labels = (B if kind.takes_other else None, None if kind.takes_labels else Y)
    for other, y in (wrong, labels):
        with pytest.raises((TypeError, ValueError), match="must be"):
            softmax_losses(name, A, other, y)
        for backend in ("native", "reference"):
            with fastadv.backend(backend), pytest.raises(ValueError, match="must be"):
                torch.ops.fastadv.softmax_losses(A, other, y, name, 0.5, 1.0, True, False, False)


@pytest.mark.parametrize("number", ["0.5", True, None, torch.tensor(0.5), [0.5]])
def test_a_number_of_an_op_or_a_loss_is_a_number(number: Any) -> None:
    x = images(4)
    for call in (
        lambda: fastadv.ops.pgd_step(x, x, x, 0.1, 0.1, sparsity=number),
        lambda: fastadv.ops.momentum_update_(x.clone(), x, number),
        lambda: losses.trades(A, B, Y, number),
        lambda: losses.kl(A, B, temperature=number),
        lambda: losses.lbgat(A, B, Y, A, number),
        lambda: losses.hat(A, B, A, Y, Y, 1.0, number),
        lambda: losses.arrest(A, Y, A, B, number),
        lambda: losses.cross_entropy(A, Y, label_smoothing=number),
    ):
        with pytest.raises(TypeError, match="must be a number"):
            call()
    if not isinstance(number, Tensor):
        with pytest.raises(TypeError, match="eps must be a number"):
            fastadv.ops.random_start(x, number)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_temperature_is_one_that_float32_can_square_and_invert(backend: str) -> None:
    """Its inverse or its square would be infinite, and the loss NaN."""
    with fastadv.backend(backend):
        for number in (1e-39, 5e-324, 2e19, 1e300):
            for loss in (losses.kl, losses.kd):
                with pytest.raises(ValueError, match=f"temperature .*{re.escape(str(number))}"):
                    loss(A, B, temperature=number)
        for number in (1.2e-38, 9e18):
            a, b = (one.detach().clone().requires_grad_() for one in (A, B))
            loss = losses.kl(a, b, temperature=number)
            loss.backward()
            assert loss.isfinite() and a.grad.isfinite().all() and b.grad.isfinite().all()


def test_all_losses_take_their_numbers_by_position_and_the_reduction_by_name() -> None:
    found = set()
    for name in losses.__all__:
        function = getattr(losses, name)
        if not inspect.isfunction(function):
            continue
        for parameter in inspect.signature(function).parameters.values():
            if parameter.name in ("alpha", "beta", "gamma", "lam", "temperature", "weight"):
                found.add(name)
                assert parameter.kind is parameter.POSITIONAL_OR_KEYWORD, (name, parameter.name)
            elif parameter.name == "reduction":
                assert parameter.kind is parameter.KEYWORD_ONLY, name
    assert {"kl", "kd", "trades", "act"} <= found
    assert losses.kl(A, B, 2.0) == losses.kl(A, B, temperature=2.0)
