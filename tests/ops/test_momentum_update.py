"""The accumulated gradient of momentum attacks: its norms, its special values, and MI-FGSM as its paper has it."""

from __future__ import annotations

import pytest
import torch
from op_cases.running import places
from torch import Tensor

from fastadv.ops import backend, momentum_update_, pgd_step

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")
everywhere = pytest.mark.parametrize(("device", "name"), places("momentum_update_"))
SHAPE = (4, 3, 9, 11)


def _gradient(device: str, seed: int = 0) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).to(device)


def _l1(t: Tensor) -> Tensor:
    return t.double().abs().flatten(1).sum(1).cpu()


@everywhere
def test_from_zeros_the_momentum_is_the_gradient_of_l1_norm_1(device: str, name: str) -> None:
    grad = _gradient(device)
    with backend(name):
        momentum = momentum_update_(torch.zeros_like(grad), grad, 0.7)
    torch.testing.assert_close(_l1(momentum), torch.ones(4).double())
    assert torch.equal(momentum.sign(), grad.sign())


@everywhere
def test_what_was_accumulated_decays(device: str, name: str) -> None:
    first, second = _gradient(device), _gradient(device, seed=1)
    with backend(name):
        momentum = momentum_update_(torch.zeros_like(first), first, 0.5)
        alone = momentum_update_(torch.zeros_like(first), second, 0.5)
        expected = 0.5 * momentum + alone
        assert momentum_update_(momentum, second, 0.5) is momentum
    assert torch.equal(momentum, expected)


@everywhere
def test_a_gradient_that_shares_a_part_of_the_momentums_memory(device: str, name: str) -> None:
    """As windows of one tensor: the update reads the elements as they were before it."""
    shared = torch.cat((_gradient(device).flatten(), _gradient(device, seed=1).flatten()))
    momentum, grad = (shared[at : at + 4 * 297].view(SHAPE) for at in (1, 0))
    before = momentum.clone(), grad.clone()
    with backend(name):
        expected = momentum_update_(*before, 0.5)
        momentum_update_(momentum, grad, 0.5)
    assert torch.equal(momentum, expected)


@everywhere
@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e30, 1e36])
def test_the_size_of_the_gradient_does_not_matter(device: str, name: str, size: float) -> None:
    grad = _gradient(device)
    with backend(name):
        usual = momentum_update_(torch.zeros_like(grad), grad)
        scaled = momentum_update_(torch.zeros_like(grad), grad * size)
    torch.testing.assert_close(scaled, usual, rtol=1e-5, atol=1e-9)


@everywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf, -torch.inf])
def test_an_unusable_gradient_adds_nothing(
    device: str, name: str, dtype: torch.dtype, value: float
) -> None:
    grad, start = _gradient(device).to(dtype), _gradient(device, seed=1)
    grad[1] = 0.0
    grad[1, 2, 3, 4] = value
    with backend(name):
        momentum = momentum_update_(start.clone(), grad, 0.5)
    assert torch.equal(momentum[1], start[1] * 0.5)
    assert not torch.isnan(momentum).any()
    assert (momentum[0] != start[0] * 0.5).any()


@everywhere
def test_a_float64_gradient_too_small_to_divide_by_adds_nothing(device: str, name: str) -> None:
    grad = torch.tensor([[5e-324, -5e-324], [1e-300, 3e-300]], dtype=torch.float64, device=device)
    with backend(name):
        momentum = momentum_update_(torch.ones(2, 2, device=device), grad)
    assert momentum.tolist() == [[1.0, 1.0], [1.25, 1.75]]


@everywhere
def test_inactive_samples_stay_whatever_their_memory_holds(device: str, name: str) -> None:
    grad, start = _gradient(device), _gradient(device, seed=1)
    grad[2], start[2] = torch.nan, torch.nan
    start[0, 0, 0, 0] = -0.0
    active = torch.tensor([False, True, False, True], device=device)
    with backend(name):
        momentum = momentum_update_(start.clone(), grad, 0.5, active=active)
        everything = momentum_update_(start.clone(), grad, 0.5)
    assert torch.equal(momentum[[1, 3]], everything[[1, 3]])
    assert torch.equal(momentum[0].signbit(), start[0].signbit())
    assert torch.equal(momentum[0], start[0])
    assert momentum[2].isnan().all()


@everywhere
def test_mi_fgsm(device: str, name: str) -> None:
    """Equations 6 and 7 of Dong et al. written out in float64, on a function with a known gradient."""
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(SHAPE, generator=generator).to(device)
    target = torch.rand(SHAPE, generator=generator).to(device)
    eps, alpha, decay = 0.1, 0.025, 0.9
    adv, momentum = x.clone(), torch.zeros_like(x)
    expected, accumulated = x.double(), torch.zeros_like(x).double()
    with backend(name):
        for _ in range(4):
            momentum_update_(momentum, adv - target, decay)
            adv = pgd_step(adv, momentum, x, eps, alpha)
            grad = expected - target.double()
            norm = grad.abs().flatten(1).sum(1).view(4, 1, 1, 1)
            accumulated = decay * accumulated + grad / norm
            expected = expected + alpha * accumulated.sign()
            expected = expected.clamp(x.double() - eps, x.double() + eps).clamp(0, 1)
    torch.testing.assert_close(adv.double(), expected, rtol=0, atol=1e-6)


def test_autograd_notices_what_is_overwritten() -> None:
    weight = torch.ones(SHAPE, requires_grad=True)
    momentum = torch.zeros(SHAPE)
    loss = (weight * momentum).sum()
    momentum_update_(momentum, _gradient("cpu"))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
