"""The CPU kernels for one direction of a copied convolution, with packed filters.

`fastadv.engine.packed_convolution` chooses the kernel for each convolution.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastadv.engine import cpu_convolution as convolution
from fastadv.engine.buffer_pool import Memory

_OPS = torch.ops.fastadv


class ConvShape(NamedTuple):
    """The parameters of a two-dimensional convolution, without its weights, named as in `torch.nn.Conv2d`."""

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


def result_shape(conv: ConvShape, x: Tensor) -> tuple[int, int, int, int]:
    """The shape [B, K, H, W] of the result for images ``x``."""
    height, width = (
        (x.shape[2 + a] + 2 * conv.padding[a] - conv.dilation[a] * (conv.kernel_size[a] - 1) - 1)
        // conv.stride[a]
        + 1
        for a in (0, 1)
    )
    return x.shape[0], conv.out_channels, height, width


class Epilogue(NamedTuple):
    """The last operations of a kernel on a convolution y: ``where(mask > 0, relu(y + bias + add), 0)``.

    A term that is None is left out.

    Attributes:
        bias: float32 [K].
        add: channels-last [B, K, H, W], in the dtype of the images.
        mask: channels-last [B, K, H, W], in the dtype of the images.
        relu: whether negative values become 0.
    """

    bias: Tensor | None = None
    add: Tensor | None = None
    mask: Tensor | None = None
    relu: bool = False


class Kernel(ABC):
    """One direction of one convolution, its filters packed."""

    @abstractmethod
    def refresh(self, weight: Tensor, scale: Tensor | None) -> None:
        """Pack the filters [K, C, h, w], times ``scale`` [K], in memory kept."""

    @abstractmethod
    def run(self, memory: Memory, shape: tuple[int, ...], x: Tensor, epilogue: Epilogue) -> Tensor:
        """The convolution of ``x``, and then the epilogue.

        Args:
            memory: the pool from which the result's memory may be taken.
            shape: shape of the result [B, K, H, W].
            x: channels-last [B, C, H, W], in the dtype that the kernel was made for.
            epilogue: the operations on it before it is stored.
        """


class WinogradKernel(Kernel):
    """A 3x3 convolution of stride 1 and padding 1, or its gradient in the input."""

    def __init__(self, out_channels: int, in_channels: int, backward: bool) -> None:
        padded = -(-out_channels // convolution.VECTOR) * convolution.VECTOR
        self._packed = torch.empty(
            convolution.POINTS * padded * in_channels, dtype=torch.bfloat16, device="cpu"
        )
        self._backward = backward

    def refresh(self, weight: Tensor, scale: Tensor | None) -> None:
        """As in `Kernel.refresh`."""
        _OPS.conv3x3_pack_(self._packed, weight, scale, self._backward)

    def run(self, memory: Memory, shape: tuple[int, ...], x: Tensor, epilogue: Epilogue) -> Tensor:
        """As in `Kernel.run`."""
        out = memory.take(shape)
        _OPS.conv3x3_(out, x, self._packed, *epilogue)
        return out


class WinogradFloatKernel(Kernel):
    """The convolutions of `WinogradKernel`, in float32.

    Args:
        out_channels: channels of the result.
        in_channels: channels of the input, a multiple of ``lanes``.
        backward: whether it is the gradient in the input.
        lanes: the width of the vectors, as `fastadv.engine.cpu_convolution.float_lanes` gives it.
    """

    def __init__(self, out_channels: int, in_channels: int, backward: bool, lanes: int) -> None:
        padded = -(-out_channels // convolution.VECTOR) * convolution.VECTOR
        self._packed = torch.empty(
            convolution.POINTS * padded * in_channels, dtype=torch.float32, device="cpu"
        )
        self._backward, self._lanes = backward, lanes

    def refresh(self, weight: Tensor, scale: Tensor | None) -> None:
        """As in `Kernel.refresh`."""
        _OPS.conv3x3_float_pack_(self._packed, weight, scale, self._backward, self._lanes)

    def run(self, memory: Memory, shape: tuple[int, ...], x: Tensor, epilogue: Epilogue) -> Tensor:
        """As in `Kernel.run`."""
        out = memory.take(shape)
        _OPS.conv3x3_float_(out, x, self._packed, *epilogue, self._lanes)
        return out


@dataclass
class TapGroup:
    """The results that share their taps: where they lie and which inputs they read."""

    taps: list[tuple[int, int]]  # in the filter
    rows: list[int]  # of the input, relative to the place's own
    columns: list[int]


class GatherKernel(Kernel):
    """Any ungrouped convolution with one stride for both axes, or its gradient in the input."""

    _convolve: Callable[..., None] = _OPS.conv_gather_
    _dtype = torch.bfloat16
    _block = convolution.WIDE  # output channels of a block of filters
    _together = 2  # input channels that lie side by side in it

    def __init__(self, conv: ConvShape, backward: bool) -> None:
        stride, _ = conv.stride
        self._backward = backward
        origins = [(i, j) for i in range(stride) for j in range(stride)] if backward else [(0, 0)]
        self._groups = [_tap_group(conv, origin, backward) for origin in origins]
        taps = [len(group.taps) for group in self._groups]
        into, outof = conv.in_channels, conv.out_channels
        result, source = (into, outof) if backward else (outof, into)
        self._few = self._dtype == torch.float32 and result <= convolution.FEW
        width = result if self._few else -(-result // convolution.VECTOR) * convolution.VECTOR
        self._packed = torch.zeros(width * source * sum(taps), dtype=self._dtype, device="cpu")
        self._parts = self._packed.split([width * source * count for count in taps])
        self._grids = (
            [row for group in self._groups for row in group.rows],
            [column for group in self._groups for column in group.columns],
            taps,
            [index for origin in origins for index in origin],
            (1, stride) if backward else (stride, 1),
        )

    def refresh(self, weight: Tensor, scale: Tensor | None) -> None:
        """As in `Kernel.refresh`."""
        if scale is not None:
            weight = weight * scale[:, None, None, None]
        if self._backward:
            weight = weight.transpose(0, 1)
        by_tap = weight.permute(2, 3, 1, 0)
        for group, packed in zip(self._groups, self._parts, strict=True):
            if group.taps:
                rows, columns = (_evenly_spaced(along) for along in zip(*group.taps, strict=True))
                self._pack(packed, by_tap[rows, columns])

    def _pack(self, packed: Tensor, filters: Tensor) -> None:
        """Write filters [h, w, in, out] where the kernel reads them.

        The order is [blocks of output channels][h][w][in / together][block][together]. The last block may have
        more places than there are output channels. These stay 0.
        """
        source, result = filters.shape[2:]
        if self._few:
            packed.view(result, *filters.shape[:3]).copy_(filters.permute(3, 0, 1, 2))
            return
        block = self._block
        pairs = filters.unflatten(2, (-1, self._together))
        whole = result // block * block
        ends = whole * source * filters.shape[:2].numel()
        for to, part in (
            (packed[:ends], pairs[..., :whole].unflatten(4, (-1, block))),
            (packed[ends:], pairs[..., None, whole:]),
        ):
            if part.numel():
                height, width, depth, together, blocks, out = part.shape
                into = to.view(blocks, height, width, depth, -1, together)
                into[..., :out, :].copy_(part.permute(4, 0, 1, 2, 5, 3))

    def run(self, memory: Memory, shape: tuple[int, ...], x: Tensor, epilogue: Epilogue) -> Tensor:
        """As in `Kernel.run`."""
        out = memory.take(shape)
        self._convolve(out, x, self._packed, *self._grids, *epilogue)
        return out


class GatherFloatKernel(GatherKernel):
    """The convolutions of `GatherKernel`, in float32.

    Args:
        conv: the convolution.
        backward: whether it is the gradient in the input.
        lanes: the width of the vectors, as `fastadv.engine.cpu_convolution.float_lanes` gives it.
    """

    _dtype = torch.float32
    _together = 1

    def __init__(self, conv: ConvShape, backward: bool, lanes: int) -> None:
        super().__init__(conv, backward)
        self._block = convolution.FLOAT_WIDE[lanes]
        self._convolve = lambda *args: _OPS.conv_gather_float_(*args, lanes)


class TileKernel(GatherKernel):
    """The convolutions of `GatherKernel` by AMX, for input channels in multiples of 32."""

    _convolve = _OPS.conv_amx_

    def refresh(self, weight: Tensor, scale: Tensor | None) -> None:
        """As in `Kernel.refresh`."""
        for group, packed in zip(self._groups, self._parts, strict=True):
            taps = [i * weight.shape[3] + j for i, j in group.taps]
            if taps:
                _OPS.conv_amx_pack_(packed, weight, scale, taps, self._backward)


def _evenly_spaced(taps: Sequence[int]) -> slice:
    """The slice of all taps along one axis that those of a group are; each may be named several times."""
    each = sorted(set(taps))
    return slice(each[0], each[-1] + 1, each[1] - each[0] if len(each) > 1 else 1)


def _tap_group(conv: ConvShape, origin: tuple[int, int], backward: bool) -> TapGroup:
    """The taps of one grid; forward there is one, backward one per remainder modulo the stride."""
    along = [
        taps_along(conv.kernel_size[a], conv.stride[a], conv.padding[a], conv.dilation[a],
                    origin[a], backward)
        for a in (0, 1)
    ]  # fmt: skip
    pairs = [(down, right) for down in along[0] for right in along[1]]
    return TapGroup(
        taps=[(down[0], right[0]) for down, right in pairs],
        rows=[down[1] for down, _ in pairs],
        columns=[right[1] for _, right in pairs],
    )


def taps_along(
    size: int, stride: int, padding: int, dilation: int, origin: int, backward: bool
) -> list[tuple[int, int]]:
    """Along one axis, the taps, and the distance from the position at which each of them reads."""
    if not backward:
        return [(tap, tap * dilation - padding) for tap in range(size)]
    reach = [(tap, origin + padding - tap * dilation) for tap in range(size)]
    return [(tap, distance // stride) for tap, distance in reach if distance % stride == 0]


class OneDNNKernel(Kernel):
    """oneDNN's convolution, or, at stride 1, its gradient as the convolution with rotated filters."""

    def __init__(
        self, conv: ConvShape, backward: bool, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        padding = list(conv.padding)
        if backward:
            reach = zip(conv.dilation, conv.kernel_size, padding, strict=True)
            padding = [d * (k - 1) - p for d, k, p in reach]
        self._backward, self._dtype = backward, dtype
        self._groups = conv.groups
        self._geometry = (padding, conv.stride, conv.dilation, conv.groups)
        self._filters = torch.empty(0, device="cpu", dtype=torch.float32)

    def refresh(self, weight: Tensor, scale: Tensor | None) -> None:
        """As in `Kernel.refresh`, but in new memory, which is oneDNN's own."""
        if scale is not None:
            weight = weight * scale[:, None, None, None]
        narrow = weight.to(self._dtype)
        if self._backward:  # a view is left to the reordering, which copies in any case
            narrow = narrow.flip(2, 3).transpose(0, 1)
        self._filters = torch.ops.mkldnn._reorder_convolution_weight(narrow, *self._geometry)

    def run(self, memory: Memory, shape: tuple[int, ...], x: Tensor, epilogue: Epilogue) -> Tensor:
        """As in `Kernel.run`; a mask takes a pass of its own."""
        bias = None if epilogue.bias is None else epilogue.bias.to(x.dtype)
        filters, name = (self._filters, bias, *self._geometry), "relu" if epilogue.relu else None
        if misread(x, shape, self._geometry[1]):
            pointwise = torch.ops.mkldnn._convolution_pointwise
            out = on_wider_images(
                lambda wide: pointwise(wide, *filters, "none", [], ""), x, shape, self._geometry[1]
            )
            out = out if epilogue.add is None else out + epilogue.add
            out = out.relu() if epilogue.relu else out
        elif epilogue.add is None:
            out = torch.ops.mkldnn._convolution_pointwise(x, *filters, name or "none", [], "")
        else:
            fused = name if self._groups == 1 else None  # it refuses both after grouped ones
            out = torch.ops.mkldnn._convolution_pointwise.binary(
                x, epilogue.add, *filters, "add", 1.0, fused, [], None
            )
            out = out if fused == name else out.relu_()
        out = out.contiguous(memory_format=torch.channels_last)
        if epilogue.mask is None:
            return out
        masked = memory.take(shape)
        _OPS.merge_gradients_(masked, out, None, epilogue.mask)
        return masked


def misread(x: Tensor, shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether oneDNN's convolution of channels-last ``x``, with a result [B, K, H, W], goes wrong on a CPU.

    Where strides are wider than 1, it may crash for images of one column. In bfloat16 with AMX it reads memory
    that nobody has written for one column of several results. torch 2.13 hands such convolutions on to it.
    """
    return stride[1] > 1 and (x.shape[3] == 1 or (shape[3] == 1 and shape[2] > 1))


def on_wider_images(
    convolve: Callable[[Tensor], Tensor], x: Tensor, shape: Sequence[int], stride: Sequence[int]
) -> Tensor:
    """The result [B, K, H, W] of a convolution, from images with so many columns more that it has one more."""
    wide = F.pad(x, (0, stride[1])).contiguous(memory_format=torch.channels_last)
    return convolve(wide)[..., : shape[3]]
