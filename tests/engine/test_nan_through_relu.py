"""A ReLU in a kernel's last pass keeps NaN, as torch does: a network that has broken down must not look sound."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastadv.engine import cpu_channels
from fastadv.engine import cpu_convolution as convolution
from fastadv.engine.buffer_pool import Memory
from fastadv.engine.convolution_kernels import (
    ConvShape,
    Epilogue,
    GatherFloatKernel,
    GatherKernel,
    Kernel,
    TileKernel,
    WinogradFloatKernel,
    WinogradKernel,
)
from fastadv.engine.depthwise import DepthwiseKernel
from fastadv.ops import NATIVE

pytestmark = pytest.mark.usefixtures("seeded")
OPS = torch.ops.fastadv
KERNELS = [
    "Winograd, 8 lanes",
    "Winograd, 16 lanes",
    "gathering, 8 lanes",
    "gathering, 16 lanes",
    "Winograd",
    "gathering",
    "AMX",
    "depthwise",
]


def kernel_of(name: str, channels: int) -> tuple[Kernel, int, torch.dtype]:
    """A kernel for a 3x3 convolution with these channels, its groups, and its dtype."""
    kind, _, lanes = name.removesuffix(" lanes").partition(", ")
    if lanes:
        if convolution.float_lanes() < int(lanes):
            pytest.skip(f"this processor has no vectors of {lanes} floats")
    elif not (convolution.amx_serves(32) if kind == "AMX" else convolution.supported(16, 16)):
        pytest.skip("this processor has no such instructions for bfloat16")
    groups = channels if kind == "depthwise" else 1
    conv = ConvShape(channels, channels, (3, 3), (1, 1), (1, 1), (1, 1), groups)
    if lanes:
        if kind == "Winograd":
            return WinogradFloatKernel(channels, channels, False, int(lanes)), 1, torch.float32
        return GatherFloatKernel(conv, False, int(lanes)), 1, torch.float32
    if kind == "Winograd":
        return WinogradKernel(channels, channels, False), 1, torch.bfloat16
    kinds = {"gathering": GatherKernel, "AMX": TileKernel, "depthwise": DepthwiseKernel}
    return kinds[kind](conv, False), groups, torch.bfloat16


@pytest.mark.parametrize("channels", [32, 96])
@pytest.mark.parametrize("name", KERNELS)
def test_convolutions(name: str, channels: int) -> None:
    kernel, groups, dtype = kernel_of(name, channels)
    weight = torch.randn(channels, channels // groups, 3, 3) / 3 / (channels / groups) ** 0.5
    x, add = torch.randn(2, 2, channels, 7, 5).to(dtype)
    x, add = (t.contiguous(memory_format=torch.channels_last) for t in (x, add))
    add[1, ::5, 3] = torch.nan
    kernel.refresh(weight, None)
    out = kernel.run(Memory(dtype), tuple(x.shape), x, Epilogue(None, add, None, True))
    wanted = F.relu(F.conv2d(x.float(), weight, padding=1, groups=groups) + add.float())
    torch.testing.assert_close(out.float(), wanted, rtol=0.05, atol=0.1, equal_nan=True)
    assert out.isnan().any()


@pytest.mark.skipif(NATIVE.library is None, reason="needs the compiled part")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scale_and_shift(dtype: torch.dtype) -> None:
    x = torch.randn(2, 33, 4, 5).to(dtype).contiguous(memory_format=torch.channels_last)
    x[0, ::2, 1] = torch.nan
    out = torch.zeros_like(x)
    OPS.channel_affine_(out, x, torch.ones(33), torch.zeros(33), None, None, True)
    assert torch.equal(out.isnan(), x.isnan())
    assert torch.equal(out.nan_to_num(), F.relu(x).nan_to_num())


@pytest.mark.skipif(not cpu_channels.available(), reason="this processor has no AVX512-BF16")
@pytest.mark.parametrize("kind", range(len(cpu_channels.ACTIVATIONS)))
def test_activations(kind: int) -> None:
    x = torch.full((40,), torch.nan, dtype=torch.bfloat16)
    out = torch.zeros_like(x)
    OPS.activation_(out, x, kind)
    assert out.isnan().all()
