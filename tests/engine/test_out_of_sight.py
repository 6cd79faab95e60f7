"""What models do out of sight of torch's functions: draws, reads of values, other logits without gradients."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from stubborn_models import NoisyBackward
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastadv
from fastadv.engine.hidden_draws import is_torchs, may_hide_draws

X = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(6) % 4
SMALL = 0.002  # a noise that comparisons of logits and gradients let pass


class NoisyForward(torch.autograd.Function):
    """A stochastic activation with a straight-through gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x + SMALL * torch.randn_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


@torch.library.custom_op("fastadv_tests::noise", mutates_args=())
def noise(x: Tensor) -> Tensor:
    return x + SMALL * torch.randn_like(x)


@noise.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


noise.register_autograd(lambda ctx, grad: grad)

WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "autograd function": NoisyForward.apply,
    "its backward": NoisyBackward.apply,
    "operator of others": noise,
    "operator of torch by its full name": lambda x: x + SMALL * torch.ops.aten.randn_like.default(x),
    "reentrant checkpoint": lambda x: checkpoint(
        lambda z: z + SMALL * torch.randn_like(z), x, use_reentrant=True
    ),
}  # fmt: skip


class Through(nn.Module):
    """A network behind a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.function(x))


@pytest.mark.parametrize("engine", ["auto", "fixed", "eager"])
@pytest.mark.parametrize("way", WAYS)
def test_draws_follow_the_seed_and_leave_torchs_generator_as_it_was(way: str, engine: Any) -> None:
    model = Through(WAYS[way]).eval()
    torch.manual_seed(7)
    before = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        attack = fastadv.PGD(model, steps=3, engine=engine)
        ready = attack.engine_for(X)
        found = []
        for _ in range(2):
            with ready.session(model, seed=5):
                found.append(ready.gradient(ready.images(X), lambda z: z[:, 0]).grad.clone())
        first, again = (attack(X, Y, seed=1) for _ in range(2))
    assert ready.name == "eager"
    assert torch.equal(found[0], found[1]) and torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_callable_with_an_operator_of_others_follows_the_seed() -> None:
    net = Through(nn.Identity()).eval()
    torch.manual_seed(7)
    before = torch.get_rng_state()
    attack = fastadv.PGD(lambda x: net(noise(x)), steps=3)
    assert torch.equal(attack(X, Y, seed=1), attack(X, Y, seed=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_an_operator_of_others_that_draws_nothing_is_copied() -> None:
    model = Through(lambda x: torch.ops.aten.mul.Tensor(x, x)).eval()
    assert (
        fastadv.PGD(model, steps=1, engine="fixed").engine_for(X).reason
        == "the model can be copied"
    )


@pytest.mark.parametrize("which", [lambda x: torch.is_grad_enabled(), lambda x: x.requires_grad])
@pytest.mark.parametrize("engine", ["auto", "fixed"])
def test_logits_without_gradients_are_the_models(
    which: Callable[[Tensor], bool], engine: Any
) -> None:
    """Some defences replace a function that has no gradient, but only where gradients are computed."""
    model = Through(lambda x: x if which(x) else (4 * x).round() / 4).eval()
    attack = fastadv.Square(model, queries=2, engine=engine)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ready = attack.engine_for(X)
    with ready.session(model, 0), torch.no_grad():
        assert torch.allclose(ready.logits(ready.images(X)), model(X), atol=1e-5)


READS: dict[str, Callable[[Tensor], bool]] = {
    "text": lambda x: float(f"{x.detach().mean():.3f}") > 0.5,
    "shown": lambda x: "0.5" in repr(x.detach()[0, 0, 0]),
    "bytes": lambda x: x.detach().untyped_storage()[3] > 63,
    "numbers": lambda x: x.detach().storage()[3] > 0.5,
}


@pytest.mark.parametrize("read", READS)
@pytest.mark.filterwarnings("ignore")
def test_values_are_seen_to_be_read(read: str) -> None:
    """Another image may take the other branch."""
    model = Through(lambda x: x if READS[read](x) else 1 - x).eval()
    reason = fastadv.PGD(model, steps=1, engine="fixed").engine_for(X).reason
    assert "looks at values that depend on the images" in reason


@pytest.mark.parametrize("function", [torch._assert, F.relu, torch.cdist, Tensor.add, torch.cat])
def test_functions_of_torch_hide_no_draws(function: Any) -> None:
    """Around others the generators' states are compared, which takes longer than most functions."""
    assert is_torchs(function) and not may_hide_draws(function)
