"""Euclidean distance: known lengths, special vectors, the range, the gradients asked for."""

from __future__ import annotations

import math

import pytest
import torch
from op_cases.running import places
from torch import Tensor

from fastadv.ops import backend, euclidean_distance

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")
everywhere = pytest.mark.parametrize(("device", "name"), places("euclidean_distance"))
backward = torch.ops.fastadv.euclidean_distance_backward


def _features(device: str, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


@everywhere
def test_known_lengths(device: str, name: str) -> None:
    u = torch.tensor([[3.0, 4.0], [1.0, 1.0], [0.0, 0.0]], device=device)
    v = torch.tensor([[0.0, 0.0], [1.0, -1.0], [-0.6, 0.8]], device=device)
    with backend(name):
        assert euclidean_distance(u, v).tolist() == pytest.approx([5.0, 2.0, 1.0])
        assert euclidean_distance(u, v, squared=True).tolist() == pytest.approx([25.0, 4.0, 1.0])


@everywhere
def test_the_gradient_is_the_unit_difference(device: str, name: str) -> None:
    u = torch.tensor([[3.0, 4.0]], device=device, requires_grad=True)
    v = torch.zeros(1, 2, device=device, requires_grad=True)
    with backend(name):
        euclidean_distance(u, v).sum().backward()
    assert u.grad.tolist()[0] == pytest.approx([0.6, 0.8])
    assert torch.equal(v.grad, -u.grad)


@everywhere
@pytest.mark.parametrize("squared", [False, True])
def test_equal_and_zero_vectors(device: str, name: str, squared: bool) -> None:
    """Equal vectors are at distance 0 with gradient 0; a zero vector is like any other."""
    u, v = _features(device, 4, 3, 5), _features(device, 4, 3, 5, seed=1)
    u[0], v[1], u[2] = 0, 0, v[2]
    u.requires_grad_()
    v.requires_grad_()
    with backend(name):
        distance = euclidean_distance(u, v, squared)
        distance.sum().backward()
    length = torch.stack((v[0], u[1])).flatten(1).norm(dim=1).detach()
    torch.testing.assert_close(distance[:2].detach(), length**2 if squared else length)
    assert distance[2] == 0
    for gradient in (u.grad, v.grad):
        assert not gradient[2].any()
        assert gradient[[0, 1, 3]].flatten(1).any(1).all()


@everywhere
def test_a_nan_feature_shows_in_its_sample_alone(device: str, name: str) -> None:
    u, v = _features(device, 3, 9).requires_grad_(), _features(device, 3, 9, seed=1)
    v[1, 4] = torch.nan
    with backend(name):
        distance = euclidean_distance(u, v)
        distance.sum().backward()
    assert distance.isnan().tolist() == [False, True, False]
    assert u.grad.isnan().all(1).tolist() == [False, True, False]
    assert not u.grad[[0, 2]].isnan().any()


@everywhere
def test_nan_of_any_bits_is_nan_in_half_precision(device: str, name: str) -> None:
    """Rounded like a number, one with its lowest bits set would become a zero."""
    u = _features(device, 1, 9).bfloat16().requires_grad_()
    grad = torch.tensor([0x7FFFFFFF], dtype=torch.int32, device=device).view(torch.float32)
    with backend(name):
        euclidean_distance(u, torch.zeros_like(u)).backward(grad)
    assert u.grad.isnan().all()


@everywhere
@pytest.mark.parametrize("magnitude", [1e-18, 1e-15, 1e15, 1e18])
def test_magnitudes_within_the_range(device: str, name: str, magnitude: float) -> None:
    u, v = _features(device, 2, 33), _features(device, 2, 33, seed=1)
    large, other = (u * magnitude).requires_grad_(), v * magnitude
    with backend(name):
        distance = euclidean_distance(large, other)
        distance.sum().backward()
    exact = (large.detach().double() - other.double()).norm(dim=1)
    torch.testing.assert_close(distance.detach().double(), exact, rtol=1e-5, atol=0)
    unit = (large.detach().double() - other.double()) / exact[:, None]
    torch.testing.assert_close(large.grad.double(), unit, rtol=1e-5, atol=1e-7)


@everywhere
def test_what_leaves_the_range(device: str, name: str) -> None:
    """Squares that vanish leave a distance of 0, squares that overflow an infinite one; gradients are 0."""
    u = torch.full((2, 7), 1e-25, device=device)
    u[1] = 1e25
    u.requires_grad_()
    with backend(name):
        distance = euclidean_distance(u, torch.zeros_like(u))
        distance.sum().backward()
    assert distance.tolist() == [0.0, math.inf]
    assert not u.grad.any()


@everywhere
def test_constant_features_do_not_drift(device: str, name: str) -> None:
    """Sums of equal terms round the same way each time, which naive float32 sums do not survive."""
    u = torch.full((2, 640, 32, 32), 0.7234, device=device)
    v = torch.full((2, 640, 32, 32), 0.3456, device=device)
    with backend(name):
        distance = euclidean_distance(u, v)
    exact = (u[0, 0, 0, 0].double() - v[0, 0, 0, 0].double()) * math.sqrt(640 * 32 * 32)
    assert distance.tolist() == pytest.approx([float(exact)] * 2, rel=1e-6)


@everywhere
def test_dtypes_and_layouts_of_the_two_may_differ(device: str, name: str) -> None:
    u = _features(device, 2, 8, 5, 5).to(torch.bfloat16).to(memory_format=torch.channels_last)
    v = _features(device, 2, 8, 5, 5, seed=1)
    u.requires_grad_()
    v.requires_grad_()
    with backend(name):
        distance = euclidean_distance(u, v)
        distance.sum().backward()
    difference = (u.float() - v).detach()
    length = difference.flatten(1).norm(dim=1)
    unit = difference / length.view(-1, 1, 1, 1)
    torch.testing.assert_close(distance.detach(), length)
    assert u.grad.dtype == torch.bfloat16 and u.grad.stride() == u.stride()
    assert v.grad.dtype == torch.float32 and v.grad.stride() == v.stride()
    torch.testing.assert_close(v.grad, -unit)
    torch.testing.assert_close(u.grad, unit.to(torch.bfloat16))


@everywhere
def test_the_incoming_gradient_weighs_each_sample(device: str, name: str) -> None:
    u, v = _features(device, 3, 9).requires_grad_(), _features(device, 3, 9, seed=1)
    weight = torch.tensor([2.0, 0.0, -1.0], device=device)
    with backend(name):
        (plain,) = torch.autograd.grad(euclidean_distance(u, v).sum(), u)
        (weighted,) = torch.autograd.grad(euclidean_distance(u, v), u, weight)
    torch.testing.assert_close(weighted, weight[:, None] * plain)


@everywhere
def test_gradients_that_nobody_asks_for_are_empty(device: str, name: str) -> None:
    u, v = _features(device, 3, 4), _features(device, 3, 4, seed=1)
    with backend(name):
        distance = euclidean_distance(u, v)
        both = backward(distance, u, v, distance, False, True, True)
        for want_u in (False, True):
            for want_v in (False, True):
                found = backward(distance, u, v, distance, False, want_u, want_v)
                for gradient, full, wanted in zip(found, both, (want_u, want_v), strict=True):
                    assert torch.equal(gradient, full if wanted else full.new_empty(0))


@pytest.mark.parametrize("offset", [0, 3])
def test_results_too_large_for_the_caches(offset: int) -> None:
    """From 16 MB on the CPU kernel writes past the caches, in blocks that samples do not align with."""
    shape = (3, 1_500_001)
    u = _features("cpu", 3 * 1_500_001 + offset)[offset:].view(shape)
    v = _features("cpu", *shape, seed=1)
    distance = euclidean_distance(u, v)
    slope = 1 / distance[:, None]
    of_u, of_v = backward(torch.ones(3), u, v, distance, False, True, True)
    torch.testing.assert_close(of_u, slope * (u - v))
    assert torch.equal(of_v, -of_u)
    alone, _ = backward(torch.ones(3), u, v, distance, False, True, False)
    assert torch.equal(alone, of_u)
