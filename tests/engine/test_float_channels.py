"""The passes over rows of channels in float32: against float64, and against torch at infinite numbers and NaN."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastadv.engine import cpu_channels
from fastadv.engine import cpu_convolution as convolution

OPS = torch.ops.fastadv
LIMITS = torch.finfo(torch.float32)
pytestmark = [
    pytest.mark.usefixtures("seeded"),
    pytest.mark.skipif(not convolution.available(), reason="the passes are in the compiled part"),
]

Exact = tuple[Tensor, Tensor, Tensor, Tensor | float]  # value, slope, terms of the slope, exponent


def with_slope(f: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    value = f(leaf)
    return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]


def pieces(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Exact]:
    def exact(x: Tensor) -> Exact:
        value, slope = with_slope(f, x)
        return value, slope, slope.abs() + 1, 0.0

    return exact


def sigmoid(x: Tensor) -> Exact:
    rise = torch.sigmoid(x) * torch.sigmoid(-x)
    return torch.sigmoid(x), rise, rise, 0.0


def silu(x: Tensor) -> Exact:
    s, rise = torch.sigmoid(x), torch.sigmoid(x) * torch.sigmoid(-x)
    return x * s, s + x * rise, s + x.abs() * rise, 0.0


def gelu(x: Tensor) -> Exact:
    # torch's own formula loses the digits of the lower tail, also in float64.
    below, density = (
        0.5 * torch.special.erfc(-x * 0.5**0.5),
        (-x * x / 2).exp() / (2 * torch.pi) ** 0.5,
    )
    return x * below, below + x * density, below + x.abs() * density, x * x / 4


def gelu_tanh(x: Tensor) -> Exact:
    scale = 2 * (2 / torch.pi) ** 0.5
    z, steep = scale * (x + 0.044715 * x**3), scale * (1 + 3 * 0.044715 * x * x)
    s, rise = torch.sigmoid(z), torch.sigmoid(z) * torch.sigmoid(-z) * steep
    return x * s, s + x * rise, s + x.abs() * rise, 1.5 * z.abs()


# As in `cpu_channels.ACTIVATIONS`: torch's function, and its exact numbers.
KINDS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Exact]]] = {
    "gelu": (F.gelu, gelu),
    "gelu_tanh": (lambda x: F.gelu(x, approximate="tanh"), gelu_tanh),
    "silu": (F.silu, silu),
    "hardswish": (F.hardswish, pieces(F.hardswish)),
    "hardsigmoid": (F.hardsigmoid, pieces(F.hardsigmoid)),
    "sigmoid": (torch.sigmoid, sigmoid),
    "relu6": (F.relu6, pieces(F.relu6)),
}
UNITS = 4  # in the last place, as csrc/cpu/activations_float.h states


def all_magnitudes() -> Tensor:
    """Numbers of both signs and every exponent, subnormal ones as well, and many where the functions bend."""
    bits = torch.arange(-(2**31), 2**31, 2**32 // 400_001).to(torch.int32).view(torch.float32)
    some = torch.tensor([0.0, -0.0, 3.0, -3.0, 6.0, LIMITS.max, -LIMITS.max, LIMITS.tiny])
    return torch.cat([bits[bits.isfinite()], torch.linspace(-100, 100, 400_001), some])


def value_and_gradient(kind: str, x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    number, out, back = (
        cpu_channels.ACTIVATIONS.index(kind),
        torch.empty_like(x),
        torch.empty_like(x),
    )
    OPS.activation_(out, x, number)
    OPS.activation_backward_(back, gradient, x, number)
    return out, back


@pytest.mark.parametrize("kind", cpu_channels.ACTIVATIONS)
def test_activations_at_every_magnitude(kind: str) -> None:
    x = all_magnitudes()
    value, slope, terms, exponent = KINDS[kind][1](x.double())
    terms = torch.nan_to_num(terms)
    out, back = value_and_gradient(kind, x, torch.ones_like(x))
    # An exponent's rounding is a relative error of its power. A power below the normal numbers is 0, and so are
    # its products with polynomials of x.
    units = (UNITS + torch.as_tensor(exponent)) * LIMITS.eps
    least = (x.double().abs() + 1) * (x.double() ** 2 + 1).clamp(max=1e4) * 4 * LIMITS.tiny
    value, slope, units = (torch.nan_to_num(t, posinf=1e30) for t in (value, slope, units))
    assert (out.double() - value).abs().le(units * value.abs() + least).all()
    assert (back.double() - slope).abs().le(units * terms + least).all()
    assert torch.equal(out.signbit()[out != 0], value.float().signbit()[out != 0])


@pytest.mark.parametrize("kind", cpu_channels.ACTIVATIONS)
def test_infinite_numbers_and_nan_are_torchs(kind: str) -> None:
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 3.0, -3.0, 6.0])
    wanted, slope = with_slope(KINDS[kind][0], x)
    out, back = value_and_gradient(kind, x, torch.ones_like(x))
    assert torch.allclose(out, wanted, atol=1e-6, equal_nan=True)
    assert torch.allclose(back, slope, atol=1e-6, equal_nan=True)
    # A gradient may be infinite where the slope is 0.
    leaf = torch.tensor([-3.0, 7.0, 1.0, 0.0]).requires_grad_()
    gradient = torch.tensor([torch.inf, -torch.inf, torch.nan, torch.inf])
    (wanted,) = torch.autograd.grad(KINDS[kind][0](leaf), leaf, gradient)
    _, back = value_and_gradient(kind, leaf.detach(), gradient)
    assert torch.equal(back.isnan(), wanted.isnan())
    assert torch.equal(back.isinf(), wanted.isinf())


@pytest.mark.parametrize("kind", ["gelu", "silu", "hardswish"])
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 15, 16, 33, 70_001])
def test_an_elements_result_does_not_depend_on_its_place(kind: str, count: int) -> None:
    x, gradient = torch.randn(count + 3) * 3, torch.randn(count + 3)
    whole = value_and_gradient(kind, x, gradient)
    for part, found in zip(whole, value_and_gradient(kind, x[3:], gradient[3:]), strict=True):
        assert torch.equal(found, part[3:])
    turned = value_and_gradient(kind, x.flip(0), gradient.flip(0))
    for part, found in zip(whole, turned, strict=True):
        assert torch.equal(found, part.flip(0))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_layouts_are_kept(layout: torch.memory_format) -> None:
    x = torch.randn(2, 5, 3, 7).contiguous(memory_format=layout)
    out, back = value_and_gradient("silu", x, torch.ones_like(x))
    wanted, slope = with_slope(F.silu, x)
    assert (out - wanted).abs().max() < 1e-6
    assert (back - slope).abs().max() < 1e-6


@pytest.mark.parametrize("channels", [1, 7, 8, 16, 40, 96, 385, 1031])
@pytest.mark.parametrize("affine", [True, False])
def test_norm_of_rows_and_its_gradient(channels: int, affine: bool) -> None:
    x = torch.randn(3, 5, channels) * 2 + 4  # far from 0, where careless sums cancel
    weight, bias = (torch.randn(channels), torch.randn(channels)) if affine else (None, None)
    leaf = x.double().requires_grad_()
    double = [None if t is None else t.double() for t in (weight, bias)]
    wanted = F.layer_norm(leaf, (channels,), *double, eps=1e-5)
    out, statistics = torch.empty_like(x), torch.empty(15, 2)
    OPS.rows_norm_(out, statistics, x, weight, bias, 1e-5)
    assert (out.double() - wanted).abs().max() < 2e-6 * wanted.abs().max() + 1e-7
    gradient, add = torch.randn_like(x), torch.randn_like(x)
    (slope,) = torch.autograd.grad(wanted, leaf, gradient.double())
    # Of one channel the terms, of the size of 1 / sqrt(eps), cancel to 0.
    budget = 3e-6 * (slope.abs().max() + statistics[:, 1].max())
    OPS.rows_norm_backward_(out, gradient, x, statistics, weight, None)
    assert (out.double() - slope).abs().max() < budget
    OPS.rows_norm_backward_(out, gradient, x, statistics, weight, add)
    assert (out.double() - slope - add.double()).abs().max() < budget + 1e-6


def test_norms_of_equal_and_of_infinite_rows_are_torchs() -> None:
    x = torch.ones(5, 19)
    x[1], x[2, 3], x[3, 18], x[4] = 1e4, torch.inf, torch.nan, 1e-30
    out, statistics = torch.empty_like(x), torch.empty(5, 2)
    OPS.rows_norm_(out, statistics, x, None, None, 1e-5)
    assert torch.allclose(out, F.layer_norm(x, (19,)), atol=1e-4, equal_nan=True)


def image(*shape: int) -> Tensor:
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "shape", [(2, 24, 5, 3), (1, 16, 1, 7), (3, 33, 4, 4), (1, 1030, 9, 8), (2, 1, 20, 20)]
)
def test_gates_and_their_gradients(shape: tuple[int, ...]) -> None:
    x, gradient, gate = image(*shape), image(*shape), torch.randn(shape[:2])
    out, sums = torch.empty_like(x), torch.empty(shape[:2])
    OPS.channel_gate_(out, x, gate)
    assert torch.equal(out, x * gate[:, :, None, None])
    OPS.channel_gate_backward_(out, sums, gradient, x, gate)
    assert torch.equal(out, gradient * gate[:, :, None, None])
    products = gradient.double() * x.double()
    error = (sums - products.sum((2, 3))).abs()
    assert error.le(1e-6 * products.abs().sum((2, 3))).all()


def test_sums_of_many_pixels_are_more_exact_than_one_run() -> None:
    pixels = 224 * 224
    x = torch.full((1, 8, 224, 224), 0.1).contiguous(memory_format=torch.channels_last)
    out, sums = torch.empty_like(x), torch.empty(1, 8)
    OPS.channel_gate_backward_(out, sums, x, x, torch.ones(1, 8))
    product = x[0, 0, 0, 0] ** 2
    run = np.add.accumulate(np.full(pixels, product.item(), np.float32))[-1]
    wanted = pixels * product.double()
    assert ((sums - wanted) / wanted).abs().max() < 0.1 * abs(float(run) - wanted) / wanted


@pytest.mark.parametrize("shape", [(2, 24, 5, 3), (1, 16, 1, 7), (3, 33, 4, 1), (2, 7, 1, 1)])
def test_passes_over_the_first_channels_of_a_map(shape: tuple[int, ...]) -> None:
    batch, channels, *size = shape
    whole, gradient = image(batch, channels + 9, *size), image(*shape)
    scale, shift = torch.randn(channels), torch.randn(channels)
    x, out = whole[:, :channels], torch.empty_like(gradient)
    by_channel, added = (t[:, None, None].double() for t in (scale, shift))
    wanted = x.double() * by_channel + added
    OPS.strided_affine_(out, x, scale, shift, False)
    assert torch.allclose(out.double(), wanted, rtol=1e-6, atol=1e-6)
    OPS.strided_affine_(out, x, scale, shift, True)
    assert torch.allclose(out.double(), F.relu(wanted), rtol=1e-6, atol=1e-6)
    before = whole.clone(memory_format=torch.channels_last)
    OPS.strided_scale_(x, gradient, scale, True)
    wanted = before[:, :channels].double() + gradient.double() * by_channel
    assert torch.allclose(x.double(), wanted, rtol=1e-6, atol=1e-6)
    OPS.strided_scale_(x, gradient, scale, False)
    assert torch.equal(x, gradient * scale[:, None, None])
    assert torch.equal(whole[:, channels:], before[:, channels:])
    gradient[0, 0, 0, 0] = torch.nan
    OPS.strided_affine_(out, gradient, scale, shift, True)
    assert out[0, 0, 0, 0].isnan()


def test_wrong_tensors_are_refused() -> None:
    x = image(2, 16, 4, 4)
    with pytest.raises(ValueError, match="out must be dense float32 with the shape and strides"):
        OPS.activation_(torch.empty_like(x, memory_format=torch.contiguous_format), x, 0)
    with pytest.raises(ValueError, match="gradient must be dense float32"):
        OPS.activation_backward_(torch.empty_like(x), x.double(), x, 0)
    with pytest.raises(ValueError, match=r"gate must be contiguous float32 of shape \[2, 16\]"):
        OPS.channel_gate_(torch.empty_like(x), x, torch.rand(2, 8))
    with pytest.raises(ValueError, match="total must be float32 of shape"):
        OPS.strided_scale_(x.double(), x, torch.rand(16), False)
