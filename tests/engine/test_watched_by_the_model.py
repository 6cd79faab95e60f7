"""Models that notice that they are recorded or watched: attacked as in a plain loop, where nothing watches."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attack_helpers import cross_entropy, images, plain_pgd
from torch import Tensor, nn

import fastadv

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:fastadv attacks this model with the eager engine"),
]
X, Y = images(4), torch.arange(4)
OPTIONS: dict[str, Any] = dict(eps=0.03, alpha=0.01, steps=2)


class Small(nn.Module):
    def __init__(self, before: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before = before
        self.conv, self.last = nn.Conv2d(3, 8, 3), nn.Linear(288, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.conv(self.before(x)).relu().flatten(1))


def agreement(attack: fastadv.PGD, model: nn.Module) -> float:
    wanted = plain_pgd(model, X, Y, X, loss=cross_entropy, **OPTIONS)
    return float(((attack(X, Y) - wanted).abs() < 1e-3).float().mean())


@functools.lru_cache
def ramp(size: int) -> Tensor:
    return torch.linspace(0, 1, size)


@functools.lru_cache(typed=True)
def ramp_by_type(size: int, scale: float) -> Tensor:
    return scale * torch.linspace(0, 1, size)


@pytest.mark.parametrize(
    "kept", [lambda: ramp(8), lambda: ramp_by_type(8, 1.0)], ids=["one key", "by type"]
)
def test_a_tensor_that_is_kept_by_a_size_is_the_live_models(kept: Callable[[], Tensor]) -> None:
    """The cache takes a watched size for another key, under which it keeps another tensor."""
    ramp.cache_clear()
    ramp_by_type.cache_clear()
    by_type = kept() is ramp_by_type(8, 1.0)

    def shifted(x: Tensor) -> Tensor:
        size = x.shape[-1]
        return x * (ramp_by_type(size, 1.0) if by_type else ramp(size))

    model = Small(shifted).eval()
    attack = fastadv.PGD(model, random_start=False, engine="fixed", precision="auto", **OPTIONS)
    for _ in range(3):
        assert agreement(attack, model) > 0.99
    kept().sub_(0.7).mul_(-3)
    for _ in range(2):
        assert agreement(attack, model) > 0.99


QUESTIONS: dict[str, Callable[[Tensor], bool]] = {
    "is_leaf": lambda x: x.is_leaf,
    "is_leaf with gradients": lambda x: x.is_leaf and x.requires_grad,
    "grad_fn": lambda x: x.grad_fn is None,
    "has_torch_function": lambda x: not torch.overrides.has_torch_function((x,)),
    "modes": lambda x: not torch.overrides._get_current_function_mode_stack(),
}


@pytest.mark.parametrize("settings", [{}, {"engine": "eager"}, {"engine": "fixed"}])
@pytest.mark.parametrize("asks", QUESTIONS.values(), ids=QUESTIONS.keys())
@pytest.mark.parametrize("as_function", [False, True])
def test_a_model_that_asks_for_a_watch_is_attacked_as_it_is(
    asks: Callable[[Tensor], bool], settings: dict[str, Any], as_function: bool
) -> None:
    model = Small(lambda x: x if asks(x) else x.flip(3)).eval()
    attacked = (lambda x: model(x)) if as_function else model
    x = X.clone()
    attack = fastadv.PGD(attacked, random_start=False, **OPTIONS, **settings)
    for _ in range(2):
        assert agreement(attack, model) > 0.99
    assert torch.equal(X, x)
    assert all(parameter.requires_grad for parameter in model.parameters())


class _Turned(torch.autograd.Function):
    """ReLU with another gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad.flip(3)


def test_a_kernel_that_others_register_between_two_attacks_is_attacked() -> None:
    """Its results are the same, so that logits show nothing."""
    model = Small(lambda x: x).eval()
    attack = fastadv.PGD(model, random_start=False, engine="fixed", **OPTIONS)
    for _ in range(2):
        assert agreement(attack, model) > 0.99
    library = torch.library.Library("aten", "IMPL")
    try:
        library.impl("relu", _Turned.apply, "AutogradCPU")
        for _ in range(2):
            assert agreement(attack, model) > 0.99
    finally:
        library._destroy()
    assert agreement(attack, model) > 0.99
