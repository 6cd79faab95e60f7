"""The engine's own depthwise convolution, and its passes over rows of channels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastadv.engine import cpu_channels
from fastadv.engine.buffer_pool import Memory
from fastadv.engine.convolution_kernels import ConvShape, Epilogue
from fastadv.engine.depthwise import DepthwiseKernel, serves
from fastadv.engine.packed_convolution import make_kernel

OPS = torch.ops.fastadv
pytestmark = [
    pytest.mark.usefixtures("seeded"),
    pytest.mark.skipif(not cpu_channels.available(), reason="this processor has no AVX512-BF16"),
]


def narrow(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    values = values.bfloat16()
    return values.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values


def relative(found: Tensor, wanted: Tensor) -> float:
    return ((found.double() - wanted).norm() / wanted.norm().clamp(min=1e-30)).item()


# channels, kernel, stride, padding, height, width
DEPTHWISE = [
    (32, (3, 3), 1, (1, 1), 8, 15),
    (96, (7, 7), 1, (3, 3), 9, 8),
    (40, (5, 5), 2, (2, 2), 11, 9),
    (17, (3, 3), 2, (1, 1), 8, 10),
    (64, (7, 7), 2, (3, 3), 13, 16),
    (8, (5, 5), 1, (0, 0), 6, 7),
    (33, (3, 5), 1, (2, 4), 3, 2),
    (24, (5, 5), 1, (2, 2), 1, 1),
    (48, (3, 3), 2, (0, 0), 3, 4),
    (3, (7, 7), 1, (3, 3), 2, 30),
]


@pytest.mark.parametrize("case", DEPTHWISE)
def test_depthwise_kernel_in_both_directions(case: tuple) -> None:
    channels, kernel, stride, padding, height, width = case
    conv = ConvShape(
        channels, channels, kernel, (stride, stride), padding, (1, 1), channels
    )  # fmt: skip
    weight, scale = torch.randn(channels, 1, *kernel), torch.rand(channels) + 0.5
    folded = (weight * scale[:, None, None, None]).double()
    x, bias = narrow(3, channels, height, width), torch.randn(channels)
    plain = F.conv2d(x.double(), folded, None, stride, padding, 1, channels)
    add, mask = (narrow(*plain.shape, seed=seed) for seed in (1, 2))
    memory = Memory()
    forward, backward = (DepthwiseKernel(conv, backward) for backward in (False, True))
    forward.refresh(weight, scale)
    backward.refresh(weight, scale)

    out = forward.run(memory, tuple(plain.shape), x, Epilogue(bias, add, None, True))
    assert relative(out, F.relu(plain + bias[:, None, None] + add.double())) < 0.005
    out = forward.run(memory, tuple(plain.shape), x, Epilogue(mask=mask))
    assert relative(out, torch.where(mask > 0, plain, 0.0)) < 0.005
    gradient = narrow(*plain.shape, seed=3)
    at_input = backward.run(memory, tuple(x.shape), gradient, Epilogue(add=x, mask=x))
    wanted = torch.nn.grad.conv2d_input(
        x.shape, folded, gradient.double(), stride, padding, 1, channels
    )
    assert relative(at_input, torch.where(x > 0, wanted + x.double(), 0.0)) < 0.005


@pytest.mark.parametrize(
    ("change", "backward"),
    [
        ({"groups": 1}, False),
        ({"groups": 16}, False),
        ({"dilation": (2, 2)}, False),
        ({"stride": (1, 2)}, False),
        ({"stride": (3, 3)}, False),
        ({"kernel_size": (9, 9)}, False),
        ({"kernel_size": (1, 1), "stride": (2, 2)}, True),
    ],
)
def test_other_convolutions_are_not_taken(change: dict, backward: bool) -> None:
    conv = ConvShape(32, 32, (3, 3), (1, 1), (1, 1), (1, 1), 32)
    assert serves(conv, backward)
    assert isinstance(make_kernel(conv, backward), DepthwiseKernel)
    assert not serves(conv._replace(**change), backward)


def test_no_images_or_places() -> None:
    conv = ConvShape(32, 32, (3, 3), (1, 1), (1, 1), (1, 1), 32)
    kernel = DepthwiseKernel(conv, backward=False)
    kernel.refresh(torch.randn(32, 1, 3, 3), None)
    for shape in [(0, 32, 4, 4), (2, 32, 0, 4), (2, 32, 4, 0)]:
        assert kernel.run(Memory(), shape, narrow(*shape), Epilogue()).numel() == 0


FORMULAS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "sigmoid": torch.sigmoid,
    "relu6": F.relu6,
}


@pytest.mark.parametrize("kind", cpu_channels.ACTIVATIONS)
def test_activations_at_every_number(kind: str) -> None:
    """All 65,536 numbers of bfloat16 but NaN; the gradient is compared where it is not rounded away."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = bits.view(torch.bfloat16)
    x = x[x.isfinite() & (x.abs() < 1e30)]
    number, out = cpu_channels.ACTIVATIONS.index(kind), torch.empty_like(x)
    leaf = x.double().requires_grad_()
    wanted = FORMULAS[kind](leaf)
    (slope,) = torch.autograd.grad(wanted.sum(), leaf)
    OPS.activation_(out, x, number)
    assert (out.double() - wanted).abs().le(0.005 * wanted.abs() + 1e-4).all()
    OPS.activation_backward_(out, torch.ones_like(x), x, number)
    assert (out.double() - slope).abs().le(0.005 * slope.abs() + 1e-4).all()
    not_a_number = torch.full((3,), torch.nan, dtype=torch.bfloat16)
    OPS.activation_(out[:3], not_a_number, number)
    assert out[:3].isnan().all()


@pytest.mark.parametrize("channels", [1, 7, 16, 40, 96, 385])
@pytest.mark.parametrize("affine", [True, False])
def test_norm_of_rows_and_its_gradient(channels: int, affine: bool) -> None:
    x = narrow(3, 5, channels, scale=2.0) + 4  # far from 0, where careless sums cancel
    weight, bias = (torch.randn(channels), torch.randn(channels)) if affine else (None, None)
    leaf = x.double().requires_grad_()
    double = [None if t is None else t.double() for t in (weight, bias)]
    wanted = F.layer_norm(leaf, (channels,), *double, eps=1e-5)
    out, statistics = torch.empty_like(x), torch.empty(15, 2)
    OPS.rows_norm_(out, statistics, x, weight, bias, 1e-5)
    assert (out.double() - wanted).abs().max() < 0.005 * wanted.abs().max() + 1e-5
    gradient, add = narrow(*x.shape, seed=1), narrow(*x.shape, seed=2)
    (slope,) = torch.autograd.grad(wanted, leaf, gradient.double())
    OPS.rows_norm_backward_(out, gradient, x, statistics, weight, None)
    assert (out.double() - slope).abs().max() < 0.005 * slope.abs().max() + 1e-4
    OPS.rows_norm_backward_(out, gradient, x, statistics, weight, add)
    assert relative(out, slope + add.double()) < 0.005


@pytest.mark.parametrize("shape", [(2, 24, 5, 3), (1, 16, 1, 7), (3, 33, 4, 4)])
def test_gates_and_their_gradients(shape: tuple[int, ...]) -> None:
    x, gradient, gate = narrow(*shape), narrow(*shape, seed=1), narrow(*shape[:2], seed=2)
    out, sums = torch.empty_like(x), torch.empty(shape[:2])
    OPS.channel_gate_(out, x, gate)
    assert torch.equal(out, x * gate[:, :, None, None])
    OPS.channel_gate_backward_(out, sums, gradient, x, gate)
    assert torch.equal(out, gradient * gate[:, :, None, None])
    assert relative(sums, (gradient.double() * x.double()).sum((2, 3))) < 1e-5


@pytest.mark.parametrize("shape", [(2, 24, 5, 3), (1, 16, 1, 7), (3, 33, 4, 1), (2, 7, 1, 1)])
def test_passes_over_the_first_channels_of_a_map(shape: tuple[int, ...]) -> None:
    batch, channels, *size = shape
    whole, gradient = narrow(batch, channels + 9, *size), narrow(*shape, seed=1)
    scale, shift = torch.randn(channels), torch.randn(channels)
    x, out = whole[:, :channels], torch.empty_like(gradient)
    wide = (t[:, None, None].double() for t in (scale, shift))
    by_channel, added = wide
    OPS.strided_affine_(out, x, scale, shift, False)
    assert relative(out, x.double() * by_channel + added) < 0.005
    OPS.strided_affine_(out, x, scale, shift, True)
    assert relative(out, F.relu(x.double() * by_channel + added)) < 0.005
    before = whole.clone(memory_format=torch.channels_last)
    OPS.strided_scale_(x, gradient, scale, True)
    assert relative(x, before[:, :channels].double() + gradient.double() * by_channel) < 0.005
    OPS.strided_scale_(x, gradient, scale, False)
    assert relative(x, gradient.double() * by_channel) < 0.005
    assert torch.equal(whole[:, channels:], before[:, channels:])


@pytest.mark.parametrize("masks", [None, 1, 2, 6])
@pytest.mark.parametrize("tokens", [1, 16, 49, 197])
def test_attention_weights_and_their_gradient(tokens: int, masks: int | None) -> None:
    scores = narrow(6, 5, tokens, scale=4.0)
    mask = None if masks is None else narrow(masks, 5, tokens, seed=1)
    if mask is not None:
        mask[:, :, tokens // 2 + 1 :] = -1e9  # hidden tokens
    leaf = scores.double().requires_grad_()
    added = 0 if mask is None else mask.double().repeat(6 // mask.shape[0], 1, 1)
    wanted = torch.softmax(leaf * 0.3 + added, -1)
    weights = scores.clone()
    OPS.attention_weights_(weights, mask, 0.3)
    assert (weights.double() - wanted).abs().le(0.006 * wanted + 1e-6).all()
    gradient = narrow(6, 5, tokens, seed=2)
    (slope,) = torch.autograd.grad(wanted, leaf, gradient.double())
    OPS.attention_weights_backward_(gradient, weights, 0.3)
    assert (gradient.double() - slope).abs().max() < 0.01 * slope.abs().max() + 2e-3


def test_wrong_tensors_are_refused() -> None:
    x = narrow(2, 16, 4, 4)
    with pytest.raises(ValueError, match="out must be dense bfloat16"):
        OPS.activation_(torch.empty_like(x, memory_format=torch.contiguous_format), x, 0)
    with pytest.raises(ValueError, match=r"kind must be 0 \.\. 6, got 7"):
        OPS.activation_(torch.empty_like(x), x, 7)
    rows = narrow(4, 16)
    with pytest.raises(ValueError, match="statistics must be contiguous float32"):
        OPS.rows_norm_(torch.empty_like(rows), torch.empty(4), rows, None, None, 1e-5)
    with pytest.raises(ValueError, match="gate must be contiguous bfloat16"):
        OPS.channel_gate_(torch.empty_like(x), x, narrow(2, 8))
    with pytest.raises(ValueError, match="mask must be contiguous bfloat16"):
        OPS.attention_weights_(narrow(6, 5, 7), narrow(4, 5, 7), 1.0)
    with pytest.raises(ValueError, match="with N at most 1024"):
        OPS.attention_weights_(narrow(1, 1, 1025), None, 1.0)
    with pytest.raises(ValueError, match="packed must be float32 with"):
        OPS.conv_depthwise_(x.clone(), x, torch.empty(3), (-1, -1), (3, 3), (1, 1), (0, 0),
                            None, None, None, False)  # fmt: skip
