"""The engine's gathering convolution in float32, for AVX-512 and AVX2."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from convolution_helpers import relative
from test_float_convolution import every_width, images, run, skip_wider
from torch import Tensor

from fastadv.engine import cpu_convolution as convolution
from fastadv.engine.convolution_kernels import (
    ConvShape,
    GatherFloatKernel,
    OneDNNKernel,
    result_shape,
)
from fastadv.engine.packed_convolution import make_kernel
from fastadv.engine.patches import PatchGradientKernel

OPS = torch.ops.fastadv
RELATIVE_ERROR = 2e-6  # of the result's norm

pytestmark = [
    pytest.mark.usefixtures("one_thread", "seeded"),
    pytest.mark.skipif(not convolution.float_lanes(), reason="this processor has no AVX2"),
]

# in, out, kernel, stride, padding, dilation, height, width
GEOMETRIES = [
    (16, 32, (3, 3), 2, (1, 1), (1, 1), 8, 8),
    (9, 70, (3, 3), 2, (1, 1), (1, 1), 7, 5),
    (300, 33, (1, 1), 1, (0, 0), (1, 1), 5, 4),  # more channels than are summed at once
    (129, 24, (3, 3), 1, (1, 1), (1, 1), 4, 6),  # more by one
    (16, 100, (1, 1), 2, (0, 0), (1, 1), 7, 9),  # no tap reaches some inputs
    (17, 48, (2, 2), 3, (0, 0), (1, 1), 8, 9),
    (3, 40, (4, 4), 4, (0, 0), (1, 1), 8, 8),
    (12, 16, (5, 5), 1, (2, 2), (1, 1), 6, 1),
    (8, 81, (1, 7), 1, (0, 3), (1, 1), 5, 9),
    (20, 19, (3, 3), 1, (2, 2), (2, 2), 6, 7),
    (18, 16, (3, 3), 2, (0, 0), (2, 1), 9, 8),
    (16, 16, (7, 7), 2, (3, 3), (1, 1), 1, 2),  # hardly any tap lies inside
    # Few channels, which have loops of their own.
    (1, 32, (3, 3), 1, (1, 1), (1, 1), 8, 8),
    (3, 64, (3, 3), 1, (1, 1), (1, 1), 5, 33),  # several groups of places in a row
    (3, 70, (7, 7), 2, (3, 3), (1, 1), 9, 14),
    (2, 17, (5, 5), 1, (2, 2), (1, 1), 3, 1),
    (4, 9, (3, 3), 2, (0, 0), (2, 1), 9, 8),
    (3, 24, (2, 4), 3, (5, 0), (1, 1), 7, 9),  # rows of zeros alone
    (40, 3, (3, 3), 1, (1, 1), (1, 1), 6, 11),
    (3, 2, (3, 3), 1, (1, 1), (1, 1), 4, 4),
    (16, 3, (3, 3), 2, (1, 1), (1, 1), 9, 1),
]


def conv_of(geometry: tuple[object, ...]) -> tuple[ConvShape, tuple[int, int, int, int]]:
    c, k, size, stride, padding, dilation, height, width = geometry
    conv = ConvShape(c, k, size, (stride, stride), padding, dilation)  # type: ignore[arg-type]
    return conv, (3, c, height, width)  # type: ignore[return-value]


def plain(conv: ConvShape, x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x.double(), weight.double(), None, conv.stride, conv.padding, conv.dilation)


@every_width
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_convolution_and_every_epilogue(lanes: int, geometry: tuple[object, ...]) -> None:
    skip_wider(lanes)
    conv, shape = conv_of(geometry)
    k, x = conv.out_channels, images(shape, 0)
    weight, scale, bias = (
        torch.randn(k, shape[1], *conv.kernel_size),
        torch.rand(k) + 0.5,
        torch.randn(k),
    )
    wanted = plain(conv, x, weight * scale[:, None, None, None])
    add, mask = images(tuple(wanted.shape), 1), images(tuple(wanted.shape), 2)
    kernel = GatherFloatKernel(conv, False, lanes)
    kernel.refresh(weight, scale)

    assert relative(run(kernel, wanted.shape, x), wanted) < RELATIVE_ERROR
    shifted = wanted + bias[:, None, None] + add.double()
    found = run(kernel, wanted.shape, x, bias, add, None, True)
    assert relative(found, F.relu(shifted)) < RELATIVE_ERROR
    found = run(kernel, wanted.shape, x, None, add, mask, False)
    assert relative(found, torch.where(mask > 0, wanted + add.double(), 0.0)) < RELATIVE_ERROR


@every_width
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_gradient_in_the_input(lanes: int, geometry: tuple[object, ...]) -> None:
    skip_wider(lanes)
    conv, shape = conv_of(geometry)
    weight, scale = (
        torch.randn(conv.out_channels, shape[1], *conv.kernel_size),
        torch.rand(conv.out_channels) + 0.5,
    )
    x = images(shape, 0)
    gradient = images(result_shape(conv, x), 1)
    leaf = x.double().requires_grad_()
    result = plain(conv, leaf, weight * scale[:, None, None, None])
    (wanted,) = torch.autograd.grad(result, leaf, gradient.double())
    kernel = GatherFloatKernel(conv, True, lanes)
    kernel.refresh(weight, scale)

    assert relative(run(kernel, x.shape, gradient), wanted) < RELATIVE_ERROR
    found = run(kernel, x.shape, gradient, None, x, x, False)
    assert relative(found, torch.where(x > 0, wanted + x.double(), 0.0)) < RELATIVE_ERROR


@every_width
def test_nothing_is_written_beyond_the_result(lanes: int) -> None:
    skip_wider(lanes)
    conv = ConvShape(16, 5, (3, 3), (2, 2), (1, 1))
    kernel, count = GatherFloatKernel(conv, False, lanes), 2 * 3 * 3 * 5
    kernel.refresh(torch.randn(5, 16, 3, 3), None)
    room = torch.full((count + 64,), 7.0)
    out = room[:count].view(2, 3, 3, 5).permute(0, 3, 1, 2)
    args = (images((2, 16, 6, 6), 0), kernel._packed, *kernel._grids, None, None, None, False)
    OPS.conv_gather_float_(out, *args, lanes)
    assert (room[count:] == 7).all()
    assert (out != 7).all()


@every_width
def test_result_depends_neither_on_threads_nor_on_company(lanes: int) -> None:
    skip_wider(lanes)
    conv = ConvShape(40, 48, (3, 3), (2, 2), (1, 1))
    kernel, x = GatherFloatKernel(conv, False, lanes), images((40, 40, 12, 12), 0)
    kernel.refresh(torch.randn(48, 40, 3, 3), None)
    shape, results = torch.Size((40, 48, 6, 6)), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(run(kernel, shape, x))
    torch.set_num_threads(1)
    alone = run(
        kernel, torch.Size((1, *shape[1:])), x[-1:].clone(memory_format=torch.channels_last)
    )
    assert all(torch.equal(result, results[0]) for result in results)
    assert torch.equal(alone[0], results[0][-1])


# As GEOMETRIES, with so many places that tasks begin in the middle of a row and in each grid.
MANY_PLACES = [
    (24, 40, (3, 3), 2, (1, 1), (1, 1), 31, 29),
    (16, 33, (5, 5), 3, (1, 2), (1, 1), 32, 34),
    (17, 20, (1, 1), 2, (0, 0), (1, 1), 27, 25),  # grids without taps
    (3, 40, (3, 3), 1, (1, 1), (1, 1), 23, 25),
    (2, 70, (5, 5), 2, (2, 2), (1, 1), 33, 35),
    (1, 64, (3, 3), 1, (0, 1), (2, 2), 21, 26),
    (20, 3, (3, 3), 2, (1, 1), (1, 1), 43, 45),
]


@every_width
@pytest.mark.parametrize("geometry", MANY_PLACES)
def test_many_places_on_several_threads(lanes: int, geometry: tuple[object, ...]) -> None:
    skip_wider(lanes)
    conv, shape = conv_of(geometry)
    x, weight = images(shape, 0), torch.randn(conv.out_channels, shape[1], *conv.kernel_size)
    leaf = x.double().requires_grad_()
    result = plain(conv, leaf, weight)
    gradient = images(tuple(result.shape), 1)
    (wanted,) = torch.autograd.grad(result, leaf, gradient.double())
    for backward in (False, True):
        kernel, found = GatherFloatKernel(conv, backward, lanes), []
        kernel.refresh(weight, None)
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            ends = (x.shape, gradient) if backward else (gradient.shape, x)
            found.append(run(kernel, *ends))
        torch.set_num_threads(1)
        assert relative(found[0], wanted if backward else result.detach()) < RELATIVE_ERROR
        assert all(torch.equal(one, found[0]) for one in found)


def test_which_convolutions_it_serves() -> None:
    def kind(*conv: object, backward: bool = False, groups: int = 1) -> type:
        shape = ConvShape(*conv, groups=groups)  # type: ignore[arg-type]
        return type(make_kernel(shape, backward, dtype=torch.float32))

    strided = (64, 128, (3, 3), (2, 2), (1, 1))
    assert kind(*strided) is kind(*strided, backward=True) is GatherFloatKernel
    assert kind(64, 256, (1, 1)) is kind(64, 256, (1, 1), backward=True) is GatherFloatKernel
    assert kind(3, 64, (16, 16), (16, 16)) is GatherFloatKernel  # oneDNN is slow at patches
    assert kind(3, 64, (16, 16), (16, 16), backward=True) is PatchGradientKernel
    assert kind(5, 64, (7, 7), (2, 2), (3, 3), backward=True) is PatchGradientKernel
    assert kind(3, 64, (7, 7), (2, 2), (3, 3), backward=True) is GatherFloatKernel  # few channels
    assert kind(1, 32, (3, 3), (1, 1), (1, 1)) is GatherFloatKernel
    assert kind(3, 64, (3, 3), (1, 1), (1, 1)) is OneDNNKernel
    assert kind(3, 64, (3, 3), (1, 1), (1, 1), backward=True) is GatherFloatKernel
    assert kind(3, 64, (7, 7), (2, 2), (3, 3)) is OneDNNKernel
    assert kind(64, 64, (1, 1), (2, 1)) is OneDNNKernel
    assert kind(64, 64, (3, 3), (2, 2), (1, 1), groups=2) is OneDNNKernel


def test_wrong_arguments_are_named() -> None:
    conv = ConvShape(16, 16, (1, 1))
    kernel, x = GatherFloatKernel(conv, False, 8), images((1, 16, 4, 4), 0)
    packed, rest = kernel._packed, ([0], [0], [1], (0, 0), (1, 1), None, None, None, False)
    with pytest.raises(ValueError, match="lanes must be 16 on a processor with AVX-512, or 8"):
        OPS.conv_gather_float_(x.clone(), x, packed, *rest, 4)
    with pytest.raises(ValueError, match="x must be channels-last float32"):
        OPS.conv_gather_float_(x.clone(), x.bfloat16(), packed, *rest, 8)
    with pytest.raises(ValueError, match="packed must be float32 with 256 elements"):
        OPS.conv_gather_float_(x.clone(), x, packed[:-1], *rest, 8)
    for grids, message in (
        (([0], [0, 1], [1], (0, 0)), "tap_columns must be as many as tap_rows, 1, got 2"),
        (([0], [0], [2], (0, 0)), "taps must divide the 1 tap_rows"),
        (([0], [0], [0], (0, 0)), "taps must divide the 1 tap_rows"),
        (([0], [0], [1], (0, 0, 1)), "origins must be a row and a column for each of the 1 grids"),
        (([0], [0], [1], (0, -1)), "origins must be at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            OPS.conv_gather_float_(x.clone(), x, packed, *grids, (1, 1), None, None, None, False, 8)
