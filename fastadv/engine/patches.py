"""Strided convolutions as convolutions of stride 1 whose channels are those of whole patches.

The inputs that a place of the result reads first make a patch of stride x stride pixels. Convolutions of patches,
as at the beginning of transformers, are products of matrices then. The gradient in the input is a convolution of
stride 1 with stride * stride times as many channels, which fills the vectors of the processor where images have 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastadv.engine.buffer_pool import Memory
from fastadv.engine.convolution_kernels import (
    ConvShape,
    Epilogue,
    GatherFloatKernel,
    Kernel,
    OneDNNKernel,
    taps_along,
)

_OPS = torch.ops.fastadv
_MOST_CHANNELS = 64  # of a patch, where neighbouring patches overlap


def serves(conv: ConvShape, backward: bool) -> bool:
    """Whether `PatchKernel` or `PatchGradientKernel` can compute this direction, and is likely to be fastest."""
    stride = conv.stride[0]
    if conv.groups > 1 or conv.stride != (stride, stride) or stride == 1:
        return False
    if conv.dilation != (1, 1) or min(conv.kernel_size) < stride:
        return False
    apart = conv.kernel_size == conv.stride and conv.padding == (0, 0)
    return apart or (backward and conv.in_channels * stride**2 <= _MOST_CHANNELS)


class PatchKernel(Kernel):
    """A convolution of patches that lie side by side, as a product of matrices."""

    def __init__(self, conv: ConvShape) -> None:
        self._stride = conv.stride[0]
        self._product = OneDNNKernel(
            ConvShape(conv.in_channels * self._stride**2, conv.out_channels, (1, 1)), backward=False
        )

    def refresh(self, weight: Tensor, scale: Tensor | None) -> None:
        """As in `Kernel.refresh`."""
        by_pixel = weight.permute(0, 2, 3, 1).reshape(len(weight), -1, 1, 1)
        self._product.refresh(by_pixel, scale)

    def run(self, memory: Memory, shape: tuple[int, ...], x: Tensor, epilogue: Epilogue) -> Tensor:
        """As in `Kernel.run`."""
        stride, (batch, _, height, width) = self._stride, shape
        patches = memory.take((batch, x.shape[1] * stride**2, height, width))
        _pixels_of(patches, stride).copy_(_patches_of(x, stride, height, width))
        return self._product.run(memory, shape, patches, epilogue)


class PatchGradientKernel(Kernel):
    """The gradient in the input of a strided convolution.

    Args:
        conv: the convolution.
        lanes: None in bfloat16; in float32 the width of the vectors, as for `GatherFloatKernel`.
    """

    def __init__(self, conv: ConvShape, lanes: int | None = None) -> None:
        self._stride = stride = conv.stride[0]
        self._channels = conv.in_channels
        # Along each axis, by the remainder of the input's place: the taps that read it, and from which result.
        self._taps = [
            [
                taps_along(conv.kernel_size[a], stride, conv.padding[a], 1, origin, backward=True)
                for origin in range(stride)
            ]
            for a in (0, 1)
        ]
        reach = [[d for taps in axis for _, d in taps] for axis in self._taps]
        self._lowest = (min(reach[0]), min(reach[1]))
        sizes = (max(reach[0]) - self._lowest[0] + 1, max(reach[1]) - self._lowest[1] + 1)
        padding = (_padding(conv, 0, reach[0]), _padding(conv, 1, reach[1]))
        self._padding, self._sizes = padding, sizes
        grouped = conv.in_channels * stride**2
        self._shape = ConvShape(conv.out_channels, grouped, sizes, (1, 1), padding)
        self._convolution: Kernel = (
            OneDNNKernel(self._shape, backward=False)
            if lanes is None
            else GatherFloatKernel(self._shape, False, lanes)
        )

    def refresh(self, weight: Tensor, scale: Tensor | None) -> None:
        """As in `Kernel.refresh`."""
        if scale is not None:
            weight = weight * scale[:, None, None, None]
        stride, channels = self._stride, self._channels
        filters = weight.new_zeros(stride, stride, channels, len(weight), *self._sizes)
        for i, down in enumerate(self._taps[0]):
            for j, right in enumerate(self._taps[1]):
                for row, low in down:
                    for column, left in right:
                        place = (low - self._lowest[0], left - self._lowest[1])
                        filters[i, j, :, :, place[0], place[1]] = weight[:, :, row, column].t()
        self._convolution.refresh(filters.flatten(0, 2), None)

    def run(self, memory: Memory, shape: tuple[int, ...], x: Tensor, epilogue: Epilogue) -> Tensor:
        """As in `Kernel.run`; an added tensor and a mask take a pass of their own."""
        stride, (batch, _, height, width) = self._stride, shape
        rows, columns = (x.shape[2 + a] + 2 * self._padding[a] - self._sizes[a] + 1 for a in (0, 1))
        grouped = (batch, self._shape.out_channels, rows, columns)
        patches = self._convolution.run(memory, grouped, x, Epilogue())
        first = [self._padding[a] + self._lowest[a] for a in (0, 1)]
        patches = patches[:, :, first[0] :, first[1] :]
        out = memory.take(shape)
        # Whole patches; the last row and column of inputs may have parts of patches, or no results.
        into = [
            min(length // stride, patches.shape[2 + a]) for a, length in enumerate((height, width))
        ]
        _patches_of(out, stride, *into).copy_(
            _pixels_of(patches[:, :, : into[0], : into[1]], stride)
        )
        self._finish_borders(out, patches, into)
        if epilogue.add is not None or epilogue.mask is not None:
            _OPS.merge_gradients_(out, out, epilogue.add, epilogue.mask)
        return out

    def _finish_borders(self, out: Tensor, patches: Tensor, whole: list[int]) -> None:
        """Rows and columns of inputs behind the whole patches, pixel by pixel of a patch."""
        stride, (height, width) = self._stride, out.shape[2:]
        if whole[0] * stride == height and whole[1] * stride == width:
            return
        out[:, :, whole[0] * stride :] = 0
        out[:, :, :, whole[1] * stride :] = 0
        pixels = patches.unflatten(1, (stride, stride, self._channels))
        for i in range(stride):
            for j in range(stride):
                part = out[:, :, i::stride, j::stride]
                rows = min(part.shape[2], patches.shape[2])
                columns = min(part.shape[3], patches.shape[3])
                part[:, :, :rows, :columns] = pixels[:, i, j, :, :rows, :columns]


def _padding(conv: ConvShape, axis: int, reach: list[int]) -> int:
    """Along an axis, the padding with which the convolution gives all patches that have a gradient.

    Args:
        conv: the convolution whose gradient is wanted.
        axis: 0 for rows, 1 for columns.
        reach: the distances from a patch's place to the results that read it.
    """
    stride, low, high = conv.stride[axis], min(reach), max(reach)
    longest = conv.kernel_size[axis] - 2 * conv.padding[axis] + stride - 1
    more = high - 1 + -(-longest // stride)  # for as many patches as the image can have
    return max(0, -low, min(more, high - low))


def _patches_of(x: Tensor, stride: int, height: int, width: int) -> Tensor:
    """The patches of a channels-last map, [B, height, width, stride, stride * C]: a view."""
    pixels = x.permute(0, 2, 3, 1)[:, : height * stride, : width * stride]
    rows = pixels.unflatten(1, (height, stride)).unflatten(3, (width, stride))
    return rows.permute(0, 1, 3, 2, 4, 5)


def _pixels_of(patches: Tensor, stride: int) -> Tensor:
    """A map whose channels are those of patches, in the same form as `_patches_of` has them: a view."""
    return patches.permute(0, 2, 3, 1).unflatten(3, (stride, stride, -1))
