"""Angular distance and replay mask: special vectors, the range, the switch."""

from __future__ import annotations

import math

import pytest
import torch
from op_cases.running import places
from torch import Tensor
from torch.nn import functional as F

from fastadv.ops import angular_distance, backend, replay_mask

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")
everywhere = pytest.mark.parametrize(("device", "name"), places("angular_distance"))


def _features(device: str, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


@everywhere
def test_known_angles(device: str, name: str) -> None:
    """At angle phi the distance is 1 - |cos phi|, whatever the lengths."""
    degrees = [0.0, 30.0, 45.0, 60.0, 90.0, 120.0, 180.0]
    phi = torch.tensor(degrees, dtype=torch.float64) * math.pi / 180
    u = torch.tensor([[3.0, 0.0]], dtype=torch.float64).repeat(len(phi), 1).to(device)
    v = (0.25 * torch.stack((phi.cos(), phi.sin()), 1)).to(device)
    with backend(name):
        distance = angular_distance(u, v)
    assert distance.tolist() == pytest.approx((1 - phi.cos().abs()).tolist(), abs=1e-12)


@everywhere
def test_a_zero_vector_has_distance_one_and_gradient_zero(device: str, name: str) -> None:
    u, v = _features(device, 4, 3, 5), _features(device, 4, 3, 5, seed=1)
    u[0], v[1], u[2], v[2] = 0, 0, 0, 0
    u.requires_grad_()
    v.requires_grad_()
    with backend(name):
        distance = angular_distance(u, v)
        distance.sum().backward()
    assert distance[:3].tolist() == [1.0, 1.0, 1.0]
    for gradient in (u.grad, v.grad):
        assert not gradient[:3].any()
        assert gradient[3].abs().min() > 0


@everywhere
@pytest.mark.parametrize("factor", [1.0, 0.3, 7.0, -1.0, -0.01])
def test_parallel_vectors(device: str, name: str, factor: float) -> None:
    u = _features(device, 50, 77).requires_grad_()
    v = (factor * u).detach().requires_grad_()
    with backend(name):
        distance = angular_distance(u, v)
        distance.sum().backward()
    assert float(distance.detach().max()) < 1e-6
    assert float(u.grad.abs().max()) < 1e-6
    assert float(v.grad.abs().max()) < 1e-6 / abs(factor)


@everywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_distances_lie_in_zero_to_one(device: str, name: str, dtype: torch.dtype) -> None:
    """Rounding would carry parallel vectors below zero."""
    for seed in range(20):
        u = _features(device, 64, 33, seed=seed).to(dtype)
        v = u * 3 if seed % 2 else _features(device, 64, 33, seed=seed + 100).to(dtype)
        with backend(name):
            distance = angular_distance(u, v)
        assert distance.dtype == torch.float32
        assert float(distance.min()) >= 0 and float(distance.max()) <= 1


@everywhere
def test_orthogonal_vectors_have_no_gradient(device: str, name: str) -> None:
    """|u.v| has a kink there; its subgradient 0 is taken, as torch takes it for abs."""
    u = torch.tensor([[1.0, 0.0]], device=device, requires_grad=True)
    v = torch.tensor([[0.0, 2.0]], device=device)
    with backend(name):
        distance = angular_distance(u, v)
        distance.sum().backward()
    assert distance.tolist() == [1.0]
    assert u.grad.tolist() == [[0.0, 0.0]]


@everywhere
def test_constant_features_do_not_drift(device: str, name: str) -> None:
    """Sums of equal terms round the same way each time, which naive float32 sums do not survive."""
    u = torch.full((2, 640, 32, 32), 0.7234, device=device)
    v = torch.full((2, 640, 32, 32), 0.3456, device=device)
    with backend(name):
        assert float(angular_distance(u, v).max()) < 1e-6


@everywhere
def test_the_gradient_has_the_dtype_and_layout_of_its_argument(device: str, name: str) -> None:
    u = _features(device, 2, 8, 5, 5).to(torch.bfloat16).to(memory_format=torch.channels_last)
    v = _features(device, 2, 8, 5, 5, seed=1)
    u.requires_grad_()
    v.requires_grad_()
    with backend(name):
        distance = angular_distance(u, v)
        distance.sum().backward()
    assert distance.dtype == torch.float32
    assert u.grad.dtype == torch.bfloat16 and u.grad.stride() == u.stride()
    assert v.grad.dtype == torch.float32 and v.grad.stride() == v.stride()


@everywhere
def test_the_incoming_gradient_weighs_each_sample(device: str, name: str) -> None:
    u, v = _features(device, 3, 9).requires_grad_(), _features(device, 3, 9, seed=1)
    weight = torch.tensor([2.0, 0.0, -1.0], device=device)
    with backend(name):
        (plain,) = torch.autograd.grad(angular_distance(u, v).sum(), u)
        (weighted,) = torch.autograd.grad(angular_distance(u, v), u, weight)
    torch.testing.assert_close(weighted, weight[:, None] * plain)


@everywhere
@pytest.mark.parametrize("magnitude", [1e-15, 1e15])
def test_magnitudes_within_the_range(device: str, name: str, magnitude: float) -> None:
    """The product of the squared lengths would leave it."""
    u, v = _features(device, 3, 9), _features(device, 3, 9, seed=1)
    far = (u * magnitude).requires_grad_()
    near = u.clone().requires_grad_()
    with backend(name):
        distance, plain = angular_distance(far, v * magnitude), angular_distance(near, v)
        distance.sum().backward()
        plain.sum().backward()
    torch.testing.assert_close(distance, plain, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(far.grad * magnitude, near.grad, rtol=1e-4, atol=1e-6)


@everywhere
@pytest.mark.parametrize("other", [1.0, 1e20])
def test_features_whose_squares_overflow_show(device: str, name: str, other: float) -> None:
    """A norm that is infinite says nothing of the angle: no distance of 1 without a gradient."""
    u, v = _features(device, 3, 9), _features(device, 3, 9, seed=1)
    u[1] *= 1e20
    v[1] *= other
    with backend(name):
        again, replayed = replay_mask(u, v, 0.5)
        u.requires_grad_()
        v.requires_grad_()
        distance = angular_distance(u, v)
        distance.sum().backward()
    for result in (distance, again, u.grad.sum(1), v.grad.sum(1)):
        assert result.isnan().tolist() == [False, True, False]
    assert not replayed[1]


@everywhere
def test_a_nan_feature_shows(device: str, name: str) -> None:
    u, v = _features(device, 3, 9), _features(device, 3, 9, seed=1)
    u[1, 4] = torch.nan
    with backend(name):
        distance = angular_distance(u, v)
        again, replayed = replay_mask(u, v, 0.5)
        u.requires_grad_()
        angular_distance(u, v).sum().backward()
    for result in (distance, again, u.grad.sum(1)):
        assert result.isnan().tolist() == [False, True, False]
    assert not replayed[1]


@everywhere
def test_the_switch_is_distance_above_tau(device: str, name: str) -> None:
    u, v = _features(device, 64, 5), _features(device, 64, 5, seed=1)
    with backend(name):
        distance, replayed = replay_mask(u, v, 0.4)
        assert torch.equal(distance, angular_distance(u, v))
        assert torch.equal(replayed, distance > 0.4)
        assert 0 < int(replayed.sum()) < 64
        at_tau = float(distance[7])  # equality is not a drift beyond tau
        assert not replay_mask(u, v, at_tau)[1][7]
        assert replay_mask(u, v, math.nextafter(at_tau, 0) - 1e-6)[1][7]
        assert replay_mask(u, v, -math.inf)[1].all()
        assert not replay_mask(u, v, math.inf)[1].any()


def test_the_switch_carries_no_gradient() -> None:
    u, v = _features("cpu", 4, 5).requires_grad_(), _features("cpu", 4, 5, seed=1)
    distance, replayed = replay_mask(u, v, 0.4)
    assert not distance.requires_grad
    assert not replayed.requires_grad


@pytest.mark.slow
@pytest.mark.parametrize("leaves", ["u", "v", "uv"])
def test_gradients_too_large_for_the_caches(leaves: str) -> None:
    """From 16 MB on the CPU kernel writes past the caches, in blocks that samples do not align with."""
    shape = (3, 1_500_001)
    features = {name: _features("cpu", *shape, seed=seed) for seed, name in enumerate("uv")}
    wide = {name: t.double() for name, t in features.items()}
    for name in leaves:
        features[name].requires_grad_()
        wide[name].requires_grad_()
    angular_distance(**features).sum().backward()
    (1 - F.cosine_similarity(wide["u"], wide["v"]).abs()).sum().backward()
    for name in leaves:
        found, expected = features[name].grad.double(), wide[name].grad
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-9)
