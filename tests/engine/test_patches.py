"""Strided convolutions as convolutions of stride 1 over patches."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastadv.engine import cpu_convolution as convolution
from fastadv.engine.buffer_pool import Memory
from fastadv.engine.convolution_kernels import ConvShape, Epilogue
from fastadv.engine.patches import PatchGradientKernel, PatchKernel, serves

pytestmark = pytest.mark.usefixtures("seeded")
needs_bf16 = pytest.mark.skipif(
    not (convolution.available() and convolution.onednn_available()),
    reason="oneDNN has no bfloat16 here",
)


def narrow(*shape: int, seed: int = 0) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()
    return values.contiguous(memory_format=torch.channels_last)


def relative(found: Tensor, wanted: Tensor) -> float:
    return ((found.double() - wanted).norm() / wanted.norm().clamp(min=1e-30)).item()


# in, out, kernel, stride, padding, height, width
CASES = [
    (3, 16, (2, 2), 2, (0, 0), 8, 6),
    (5, 33, (4, 4), 4, (0, 0), 11, 14),
    (3, 64, (7, 7), 2, (3, 3), 14, 16),
    (3, 32, (7, 7), 2, (3, 3), 13, 9),
    (3, 24, (3, 3), 2, (1, 1), 9, 12),
    (4, 16, (3, 5), 2, (0, 2), 10, 11),
    (1, 16, (5, 5), 3, (1, 1), 13, 12),
    (3, 16, (3, 3), 2, (2, 2), 3, 4),
    (7, 16, (4, 4), 3, (3, 0), 7, 19),
]


# By the lanes of float32's vectors; None: bfloat16.
LANES = [pytest.param(None, marks=needs_bf16), 8, 16]


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("case", CASES)
def test_gradient_in_the_input(case: tuple, lanes: int | None) -> None:
    if lanes is not None and lanes > convolution.float_lanes():
        pytest.skip("this processor has no such vectors")
    dtype, bound = (torch.bfloat16, 0.01) if lanes is None else (torch.float32, 2e-6)
    into, outof, kernel, stride, padding, height, width = case
    conv = ConvShape(into, outof, kernel, (stride, stride), padding)
    assert serves(conv, backward=True)
    weight, scale = torch.randn(outof, into, *kernel), torch.rand(outof) + 0.5
    folded = (weight * scale[:, None, None, None]).double()
    x = narrow(3, into, height, width).to(dtype)
    shape = F.conv2d(x.double(), folded, None, stride, padding).shape
    gradient = narrow(*shape, seed=3).to(dtype)
    backward = PatchGradientKernel(conv, lanes)
    backward.refresh(weight, scale)
    wanted = torch.nn.grad.conv2d_input(x.shape, folded, gradient.double(), stride, padding)
    memory = Memory(dtype)
    found = backward.run(memory, tuple(x.shape), gradient, Epilogue())
    assert found.dtype == dtype and relative(found, wanted) < bound
    found = backward.run(memory, tuple(x.shape), gradient, Epilogue(add=x, mask=x))
    assert relative(found, torch.where(x > 0, wanted + x.double(), 0.0)) < bound


@needs_bf16
@pytest.mark.parametrize("case", CASES[:2])
def test_convolution_of_patches(case: tuple) -> None:
    into, outof, kernel, stride, padding, height, width = case
    conv = ConvShape(into, outof, kernel, (stride, stride), padding)
    assert serves(conv, backward=False)
    weight, scale, bias = torch.randn(outof, into, *kernel), torch.rand(outof), torch.randn(outof)
    x = narrow(3, into, height, width)
    folded = (weight * scale[:, None, None, None]).double()
    wanted = F.conv2d(x.double(), folded, bias.double(), stride, padding)
    forward, add = PatchKernel(conv), narrow(*wanted.shape, seed=1)
    forward.refresh(weight, scale)
    found = forward.run(Memory(), tuple(wanted.shape), x, Epilogue(bias, add, None, True))
    assert relative(found, F.relu(wanted + add.double())) < 0.01


def test_other_convolutions_are_not_taken() -> None:
    conv = ConvShape(3, 16, (3, 3), (2, 2), (1, 1))
    assert not serves(conv, backward=False)
    for change in (
        {"groups": 3}, {"stride": (1, 1)}, {"stride": (1, 2)}, {"dilation": (2, 2)},
        {"kernel_size": (1, 1)}, {"in_channels": 32},
    ):  # fmt: skip
        assert not serves(conv._replace(**change), backward=True)
