"""The engine's own 3x3 convolution in float32, for AVX-512 and AVX2, and what else programs need in float32."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from convolution_helpers import relative
from torch import Tensor, nn

from fastadv.engine import cpu_convolution as convolution
from fastadv.engine.buffer_pool import Memory
from fastadv.engine.convolution_kernels import (
    ConvShape,
    Epilogue,
    Kernel,
    OneDNNKernel,
    WinogradFloatKernel,
)
from fastadv.engine.packed_convolution import make_kernel

OPS = torch.ops.fastadv
RELATIVE_ERROR = 5e-6  # of the result's norm; the direct sum in float32 has 3e-7

pytestmark = [
    pytest.mark.usefixtures("one_thread", "seeded"),
    pytest.mark.skipif(not convolution.float_lanes(), reason="this processor has no AVX2"),
]
every_width = pytest.mark.parametrize("lanes", [8, 16])
# images, in, out, height, width
SHAPES = [
    (1, 16, 16, 1, 1),
    (2, 16, 32, 5, 7),
    (3, 48, 81, 4, 4),
    (2, 64, 70, 8, 8),
    (1, 128, 144, 9, 3),
    (5, 16, 3, 6, 6),
    (1, 32, 13, 2, 11),
]


def images(shape: tuple[int, ...], seed: int) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values.contiguous(memory_format=torch.channels_last)


def skip_wider(lanes: int) -> None:
    if lanes > convolution.float_lanes():
        pytest.skip("this processor has no AVX-512")


def run(kernel: Kernel, shape: torch.Size, x: Tensor, *epilogue: Tensor | bool | None) -> Tensor:
    memory = Memory(torch.float32)
    memory.take(shape).fill_(torch.nan)
    memory.reset(shape[0])
    out = kernel.run(memory, shape, x, Epilogue(*epilogue))
    assert out.dtype == torch.float32 and out.is_contiguous(memory_format=torch.channels_last)
    return out


@every_width
@pytest.mark.parametrize("shape", SHAPES)
def test_convolution_and_every_epilogue(lanes: int, shape: tuple[int, ...]) -> None:
    skip_wider(lanes)
    b, c, k, h, w = shape
    x, add, mask = images((b, c, h, w), 0), images((b, k, h, w), 1), images((b, k, h, w), 2)
    weight, scale, bias = torch.randn(k, c, 3, 3), torch.rand(k) + 0.5, torch.randn(k)
    plain = F.conv2d(x.double(), (weight * scale[:, None, None, None]).double(), padding=1)
    kernel = WinogradFloatKernel(k, c, False, lanes)
    kernel.refresh(weight, scale)

    assert relative(run(kernel, plain.shape, x), plain) < RELATIVE_ERROR
    shifted = plain + bias[:, None, None]
    assert relative(run(kernel, plain.shape, x, bias), shifted) < RELATIVE_ERROR
    found = run(kernel, plain.shape, x, bias, add, None, True)
    assert relative(found, F.relu(shifted + add.double())) < RELATIVE_ERROR
    found = run(kernel, plain.shape, x, None, add, mask, False)
    assert relative(found, torch.where(mask > 0, plain + add.double(), 0.0)) < RELATIVE_ERROR
    assert (found[mask <= 0] == 0).all()


@every_width
@pytest.mark.parametrize("shape", SHAPES)
def test_backward_filters_give_the_input_gradient(lanes: int, shape: tuple[int, ...]) -> None:
    skip_wider(lanes)
    b, k, c, h, w = shape  # what is convolved has the channels of the result
    gradient, weight, scale = images((b, k, h, w), 0), torch.randn(k, c, 3, 3), torch.rand(k) + 0.5
    kernel = WinogradFloatKernel(c, k, True, lanes)
    kernel.refresh(weight, scale)
    folded = (weight * scale[:, None, None, None]).double()
    wanted = torch.nn.grad.conv2d_input((b, c, h, w), folded, gradient.double(), padding=1)
    assert relative(run(kernel, wanted.shape, gradient), wanted) < RELATIVE_ERROR


@every_width
def test_filters_too_large_for_the_caches(lanes: int) -> None:
    """They are written past the caches, which only aligned memory allows. The bits are the same either way."""
    skip_wider(lanes)
    weight, scale = torch.randn(256, 256, 3, 3), torch.rand(256) + 0.5
    size = convolution.POINTS * 256 * 256
    room = torch.full((size + 16,), torch.nan)
    first = -(room.data_ptr() // 4) % 16  # of an aligned line
    aligned, moved = room[first : first + size], torch.full((size + 1,), torch.nan)[1:]
    for backward in (False, True):
        OPS.conv3x3_float_pack_(aligned, weight, scale, backward, lanes)
        OPS.conv3x3_float_pack_(moved, weight, scale, backward, lanes)
        assert not aligned.isnan().any() and torch.equal(aligned, moved)

    x = images((1, 256, 4, 4), 0)
    kernel = WinogradFloatKernel(256, 256, False, lanes)
    kernel.refresh(weight, None)
    plain = F.conv2d(x.double(), weight.double(), padding=1)
    assert relative(run(kernel, plain.shape, x), plain) < RELATIVE_ERROR


@every_width
def test_nothing_is_written_beyond_the_result(lanes: int) -> None:
    skip_wider(lanes)
    kernel = WinogradFloatKernel(5, 16, False, lanes)
    kernel.refresh(torch.randn(5, 16, 3, 3), None)
    room = torch.full((2 * 6 * 6 * 5 + 64,), 7.0)
    out = room[: 2 * 6 * 6 * 5].view(2, 6, 6, 5).permute(0, 3, 1, 2)
    args = (images((2, 16, 6, 6), 0), kernel._packed, None, None, None, False, lanes)
    OPS.conv3x3_float_(out, *args)
    assert (room[2 * 6 * 6 * 5 :] == 7).all()
    assert (out != 7).all()


@every_width
def test_result_depends_neither_on_threads_nor_on_company(lanes: int) -> None:
    skip_wider(lanes)
    kernel, x = WinogradFloatKernel(48, 32, False, lanes), images((40, 32, 12, 12), 0)
    kernel.refresh(torch.randn(48, 32, 3, 3), None)
    shape, results = torch.Size((40, 48, 12, 12)), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(run(kernel, shape, x))
    torch.set_num_threads(1)
    last = x[-1:].clone(memory_format=torch.channels_last)
    alone = run(kernel, torch.Size((1, 48, 12, 12)), last)
    assert all(torch.equal(result, results[0]) for result in results)
    assert torch.equal(alone[0], results[0][-1])


# in, out, kernel, stride, padding, groups, height, width
OTHERS = [
    (16, 16, 3, 1, 1, 4, 6, 7),
    (3, 24, 7, 2, 3, 1, 12, 11),
    (16, 6, 3, 2, 1, 1, 9, 1),
    (5, 12, 1, 1, 0, 1, 5, 5),
]


@pytest.mark.parametrize("geometry", OTHERS)
def test_onednn_serves_the_others_in_float32(geometry: tuple[int, ...]) -> None:
    c, k, size, stride, padding, groups, h, w = geometry
    conv = ConvShape(c, k, (size,) * 2, (stride,) * 2, (padding,) * 2, groups=groups)
    forward = make_kernel(conv, backward=False, dtype=torch.float32)
    assert isinstance(forward, OneDNNKernel)
    weight, bias, x = (
        torch.randn(k, c // groups, size, size),
        torch.randn(k),
        images((3, c, h, w), 0),
    )
    plain = F.conv2d(x.double(), weight.double(), None, stride, padding, 1, groups)
    add, mask = images(tuple(plain.shape), 1), images(tuple(plain.shape), 2)
    forward.refresh(weight, None)
    found = run(forward, plain.shape, x, bias, add, None, True)
    assert relative(found, F.relu(plain + bias[:, None, None] + add.double())) < RELATIVE_ERROR
    found = run(forward, plain.shape, x, None, None, mask, False)
    assert relative(found, torch.where(mask > 0, plain, 0.0)) < RELATIVE_ERROR
    backward = make_kernel(conv, backward=True, dtype=torch.float32)
    if backward is None:
        return
    backward.refresh(weight, None)
    wanted = torch.nn.grad.conv2d_input(
        x.shape, weight.double(), add.double(), stride, padding, 1, groups
    )
    found = run(backward, x.shape, add, None, x, x, False)
    assert relative(found, torch.where(x > 0, wanted + x.double(), 0.0)) < RELATIVE_ERROR


def test_three_by_three_has_winograds_kernel_in_both_directions() -> None:
    conv = nn.Conv2d(32, 48, 3, padding=1)
    for backward in (False, True):
        assert isinstance(make_kernel(conv, backward, dtype=torch.float32), WinogradFloatKernel)
    assert isinstance(
        make_kernel(nn.Conv2d(24, 8, 3, padding=1), False, dtype=torch.float32), WinogradFloatKernel
    )
    conv = nn.Conv2d(5, 48, 3, padding=1)  # five channels fill no vector
    assert isinstance(make_kernel(conv, False, dtype=torch.float32), OneDNNKernel)
    assert isinstance(make_kernel(conv, True, dtype=torch.float32), WinogradFloatKernel)


def test_wrong_arguments_are_named() -> None:
    kernel, x = WinogradFloatKernel(16, 16, False, 8), images((1, 16, 4, 4), 0)
    packed, rest = kernel._packed, (None, None, None, False)
    with pytest.raises(ValueError, match="lanes must be 8 or 16"):
        OPS.conv3x3_float_(x.clone(), x, packed, *rest, 4)
    with pytest.raises(ValueError, match="input channels must be a multiple of lanes, 8, got 12"):
        OPS.conv3x3_float_(images((1, 16, 4, 4), 0), images((1, 12, 4, 4), 0), packed, *rest, 8)
    with pytest.raises(ValueError, match="x must be channels-last float32"):
        OPS.conv3x3_float_(x.clone(), x.bfloat16(), packed, *rest, 8)
    with pytest.raises(ValueError, match="packed must be float32 with 9216 elements"):
        OPS.conv3x3_float_(x.clone(), x, packed[:-1], *rest, 8)
    with pytest.raises(ValueError, match="weight must have shape"):
        OPS.conv3x3_float_pack_(packed, torch.randn(16, 16, 5, 5), None, False, 8)
    with pytest.raises(ValueError, match="scale must have shape"):
        OPS.conv3x3_float_pack_(packed, torch.randn(16, 16, 3, 3), torch.ones(8), False, 8)


def test_passes_by_channel_in_float32() -> None:
    x, add, mask = (images((3, 5, 4, 6), seed) for seed in range(3))
    scale, shift, out = torch.randn(5), torch.randn(5), torch.full_like(x, torch.nan)
    OPS.channel_affine_(out, x, scale, shift, None, None, True)
    line = x * scale[:, None, None] + shift[:, None, None]
    torch.testing.assert_close(out, line.relu())
    OPS.channel_affine_(out, x, scale, shift, add, mask, False)
    torch.testing.assert_close(out, torch.where(mask > 0, line, 0.0) + add)
    OPS.merge_gradients_(out, x, add, mask)
    assert torch.equal(out, torch.where(mask > 0, x + add, 0.0))
    means = torch.empty(3, 5)
    OPS.pixel_means_(means, x)
    torch.testing.assert_close(means, x.mean((2, 3)))
    OPS.spread_pixel_means_(out, means, add, mask)
    spread = torch.where(mask > 0, means[:, :, None, None] / 24 + add, 0.0)
    torch.testing.assert_close(out, spread)
    with pytest.raises(ValueError, match="mask must be float32 with the shape and layout of x"):
        OPS.merge_gradients_(out, x, None, mask.bfloat16())
    with pytest.raises(ValueError, match="x must be bfloat16 or float32"):
        OPS.merge_gradients_(out.double(), x.double(), None, None)
