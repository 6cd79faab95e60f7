"""The engine's own 3x3 convolution and pointwise passes on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from convolution_helpers import narrow, poisoned, relative, run
from torch import Tensor, nn

from fastadv.engine import cpu_convolution as convolution
from fastadv.engine.convolution_kernels import (
    ConvShape,
    GatherKernel,
    OneDNNKernel,
    TileKernel,
    WinogradKernel,
)
from fastadv.engine.layers import CopiedConv2d
from fastadv.engine.packed_convolution import make_kernel
from fastadv.engine.patches import PatchGradientKernel, PatchKernel

pytestmark = pytest.mark.usefixtures("seeded")
OPS = torch.ops.fastadv
# Of the result's norm. Winograd's transforms in bfloat16 cost half of this on random data, the direct sum .003.
RELATIVE_ERROR = 0.02

needs_kernel = pytest.mark.skipif(
    not convolution.supported(16, 16), reason="this processor has no AVX512-BF16"
)
needs_narrow_convolutions = pytest.mark.skipif(
    not convolution.onednn_available(), reason="oneDNN has no bfloat16 here"
)
SHAPES = [
    (1, 16, 16, 1, 1),
    (2, 16, 32, 5, 7),
    (3, 48, 80, 4, 4),
    (2, 64, 64, 8, 8),
    (1, 128, 144, 9, 3),
]


def pack(weight: Tensor, scale: Tensor | None, backward: bool) -> Tensor:
    packed = torch.empty(weight.shape[:2].numel() * convolution.POINTS, dtype=torch.bfloat16)
    OPS.conv3x3_pack_(packed.fill_(torch.nan), weight, scale, backward)
    return packed


@needs_kernel
@pytest.mark.parametrize("backward", [False, True])
def test_packed_filters_do_not_depend_on_the_layout_of_the_weights(backward: bool) -> None:
    weight, scale = torch.randn(32, 48, 3, 3), torch.rand(32)
    last = weight.contiguous(memory_format=torch.channels_last)
    assert torch.equal(pack(weight, scale, backward), pack(last, scale, backward))


@needs_kernel
@pytest.mark.parametrize("shape", SHAPES)
def test_convolution_equals_the_direct_sum(shape: tuple[int, ...]) -> None:
    b, c, k, h, w = shape
    x, add, mask = narrow((b, c, h, w), 0), narrow((b, k, h, w), 1), narrow((b, k, h, w), 2)
    weight, scale, bias = torch.randn(k, c, 3, 3), torch.rand(k) + 0.5, torch.randn(k)
    out = poisoned(b, k, h, w)
    plain = F.conv2d(x.double(), (weight * scale[:, None, None, None]).double(), padding=1)
    packed = pack(weight, scale, backward=False)

    OPS.conv3x3_(out, x, packed, None, None, None, False)
    assert relative(out, plain) < RELATIVE_ERROR
    OPS.conv3x3_(out, x, packed, bias, add, None, True)
    finished = F.relu(plain + bias[:, None, None] + add.double())
    assert relative(out, finished) < RELATIVE_ERROR
    assert (out >= 0).all()
    OPS.conv3x3_(out, x, packed, None, add, mask, False)
    assert relative(out, torch.where(mask > 0, plain + add.double(), 0.0)) < RELATIVE_ERROR
    assert (out[mask <= 0] == 0).all()


@needs_kernel
@pytest.mark.parametrize("shape", SHAPES)
def test_backward_filters_give_the_input_gradient(shape: tuple[int, ...]) -> None:
    b, c, k, h, w = shape
    gradient, weight, scale = narrow((b, k, h, w), 0), torch.randn(k, c, 3, 3), torch.rand(k) + 0.5
    out = poisoned(b, c, h, w)
    OPS.conv3x3_(out, gradient, pack(weight, scale, backward=True), None, None, None, False)
    folded = (weight * scale[:, None, None, None]).double()
    wanted = torch.nn.grad.conv2d_input((b, c, h, w), folded, gradient.double(), padding=1)
    assert relative(out, wanted) < RELATIVE_ERROR


@needs_kernel
@pytest.mark.parametrize("tap", range(9))
def test_every_tap_and_border(tap: int) -> None:
    """One pixel and one tap at a time: what is not at its place would be off by all of 1."""
    size, channels = 7, 16
    x = torch.zeros(size * size, channels, size, size)
    places = torch.arange(size * size)
    x[places, places % channels, places // size, places % size] = 1
    weight = torch.zeros(channels, channels, 9)
    weight[torch.arange(channels), torch.arange(channels).flip(0), tap] = 1
    weight = weight.view(channels, channels, 3, 3)
    out = poisoned(*x.shape)
    narrow_x = x.bfloat16().contiguous(memory_format=torch.channels_last)
    OPS.conv3x3_(out, narrow_x, pack(weight, None, False), None, None, None, False)
    assert (out.float() - F.conv2d(x, weight, padding=1)).abs().max() < 0.1
    OPS.conv3x3_(out, narrow_x, pack(weight, None, True), None, None, None, False)
    wanted = torch.nn.grad.conv2d_input(x.shape, weight, x, padding=1)
    assert (out.float() - wanted).abs().max() < 0.1


# in, out, kernel, stride, padding, dilation, height, width
GEOMETRIES = [
    (16, 32, 3, 2, 1, 1, 8, 8),
    (16, 32, 1, 2, 0, 1, 7, 9),
    (32, 64, 1, 1, 0, 1, 5, 5),
    (8, 80, 3, 2, 1, 1, 9, 5),
    (16, 16, 5, 1, 2, 1, 6, 7),
    (16, 24, 3, 1, 2, 2, 8, 6),
    (10, 16, 4, 3, 1, 1, 11, 10),
    (16, 16, 3, 3, 0, 1, 3, 7),
    (12, 40, 7, 2, 3, 1, 12, 11),
    (64, 128, 3, 2, 1, 1, 8, 8),
    (16, 16, 4, 4, 0, 1, 8, 8),
]


@needs_kernel
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_gathering_kernel_in_both_directions(geometry: tuple[int, ...]) -> None:
    c, k, kernel, stride, padding, dilation, h, w = geometry
    conv = nn.Conv2d(c, k, kernel, stride, padding, dilation)
    scale = torch.rand(k) + 0.5
    weight = (conv.weight * scale[:, None, None, None]).detach().double()
    x = narrow((3, c, h, w), 0)
    plain = F.conv2d(x.double(), weight, None, stride, padding, dilation)
    add, mask = narrow(tuple(plain.shape), 1), narrow(tuple(plain.shape), 2)
    bias = torch.randn(k)
    forward, backward = GatherKernel(conv, backward=False), GatherKernel(conv, backward=True)
    forward.refresh(conv.weight.detach(), scale)
    backward.refresh(conv.weight.detach(), scale)

    out = poisoned(*plain.shape)
    run(forward, out, x, bias, add, None, True)
    assert relative(out, F.relu(plain + bias[:, None, None] + add.double())) < 0.01
    gradient, at_input = narrow(tuple(plain.shape), 3), poisoned(*x.shape)
    run(backward, at_input, gradient, None, x, x, False)
    wanted = torch.nn.grad.conv2d_input(
        x.shape, weight, gradient.double(), stride, padding, dilation
    )
    assert relative(at_input, torch.where(x > 0, wanted + x.double(), 0.0)) < 0.01
    run(forward, out, x, None, None, mask, False)
    assert (out[mask <= 0] == 0).all()


NO_PATCHES = [g for g in GEOMETRIES if g[2] != g[3] or g[2] == 1]  # kernel and stride differ


# One column of several results: oneDNN 3.12 reads memory there that nobody has written.
ONE_COLUMN = [
    (1, 32, 5, 2, 2, 1, 12, 1),
    (16, 3, 5, 2, 2, 1, 11, 2),
    (2, 17, 3, 3, 1, 1, 12, 2),
    (16, 6, 3, 2, 1, 1, 7, 1),
    (16, 64, 2, 3, 0, 1, 10, 4),
    (32, 8, 3, 2, 1, 1, 11, 1),
    (5, 16, 3, 2, 1, 2, 10, 4),
    # Images of one column, and padding wider than the filter: it crashes.
    (8, 8, 2, 3, 3, 2, 6, 1),
    (48, 16, 1, 2, 2, 2, 11, 1),
    (17, 3, 1, 3, 3, 2, 9, 1),
]


def poison_memory() -> None:
    """Fill what the allocator will hand out next with NaN."""
    sizes = (64, 256, 1024, 4096, 16384, 65536) * 4
    _ = [torch.full((size,), torch.nan, dtype=torch.bfloat16) for size in sizes]


@needs_narrow_convolutions
@pytest.mark.parametrize("geometry", ONE_COLUMN)
def test_a_copied_convolution_of_one_column(geometry: tuple[int, ...]) -> None:
    c, k, kernel, stride, padding, dilation, h, w = geometry
    conv = nn.Conv2d(c, k, kernel, stride, padding, dilation)
    shape = ConvShape(c, k, (kernel,) * 2, (stride,) * 2, (padding,) * 2, (dilation,) * 2)
    copied = CopiedConv2d(conv.weight, True, shape, torch.bfloat16)
    copied.refresh(conv.weight.detach(), conv.bias.detach(), None)
    x = narrow((3, c, h, w), 0).requires_grad_()
    assert x.is_contiguous(memory_format=torch.channels_last)
    wide = x.detach().float().contiguous().requires_grad_()
    poison_memory()
    found, wanted = copied(x), conv(wide)
    assert relative(found, wanted.double()) < 0.01
    gradient = torch.randn_like(wanted)
    (at_x,) = torch.autograd.grad(found, x, gradient.bfloat16())
    (expected,) = torch.autograd.grad(wanted, wide, gradient)
    assert relative(at_x, expected.double()) < 0.02


@needs_narrow_convolutions
@pytest.mark.parametrize(
    "geometry", [*NO_PATCHES, *ONE_COLUMN, (3, 24, 3, 1, 1, 1, 9, 7), (16, 8, 3, 1, 0, 1, 6, 6)]
)
def test_onednn_kernel_in_both_directions(geometry: tuple[int, ...], monkeypatch) -> None:
    """What processors with AMX run; elsewhere it is slower and right all the same."""
    monkeypatch.setattr(convolution, "has_amx", lambda: True)
    monkeypatch.setattr(convolution, "amx_serves", lambda channels: False)
    c, k, kernel, stride, padding, dilation, h, w = geometry
    conv = nn.Conv2d(c, k, kernel, stride, padding, dilation)
    scale, bias = torch.rand(k) + 0.5, torch.randn(k)
    weight = (conv.weight * scale[:, None, None, None]).detach().double()
    x = narrow((3, c, h, w), 0)
    plain = F.conv2d(x.double(), weight, None, stride, padding, dilation)
    out, add = poisoned(*plain.shape), narrow(tuple(plain.shape), 1)
    forward, backward = make_kernel(conv, backward=False), make_kernel(conv, backward=True)
    assert isinstance(forward, OneDNNKernel)
    poison_memory()
    forward.refresh(conv.weight.detach(), scale)
    assert relative(run(forward, out, x), plain) < 0.01
    finished = F.relu(plain + bias[:, None, None] + add.double())
    assert relative(run(forward, out, x, bias, add, None, True), finished) < 0.01
    found = run(forward, out, x, bias, None, None, True)
    assert relative(found, F.relu(plain + bias[:, None, None])) < 0.01
    assert found.is_contiguous(memory_format=torch.channels_last)

    assert isinstance(backward, OneDNNKernel) == (stride == 1)
    if not isinstance(backward, OneDNNKernel):
        return
    backward.refresh(conv.weight.detach(), scale)
    gradient, room = narrow(tuple(plain.shape), 3), poisoned(*x.shape)
    wanted = torch.nn.grad.conv2d_input(
        x.shape, weight, gradient.double(), stride, padding, dilation
    )
    assert relative(run(backward, room, gradient), wanted) < 0.01
    masked = run(backward, room, gradient, None, x, x, False)
    assert relative(masked, torch.where(x > 0, wanted + x.double(), 0.0)) < 0.01
    assert (masked[x <= 0] == 0).all()


def test_padding_wider_than_the_filter_has_no_rotated_gradient(monkeypatch) -> None:
    monkeypatch.setattr(convolution, "has_amx", lambda: True)
    monkeypatch.setattr(convolution, "amx_serves", lambda channels: False)
    assert make_kernel(nn.Conv2d(16, 16, 3, padding=3), True) is None


@needs_kernel
def test_three_channel_gradient_writes_three_channels() -> None:
    conv = nn.Conv2d(3, 32, 3, padding=1)
    kernel = WinogradKernel(3, 32, backward=True)
    kernel.refresh(conv.weight.detach(), None)
    gradient = narrow((2, 32, 6, 6), 0)
    room = torch.full((2 * 6 * 6 * 3 + 64,), 7.0, dtype=torch.bfloat16)
    out = room[: 2 * 6 * 6 * 3].view(2, 6, 6, 3).permute(0, 3, 1, 2)
    run(kernel, out, gradient)
    weight = conv.weight.detach().double()
    wanted = torch.nn.grad.conv2d_input(out.shape, weight, gradient.double(), padding=1)
    assert relative(out, wanted) < RELATIVE_ERROR
    assert (room[2 * 6 * 6 * 3 :] == 7).all()


@needs_kernel
def test_each_convolution_has_its_kernel(monkeypatch) -> None:
    def kinds(*args: int, **options: Any) -> list[type]:
        conv = nn.Conv2d(*args, **options)
        return [type(make_kernel(conv, backward)) for backward in (False, True)]

    plain = {
        "winograd": (32, 32, 3, {"padding": 1}),
        "strided": (32, 32, 3, {"stride": 2}),
        "first": (3, 32, 3, {"padding": 1}),
        "grouped": (32, 32, 3, {"groups": 2}),
        "two strides": (32, 32, 3, {"stride": (1, 2)}),
        "patches": (32, 32, 4, {"stride": 4}),
        "more channels": (256, 256, 3, {"padding": 1}),
        "many channels": (512, 512, 3, {"padding": 1}),
        "many, strided": (128, 256, 3, {"padding": 1, "stride": 2}),
        "many, pointwise": (512, 512, 1, {}),
        "half tiles": (48, 64, 3, {"padding": 1}),
    }
    found = {}
    for amx in (False, True):
        monkeypatch.setattr(convolution, "has_amx", lambda amx=amx: amx)
        monkeypatch.setattr(convolution, "amx_serves", lambda n, amx=amx: amx and n % 32 == 0)
        found[amx] = {name: kinds(*args, **options) for name, (*args, options) in plain.items()}
    nothing = type(None)
    assert found[False] == {
        "winograd": [WinogradKernel, WinogradKernel],
        "strided": [GatherKernel, GatherKernel],
        "first": [OneDNNKernel, WinogradKernel],
        "grouped": [OneDNNKernel, nothing],
        "two strides": [OneDNNKernel, nothing],
        "patches": [GatherKernel, GatherKernel],
        "more channels": [WinogradKernel, WinogradKernel],
        "many channels": [WinogradKernel, WinogradKernel],
        "many, strided": [GatherKernel, GatherKernel],
        "many, pointwise": [GatherKernel, GatherKernel],
        "half tiles": [WinogradKernel, WinogradKernel],
    }
    assert found[True] == {
        "winograd": [TileKernel, TileKernel],
        "strided": [TileKernel, TileKernel],
        "first": [OneDNNKernel, TileKernel],
        "grouped": [OneDNNKernel, nothing],
        "two strides": [OneDNNKernel, nothing],
        "patches": [PatchKernel, PatchGradientKernel],
        "more channels": [TileKernel, TileKernel],
        "many channels": [TileKernel, TileKernel],
        "many, strided": [TileKernel, TileKernel],
        "many, pointwise": [TileKernel, TileKernel],
        "half tiles": [OneDNNKernel, TileKernel],
    }


@needs_kernel
def test_result_depends_neither_on_threads_nor_on_company() -> None:
    x, packed = narrow((40, 32, 12, 12), 0), pack(torch.randn(48, 32, 3, 3), None, False)
    threads = torch.get_num_threads()
    results = []
    for count in (1, threads, 3):
        torch.set_num_threads(count)
        out = poisoned(40, 48, 12, 12)
        OPS.conv3x3_(out, x, packed, None, None, None, False)
        results.append(out)
    torch.set_num_threads(threads)
    alone = poisoned(1, 48, 12, 12)
    last = x[-1:].clone(memory_format=torch.channels_last)
    OPS.conv3x3_(alone, last, packed, None, None, None, False)
    assert all(torch.equal(result, results[0]) for result in results)
    assert torch.equal(alone[0], results[0][-1])


@needs_kernel
def test_bad_arguments_are_named() -> None:
    x, packed = narrow((1, 16, 4, 4), 0), pack(torch.randn(16, 16, 3, 3), None, False)
    out = poisoned(1, 16, 4, 4)
    with pytest.raises(ValueError, match="out must be channels-last bfloat16"):
        OPS.conv3x3_(out.contiguous().view(1, 16, 2, 8), x, packed, None, None, None, False)
    with pytest.raises(ValueError, match="x must be channels-last bfloat16"):
        OPS.conv3x3_(out, x.float(), packed, None, None, None, False)
    with pytest.raises(ValueError, match="packed must be bfloat16 with"):
        OPS.conv3x3_(out, x, packed[:-1], None, None, None, False)
    with pytest.raises(ValueError, match="bias must be float32"):
        OPS.conv3x3_(out, x, packed, torch.zeros(15), None, None, False)
    with pytest.raises(ValueError, match="multiples of 16"):
        OPS.conv3x3_pack_(packed, torch.randn(16, 8, 3, 3), None, False)
    with pytest.raises(ValueError, match="weight must have shape"):
        OPS.conv3x3_pack_(packed, torch.randn(16, 16, 5, 5), None, False)
    with pytest.raises(ValueError, match="scale must have shape"):
        OPS.conv3x3_pack_(packed, torch.randn(16, 16, 3, 3), torch.ones(8), False)
    assert not convolution.supported(3, 64)
    assert not convolution.supported(16, 0)


@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (2, 16, 5, 7), (3, 33, 4, 4)])
def test_channel_affine(shape: tuple[int, ...]) -> None:
    x, add, mask = narrow(shape, 0), narrow(shape, 1), narrow(shape, 2)
    scale, shift = torch.randn(shape[1]), torch.randn(shape[1])
    out = poisoned(*shape)
    plain = x.float() * scale[:, None, None] + shift[:, None, None]
    OPS.channel_affine_(out, x, scale, shift, None, None, True)
    assert torch.equal(out, F.relu(plain).bfloat16())
    OPS.channel_affine_(out, x, scale, shift, add, mask, False)
    assert torch.equal(out, (torch.where(mask > 0, plain, 0.0) + add.float()).bfloat16())
    with pytest.raises(ValueError, match="scale and shift must be float32"):
        OPS.channel_affine_(out, x, scale[:-1], shift, None, None, False)


@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (2, 16, 5, 7), (3, 33, 4, 4)])
def test_merge_gradients(shape: tuple[int, ...]) -> None:
    x, add, mask = narrow(shape, 0), narrow(shape, 1), narrow(shape, 2)
    out = poisoned(*shape)
    OPS.merge_gradients_(out, x, add, mask)
    assert torch.equal(out, torch.where(mask > 0, x.float() + add.float(), 0.0).bfloat16())
    OPS.merge_gradients_(out, x, None, None)
    assert torch.equal(out, x)
    with pytest.raises(ValueError, match="mask must be bfloat16 with the shape and layout of x"):
        OPS.merge_gradients_(out, x, None, mask[:, :1])


@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (2, 16, 5, 7), (3, 33, 4, 4)])
def test_pixel_means_and_their_gradient(shape: tuple[int, ...]) -> None:
    x, add, mask = narrow(shape, 0), narrow(shape, 1), narrow(shape, 2)
    means, out = torch.full(shape[:2], torch.nan), poisoned(*shape)
    OPS.pixel_means_(means, x)
    torch.testing.assert_close(means.double(), x.double().mean((2, 3)), rtol=1e-5, atol=1e-6)
    gradient = torch.randn(shape[:2])
    part = (gradient / (shape[2] * shape[3]))[:, :, None, None].expand(shape)
    OPS.spread_pixel_means_(out, gradient, None, None)
    assert torch.equal(out, part.bfloat16())
    OPS.spread_pixel_means_(out, gradient, add, mask)
    assert torch.equal(out, torch.where(mask > 0, part + add.float(), 0.0).bfloat16())
    with pytest.raises(ValueError, match="gradient must be contiguous float32 of shape"):
        OPS.spread_pixel_means_(out, gradient.double(), None, None)
    with pytest.raises(ValueError, match="out must be contiguous float32 of shape"):
        OPS.pixel_means_(means[:, :-1], x)
