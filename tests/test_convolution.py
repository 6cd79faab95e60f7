"""The engine's own 3x3 convolution and pointwise passes on the CPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastadv.attacks import convolution

OPS = torch.ops.fastadv
# Of the result's norm. Winograd's transforms in bfloat16 cost half of this on random data, the direct sum .003.
RELATIVE_ERROR = 0.02

needs_kernel = pytest.mark.skipif(
    not convolution.supported(16, 16), reason="this processor has no AVX512-BF16"
)
SHAPES = [
    (1, 16, 16, 1, 1),
    (2, 16, 32, 5, 7),
    (3, 48, 80, 4, 4),
    (2, 64, 64, 8, 8),
    (1, 128, 144, 9, 3),
]


def narrow(shape: tuple[int, ...], seed: int) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values.bfloat16().contiguous(memory_format=torch.channels_last)


def poisoned(*shape: int) -> Tensor:
    empty = torch.full(shape, torch.nan, dtype=torch.bfloat16)
    return empty.contiguous(memory_format=torch.channels_last)


def pack(weight: Tensor, scale: Tensor | None, backward: bool) -> Tensor:
    packed = convolution.packed_filters(*weight.shape[:2])
    OPS.conv3x3_pack_(packed.fill_(torch.nan), weight, scale, backward)
    return packed


def relative(found: Tensor, wanted: Tensor) -> float:
    return ((found.double() - wanted).norm() / wanted.norm()).item()


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
    with pytest.raises(ValueError, match="packed does not fit"):
        OPS.conv3x3_(out, x, packed[:-1], None, None, None, False)
    with pytest.raises(ValueError, match="bias must be float32"):
        OPS.conv3x3_(out, x, packed, torch.zeros(15), None, None, False)
    with pytest.raises(ValueError, match="multiples of 16"):
        OPS.conv3x3_pack_(packed, torch.randn(16, 8, 3, 3), None, False)
    with pytest.raises(ValueError, match="weight must have shape"):
        OPS.conv3x3_pack_(packed, torch.randn(16, 16, 5, 5), None, False)
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
