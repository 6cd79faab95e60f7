"""Distance of attention maps: known maps, invariances, special features, both layouts."""

from __future__ import annotations

import math

import pytest
import torch
from op_cases.running import places
from torch import Tensor

from fastadv.ops import attention_map_distance, backend

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")
everywhere = pytest.mark.parametrize(("device", "name"), places("attention_map_distance"))


def _features(device: str, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def _plain(u: Tensor, v: Tensor) -> Tensor:
    """As the paper's code has it, in float64."""
    maps = [t.double().pow(2).sum(1).flatten(1) for t in (u, v)]
    units = [m / m.norm(dim=1, keepdim=True) for m in maps]
    return (units[0] - units[1]).norm(dim=1)


@everywhere
def test_known_maps(device: str, name: str) -> None:
    """Attention at one of two places each: equal, disjoint, and at 45 degrees."""
    u = torch.tensor([[[1.0, 0.0], [2.0, 0.0]]], device=device).repeat(3, 1, 1)
    v = torch.tensor([[[3.0, 0.0]], [[0.0, 5.0]], [[0.7, 0.7]]], device=device)
    with backend(name):
        distance = attention_map_distance(u, v)
    angle = math.pi / 4
    expected = [0.0, math.sqrt(2), math.sqrt(2 - 2 * math.cos(angle))]
    assert distance.tolist() == pytest.approx(expected, abs=1e-7)


@everywhere
def test_it_depends_on_where_the_energy_is_alone(device: str, name: str) -> None:
    """Neither a factor, nor signs, nor the order of the channels, nor their number matters."""
    u, v = _features(device, 4, 6, 3, 5), _features(device, 4, 9, 3, 5, seed=1)
    with backend(name):
        plain = attention_map_distance(u, v)
        torch.testing.assert_close(attention_map_distance(-3 * u, v), plain)
        torch.testing.assert_close(attention_map_distance(u.flip(1), v), plain)
        halves = torch.cat((u, u), 1) / math.sqrt(2)
        torch.testing.assert_close(attention_map_distance(halves, v), plain)
        torch.testing.assert_close(attention_map_distance(v, u), plain)
    torch.testing.assert_close(plain.double(), _plain(u, v), rtol=1e-5, atol=0)


@everywhere
def test_equal_features_have_distance_and_gradient_zero(device: str, name: str) -> None:
    for layout in (torch.contiguous_format, torch.channels_last):
        u = _features(device, 3, 40, 5, 7).contiguous(memory_format=layout)
        v = u.clone().requires_grad_()
        u.requires_grad_()
        with backend(name):
            distance = attention_map_distance(u, v)
            distance.sum().backward()
        assert not distance.any()
        assert not u.grad.any() and not v.grad.any()


@everywhere
@pytest.mark.parametrize("shape", [(3, 40, 1, 1), (3, 40)])
def test_one_position_has_no_distance(device: str, name: str, shape: tuple[int, ...]) -> None:
    """A map of one position is the unit vector, whatever the features."""
    u, v = _features(device, *shape).requires_grad_(), _features(device, *shape, seed=1)
    with backend(name):
        distance = attention_map_distance(u, v)
        distance.sum().backward()
    assert distance.tolist() == [0.0, 0.0, 0.0]
    assert not u.grad.any()


@everywhere
def test_a_zero_map_is_the_zero_vector(device: str, name: str) -> None:
    """At distance 1 from any other map, 0 from itself; the gradient is 0 on both sides."""
    u, v = _features(device, 4, 3, 5), _features(device, 4, 3, 5, seed=1)
    u[0], v[1], u[2], v[2] = 0, 0, 0, 0
    u.requires_grad_()
    v.requires_grad_()
    with backend(name):
        distance = attention_map_distance(u, v)
        distance.sum().backward()
    assert distance[:3].tolist() == pytest.approx([1.0, 1.0, 0.0])
    for gradient in (u.grad, v.grad):
        assert not gradient[:3].any()
        assert gradient[3].any()


@everywhere
def test_a_nan_feature_shows_in_its_sample_alone(device: str, name: str) -> None:
    u, v = _features(device, 3, 4, 9).requires_grad_(), _features(device, 3, 4, 9, seed=1)
    v[1, 2, 4] = torch.nan
    with backend(name):
        distance = attention_map_distance(u, v)
        distance.sum().backward()
    assert distance.isnan().tolist() == [False, True, False]
    assert u.grad.isnan().flatten(1).any(1).tolist() == [False, True, False]


@everywhere
@pytest.mark.parametrize("magnitude", [1e-17, 1e-12, 1e15, 1e17])
def test_magnitudes_within_the_range(device: str, name: str, magnitude: float) -> None:
    """The squares of a map are fourth powers of features, which must not matter."""
    u, v = _features(device, 2, 5, 4, 3), _features(device, 2, 5, 4, 3, seed=1)
    far = (u * magnitude).requires_grad_()
    near = u.clone().requires_grad_()
    with backend(name):
        distance, plain = attention_map_distance(far, v), attention_map_distance(near, v)
        distance.sum().backward()
        plain.sum().backward()
    torch.testing.assert_close(distance, plain, rtol=1e-5, atol=0)
    torch.testing.assert_close(far.grad * magnitude, near.grad, rtol=1e-4, atol=1e-6)


@everywhere
def test_what_leaves_the_range(device: str, name: str) -> None:
    """Squares that vanish make a map of zeros, squares that overflow NaN."""
    u, v = _features(device, 2, 5, 4, 3), _features(device, 2, 5, 4, 3, seed=1)
    u = (u * torch.tensor([1e-25, 1e25], device=device).view(2, 1, 1, 1)).requires_grad_()
    with backend(name):
        distance = attention_map_distance(u, v)
        distance[0].backward()
    assert distance[0].item() == pytest.approx(1.0) and distance[1].isnan()
    assert not u.grad[0].any()


@everywhere
def test_constant_features_do_not_drift(device: str, name: str) -> None:
    """Sums of equal terms round the same way each time, which naive float32 sums do not survive."""
    u = torch.full((1, 2048, 4, 4), 0.7234, device=device)
    for layout in (torch.contiguous_format, torch.channels_last):
        features = u.contiguous(memory_format=layout)
        with backend(name):
            _, maps, _, norms = torch.ops.fastadv.attention_map_distance(features, features)
        energy = 2048 * float(u[0, 0, 0, 0].double()) ** 2
        assert maps.flatten().tolist() == pytest.approx([energy] * 16, rel=1e-6)
        assert norms.flatten().tolist() == pytest.approx([4 * energy] * 2, rel=1e-6)


@everywhere
def test_dtypes_and_layouts_of_the_two_may_differ(device: str, name: str) -> None:
    u = _features(device, 2, 8, 5, 5).to(torch.bfloat16).to(memory_format=torch.channels_last)
    v = _features(device, 2, 12, 5, 5, seed=1)
    u.requires_grad_()
    v.requires_grad_()
    with backend(name):
        distance = attention_map_distance(u, v)
        distance.sum().backward()
    wide = [t.detach().double().requires_grad_() for t in (u, v)]
    exact = _plain(*wide)
    exact.sum().backward()
    assert distance.dtype == torch.float32
    torch.testing.assert_close(distance.double(), exact, rtol=1e-5, atol=0)
    for t, other in zip((u, v), wide, strict=True):
        assert t.grad.dtype == t.dtype and t.grad.stride() == t.stride()
        torch.testing.assert_close(t.grad, other.grad.to(t.dtype))


@everywhere
def test_three_spatial_axes_with_the_channels_last(device: str, name: str) -> None:
    u, v = _features(device, 2, 6, 2, 3, 4), _features(device, 2, 6, 2, 3, 4, seed=1)
    last = u.contiguous(memory_format=torch.channels_last_3d).requires_grad_()
    with backend(name):
        distance = attention_map_distance(last, v)
        distance.sum().backward()
    torch.testing.assert_close(distance.detach().double(), _plain(u, v), rtol=1e-5, atol=0)
    assert last.grad.stride() == last.stride()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_too_large_for_the_caches(layout: torch.memory_format) -> None:
    """From 16 MB on the CPU kernel writes past the caches, in blocks that rows do not align with."""
    u = _features("cpu", 3, 301, 73, 71).contiguous(memory_format=layout).requires_grad_()
    v = _features("cpu", 3, 5, 73, 71, seed=1)
    attention_map_distance(u, v).sum().backward()
    wide = u.detach().double().requires_grad_()
    _plain(wide, v).sum().backward()
    torch.testing.assert_close(u.grad.double(), wide.grad, rtol=1e-4, atol=1e-8)
