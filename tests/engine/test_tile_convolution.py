"""The engine's convolution by AMX."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from convolution_helpers import narrow, poisoned, relative, run
from torch import Tensor, nn

from fastadv.engine import cpu_convolution as convolution
from fastadv.engine.convolution_kernels import ConvShape, TileKernel

pytestmark = pytest.mark.usefixtures("seeded")
OPS = torch.ops.fastadv

# in, out, kernel, stride, padding, dilation, height, width, images
TILED = [
    (32, 32, 3, 1, 1, 1, 4, 4, 33),  # images together, of which the last group has one
    (64, 80, 3, 1, 1, 1, 5, 7, 20),  # a last tile of 16 output channels
    (32, 48, 3, 2, 1, 1, 8, 6, 3),
    (64, 7, 3, 1, 1, 1, 3, 18, 16),  # few output channels
    (32, 64, 1, 2, 0, 1, 7, 9, 17),
    (32, 32, 1, 1, 0, 1, 1, 1, 5),
    (64, 96, 1, 1, 0, 1, 9, 13, 17),  # inputs read where they lie, but the last
    (32, 32, 5, 1, 2, 1, 2, 2, 9),  # taps beyond both borders
    (32, 64, 3, 3, 0, 1, 7, 20, 2),
    (96, 32, 3, 1, 2, 2, 6, 17, 4),
    (512, 32, 3, 1, 1, 1, 3, 3, 2),  # rows laid out apart
    (512, 192, 3, 1, 1, 1, 4, 4, 9),  # more filters than are kept: channels outermost
    (32, 32, 7, 2, 3, 1, 40, 37, 16),  # several parts
    (64, 64, 3, 1, 1, 1, 32, 32, 3),  # two tiles of one row
    (32, 64, 3, 1, 1, 1, 16, 16, 1),  # two rows
    (32, 32, 3, 1, 1, 1, 14, 14, 1),  # a tile goes on in the next row
    (32, 32, 3, 1, 0, 1, 9, 9, 1),
    (32, 32, 1, 1, 1, 1, 19, 12, 2),  # more columns of results than of inputs
]
needs_amx = pytest.mark.skipif(not convolution.amx_serves(32), reason="this processor has no AMX")


@needs_amx
@pytest.mark.parametrize("geometry", TILED)
def test_tile_kernel_in_both_directions(geometry: tuple[int, ...]) -> None:
    c, k, kernel, stride, padding, dilation, h, w, images = geometry
    conv = nn.Conv2d(c, k, kernel, stride, padding, dilation)
    scale, bias = torch.rand(k) + 0.5, torch.randn(k)
    weight = (conv.weight * scale[:, None, None, None]).detach().double()
    x = narrow((images, c, h, w), 0)
    plain = F.conv2d(x.double(), weight, None, stride, padding, dilation)
    add, mask = narrow(tuple(plain.shape), 1), narrow(tuple(plain.shape), 2)
    forward, out = TileKernel(conv, backward=False), poisoned(*plain.shape)
    forward.refresh(conv.weight.detach(), scale)
    run(forward, out, x, bias, add, None, True)
    assert relative(out, F.relu(plain + bias[:, None, None] + add.double())) < 0.01
    run(forward, out, x, None, None, mask, False)
    assert relative(out, torch.where(mask > 0, plain, 0.0)) < 0.01
    run(forward, out, x)
    assert relative(out, plain) < 0.01
    if k % 32:
        return
    backward, at_input = TileKernel(conv, backward=True), poisoned(*x.shape)
    backward.refresh(conv.weight.detach(), scale)
    gradient = narrow(tuple(plain.shape), 3)
    run(backward, at_input, gradient, None, x, x, False)
    wanted = torch.nn.grad.conv2d_input(
        x.shape, weight, gradient.double(), stride, padding, dilation
    )
    assert relative(at_input, torch.where(x > 0, wanted + x.double(), 0.0)) < 0.01


@needs_amx
@pytest.mark.parametrize("k", [64, 40])
def test_every_epilogue_of_tiles(k: int) -> None:
    """Exactly: sums of small integers are exact, and so is the one rounding."""
    drawn = torch.Generator().manual_seed(0)

    def integers(*shape: int) -> Tensor:
        values = torch.randint(-3, 4, shape, generator=drawn).bfloat16()
        return values.contiguous(memory_format=torch.channels_last)

    x, weight, bias = integers(5, 32, 8, 8), integers(k, 32, 3, 3).float(), torch.randn(k).round()
    add, mask = integers(5, k, 8, 8), integers(5, k, 8, 8)
    mask[0, :, 0] = torch.tensor([0.0, -0.0, 1e-40, -1e-40, torch.inf, -torch.inf, torch.nan, 1.0])
    kernel = TileKernel(nn.Conv2d(32, k, 3, padding=1), backward=False)
    kernel.refresh(weight, None)
    plain = F.conv2d(x.double(), weight.double(), padding=1)
    for some in itertools.product((False, True), repeat=4):
        parts = [
            part if used else None for part, used in zip((bias, add, mask), some, strict=False)
        ]
        wanted = plain if parts[0] is None else plain + bias[:, None, None]
        wanted = wanted if parts[1] is None else wanted + add
        wanted = F.relu(wanted) if some[3] else wanted
        wanted = wanted if parts[2] is None else torch.where(mask > 0, wanted, 0.0)
        found = run(kernel, poisoned(5, k, 8, 8), x, *parts, some[3])
        assert torch.equal(found, wanted.bfloat16()), some


@needs_amx
@pytest.mark.parametrize("geometry", [(64, 3, 17), (32, 1, 21), (512, 3, 4)])
def test_tiles_stay_inside_their_tensors(geometry: tuple[int, int, int]) -> None:
    """What lies around the images and results is neither used nor changed."""
    c, kernel_size, size = geometry
    k, images = 48, 3
    kernel = TileKernel(nn.Conv2d(c, k, kernel_size, padding=kernel_size // 2), backward=False)
    kernel.refresh(torch.randn(k, c, kernel_size, kernel_size), None)

    def amid(value: float, channels: int) -> tuple[Tensor, Tensor]:
        count = images * size * size * channels
        room = torch.full((count + 2 * 4096,), value, dtype=torch.bfloat16)
        inner = room[4096:-4096].view(images, size, size, channels).permute(0, 3, 1, 2)
        return room, inner

    x = narrow((images, c, size, size), 0)
    (_, inside), (room, out) = amid(torch.nan, c), amid(7.0, k)
    inside.copy_(x)
    run(kernel, out, inside)
    assert torch.equal(out, run(kernel, poisoned(images, k, size, size), x))
    assert not out.isnan().any()
    assert (room[:4096] == 7).all() and (room[-4096:] == 7).all()


@needs_amx
@pytest.mark.parametrize("backward", [False, True])
def test_packed_tiles_do_not_depend_on_the_layout_of_the_weights(backward: bool) -> None:
    conv = ConvShape(64, 96, (3, 3), (2, 2), (1, 1))
    weight, scale = torch.randn(96, 64, 3, 3), torch.rand(96)
    packed = []
    for layout in (torch.contiguous_format, torch.channels_last):
        kernel = TileKernel(conv, backward)
        kernel.refresh(weight.contiguous(memory_format=layout), scale)
        packed.append(kernel._packed)
    assert torch.equal(*packed)


@needs_amx
def test_tiles_depend_neither_on_threads_nor_on_company() -> None:
    kernel, x = (
        TileKernel(nn.Conv2d(64, 48, 3, padding=1), backward=False),
        narrow((40, 64, 9, 9), 0),
    )
    kernel.refresh(torch.randn(48, 64, 3, 3), None)
    threads, results = torch.get_num_threads(), []
    for count in (1, threads, 3):
        torch.set_num_threads(count)
        results.append(run(kernel, poisoned(40, 48, 9, 9), x))
    torch.set_num_threads(threads)
    last = x[-1:].clone(memory_format=torch.channels_last)
    alone = run(kernel, poisoned(1, 48, 9, 9), last)
    assert all(torch.equal(result, results[0]) for result in results)
    assert torch.equal(alone[0], results[0][-1])


@needs_amx
@pytest.mark.parametrize("shape", [(0, 32, 4, 4), (2, 32, 0, 4), (2, 32, 4, 0)])
def test_tiles_of_no_images_or_places(shape: tuple[int, ...]) -> None:
    kernel = TileKernel(nn.Conv2d(32, 16, 3, padding=1), backward=False)
    kernel.refresh(torch.randn(16, 32, 3, 3), None)
    out = poisoned(shape[0], 16, *shape[2:])
    assert run(kernel, out, narrow(shape, 0)).numel() == 0


@needs_amx
def test_tiles_of_images_without_columns_are_the_padding() -> None:
    kernel = TileKernel(nn.Conv2d(32, 16, 3, padding=2), backward=False)
    kernel.refresh(torch.randn(16, 32, 3, 3), None)
    found = run(kernel, poisoned(2, 16, 6, 2), narrow((2, 32, 4, 0), 0), torch.ones(16))
    assert (found == 1).all()


@needs_amx
def test_tiles_refuse_channels_that_do_not_fill_them() -> None:
    x, out = narrow((2, 16, 4, 4), 0), poisoned(2, 32, 4, 4)
    packed = torch.zeros(32 * 16, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="x's channels must be multiples of 32"):
        OPS.conv_amx_(out, x, packed, [0], [0], [1], [0, 0], [1, 1], None, None, None, False)
