"""Depthwise convolutions, and their gradients in the input, by our kernel (see `fastadv.engine.cpu_channels`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastadv.engine import cpu_channels
from fastadv.engine.buffer_pool import Memory
from fastadv.engine.convolution_kernels import ConvShape, Epilogue, Kernel, taps_along

_OPS = torch.ops.fastadv


@dataclass
class _Grid:
    """The results that share their taps: where they lie and which block of inputs they read."""

    origin: tuple[int, int]
    rows: list[int]  # of the filter, by the row of the input that they read
    columns: list[int]
    first: tuple[int, int]  # of the inputs, relative to the place's own
    packed: Tensor


def serves(conv: ConvShape, backward: bool) -> bool:
    """Whether `DepthwiseKernel` can compute this direction of a convolution."""
    depthwise = conv.groups == conv.in_channels == conv.out_channels
    if not depthwise or conv.dilation != (1, 1) or conv.stride[0] != conv.stride[1]:
        return False
    stride = conv.stride[0]
    if not backward:
        return cpu_channels.serves_depthwise(conv.kernel_size[1], stride)
    if min(conv.kernel_size) < stride:  # some inputs have no gradient
        return False
    counts = {len(range(first, conv.kernel_size[1], stride)) for first in range(stride)}
    return all(cpu_channels.serves_depthwise(count, 1) for count in counts)


class DepthwiseKernel(Kernel):
    """A depthwise convolution with one stride for both axes, or its gradient in the input."""

    def __init__(self, conv: ConvShape, backward: bool) -> None:
        stride, _ = conv.stride
        self._steps = (1, stride) if backward else (stride, 1)
        origins = [(i, j) for i in range(stride) for j in range(stride)] if backward else [(0, 0)]
        self._grids = [_grid(conv, origin, backward) for origin in origins]

    def refresh(self, weight: Tensor, scale: Tensor | None) -> None:
        """As in `Kernel.refresh`."""
        filters = weight[:, 0].float()
        if scale is not None:
            filters = filters * scale[:, None, None]
        filters = F.pad(filters, (0, 0, 0, 0, 0, -len(filters) % cpu_channels.BLOCK))
        pairs = filters.reshape(-1, cpu_channels.BLOCK // 2, 2, *filters.shape[1:])
        by_tap = pairs.permute(0, 3, 4, 2, 1)
        for grid in self._grids:
            grid.packed.copy_(by_tap[:, grid.rows][:, :, grid.columns])

    def run(self, memory: Memory, shape: tuple[int, ...], x: Tensor, epilogue: Epilogue) -> Tensor:
        """As in `Kernel.run`."""
        out = memory.take(shape)
        for grid in self._grids:
            taps = (len(grid.rows), len(grid.columns))
            if grid.origin[0] < shape[2] and grid.origin[1] < shape[3]:
                where = (grid.first, taps, self._steps, grid.origin)
                _OPS.conv_depthwise_(out, x, grid.packed, *where, *epilogue)
        return out


def _grid(conv: ConvShape, origin: tuple[int, int], backward: bool) -> _Grid:
    rows, columns = (
        sorted(
            taps_along(
                conv.kernel_size[a], conv.stride[a], conv.padding[a], 1, origin[a], backward
            ),
            key=lambda tap: tap[1],
        )
        for a in (0, 1)
    )
    blocks = -(-conv.in_channels // cpu_channels.BLOCK)
    return _Grid(
        origin=origin,
        rows=[tap for tap, _ in rows],
        columns=[tap for tap, _ in columns],
        first=(rows[0][1], columns[0][1]),
        packed=torch.empty(
            (blocks, len(rows), len(columns), 2, cpu_channels.BLOCK // 2),
            dtype=torch.float32,
            device="cpu",
        ),
    )
