"""A copied convolution in the forms of the CPU kernels that serve it, one for each direction.

In bfloat16 Winograd's kernel serves 3x3 convolutions of stride 1, the gathering kernel others with enough
channels, oneDNN's the rest. Depthwise ones have a kernel of their own. On processors with AMX the tile kernel
serves all ungrouped convolutions whose input channels are multiples of 32, oneDNN's the rest. In float32
Winograd's kernel serves 3x3 convolutions of stride 1, the gathering kernel others with enough channels, and
gradients in images of few channels, and oneDNN's the rest. Gradients that are no convolutions stay with torch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastadv.engine import cpu_convolution as convolution
from fastadv.engine import depthwise, patches
from fastadv.engine.convolution_kernels import (
    ConvShape,
    GatherFloatKernel,
    GatherKernel,
    Kernel,
    OneDNNKernel,
    TileKernel,
    WinogradFloatKernel,
    WinogradKernel,
    result_shape,
)

_CPU = torch.device("cpu")


class PackedConv2d:
    """Both directions of a convolution; a direction that no kernel serves is None."""

    def __init__(
        self,
        conv: ConvShape,
        has_bias: bool,
        device: torch.device = _CPU,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self._conv = conv
        self.forward = make_kernel(conv, backward=False, device=device, dtype=dtype)
        self.backward = make_kernel(conv, backward=True, device=device, dtype=dtype)
        self.bias: Tensor | None = None
        if has_bias:
            self.bias = torch.empty(conv.out_channels, dtype=torch.float32, device=device)

    def refresh(self, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> None:
        """Pack the live filters, folded in float32."""
        for kernel in (self.forward, self.backward):
            if kernel is not None:
                kernel.refresh(weight, scale)
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias)

    def result_shape(self, x: Tensor) -> tuple[int, ...]:
        """The shape of the result for images ``x``."""
        return result_shape(self._conv, x)


def make_kernel(
    conv: ConvShape,
    backward: bool,
    device: torch.device = _CPU,
    dtype: torch.dtype = torch.bfloat16,
) -> Kernel | None:
    """The kernel for one direction of a convolution, the fastest of those that serve it on this processor."""
    into, outof = conv.in_channels, conv.out_channels
    source, result = (outof, into) if backward else (into, outof)
    if device.type != "cpu" or not convolution.available():
        return None
    if dtype != torch.bfloat16:
        return _float_kernel(conv, backward) if dtype == torch.float32 else None
    if depthwise.serves(conv, backward):
        return depthwise.DepthwiseKernel(conv, backward)
    if convolution.has_amx() and convolution.onednn_available() and patches.serves(conv, backward):
        return patches.PatchGradientKernel(conv) if backward else patches.PatchKernel(conv)
    if conv.groups == 1 and conv.stride[0] == conv.stride[1] and convolution.amx_serves(source):
        return TileKernel(conv, backward)  # faster than oneDNN's at every size measured
    # oneDNN's bfloat16 convolutions of patches, whose stride is their size, are wrong at some shapes.
    of_patches = conv.stride == conv.kernel_size and conv.stride[0] > 1
    if conv.groups == 1 and (of_patches or not convolution.has_amx()):
        if _is_3x3(conv) and convolution.supported(source, result):
            return WinogradKernel(result, source, backward)
        if convolution.supported(convolution.VECTOR, 1) and _worth_gathering(conv, source, result):
            return GatherKernel(conv, backward)
    if not convolution.onednn_available() or (backward and not _rotatable(conv)):
        return None
    return OneDNNKernel(conv, backward)


def _float_kernel(conv: ConvShape, backward: bool) -> Kernel | None:
    """As `make_kernel`, in float32."""
    into, outof = conv.in_channels, conv.out_channels
    source, result = (outof, into) if backward else (into, outof)
    lanes = convolution.float_lanes()
    if lanes and _has_few_channels(conv, source, result):
        return GatherFloatKernel(conv, backward, lanes)
    if conv.groups == 1 and _is_3x3(conv):
        for narrower in (16, 8):
            if narrower <= lanes and source % narrower == 0:
                return WinogradFloatKernel(result, source, backward, narrower)
    if lanes and _worth_gathering_in_float(conv, source, result, backward):
        return GatherFloatKernel(conv, backward, lanes)
    if lanes and backward and patches.serves(conv, backward):
        return patches.PatchGradientKernel(conv, lanes)
    if not convolution.onednn_available(torch.float32) or (backward and not _rotatable(conv)):
        return None
    return OneDNNKernel(conv, backward, torch.float32)


def _has_few_channels(conv: ConvShape, source: int, result: int) -> bool:
    """Whether the gathering kernel's loops for few channels can serve, and were fastest where measured."""
    if conv.groups != 1 or conv.stride[0] != conv.stride[1]:
        return False
    if (
        result <= convolution.FEW
    ):  # a call for each place in a patch of stride x stride costs too much
        return conv.stride[0] <= 2 and source >= convolution.VECTOR // 2
    return source * math.prod(conv.kernel_size) <= convolution.VECTOR and source <= convolution.FEW


def _worth_gathering_in_float(conv: ConvShape, source: int, result: int, backward: bool) -> bool:
    """Whether the gathering kernel can, and is no slower in float32 than oneDNN's, as measured for many shapes."""
    if conv.groups != 1 or conv.stride[0] != conv.stride[1] or result < convolution.VECTOR:
        return False
    # oneDNN takes several times as long for patches of few channels.
    patches = conv.kernel_size == conv.stride and conv.padding == (0, 0) and not backward
    return source >= convolution.VECTOR // 2 or patches


def _is_3x3(conv: ConvShape) -> bool:
    """Whether Winograd's tiles fit: 3x3, and everything else 1."""
    shape = (conv.kernel_size, conv.stride, conv.padding, conv.dilation)
    return shape == ((3, 3), (1, 1), (1, 1), (1, 1))


def _rotatable(conv: ConvShape) -> bool:
    """Whether the gradient in the input is an ungrouped convolution too."""
    reach = zip(conv.dilation, conv.kernel_size, conv.padding, strict=True)
    plain = conv.groups == 1 and conv.stride == (1, 1)
    return plain and all(d * (k - 1) >= p for d, k, p in reach)


def _worth_gathering(conv: ConvShape, source: int, result: int) -> bool:
    """Whether the gathering kernel can, and fewer than half of its lanes are for nothing."""
    return conv.stride[0] == conv.stride[1] and source % 2 == 0 and source >= 8 and result >= 8
