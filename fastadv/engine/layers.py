"""The layers of an attack copy, made from a recorded call of a torch function and the weights it was given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastadv.engine.convolution_kernels import ConvShape, misread, on_wider_images, result_shape
from fastadv.engine.packed_convolution import PackedConv2d

_FEW_WEIGHTS = 2**16  # a linear layer with at most this number of weights keeps them in float32
# With float32 weights torch's CPU kernels keep the statistics of narrow maps in float32 too. In their gradients
# differences nearly cancel, which statistics in bfloat16 are too coarse for.
_MIXED_NORMS = (F.layer_norm, torch.layer_norm, F.group_norm, torch.group_norm)


@dataclass(frozen=True)
class NormTensors:
    """The tensors and the epsilon of a BatchNorm in eval mode, [C] each."""

    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """The norm as ``x * scale + shift``, both [C]."""
        scale = torch.rsqrt(self.var + self.eps)
        if self.weight is not None:
            scale = scale * self.weight
        shift = -self.mean * scale
        return scale, shift if self.bias is None else shift + self.bias


class CopiedConv2d(nn.Module):
    """A convolution with the BatchNorm behind it folded in: ``conv(x, w * s) + (b - mean) * s + beta``.

    Args:
        weight: the live filters [K, C / groups, h, w].
        has_bias: whether there is a bias, or a norm to be folded.
        shape: strides, padding, dilation and groups.
        dtype: of the copy.
    """

    def __init__(
        self, weight: Tensor, has_bias: bool, shape: ConvShape, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.shape = shape
        self.weight: Tensor
        self.bias: Tensor | None
        own = torch.empty_like(weight, dtype=dtype, memory_format=torch.channels_last)
        self.register_buffer("weight", own.detach(), persistent=False)
        bias = torch.empty(weight.shape[0], dtype=dtype, device=weight.device)
        self.register_buffer("bias", bias if has_bias else None, persistent=False)
        self.packed: PackedConv2d | None = None

    def pack(self) -> None:
        """Keep the weights in the forms of our own kernels, as far as they serve."""
        self.packed = PackedConv2d(
            self.shape, self.bias is not None, self.weight.device, self.weight.dtype
        )
        if self.packed.forward is not None and self.packed.backward is not None:
            self.weight = self.weight.new_empty(0)  # these weights would not be refreshed

    def refresh(self, weight: Tensor, bias: Tensor | None, norm: NormTensors | None) -> None:
        """Copy the live weights."""
        scale = None
        if norm is not None:
            scale, shift = norm.scale_and_shift()
            bias = shift if bias is None else shift + bias * scale
        if self.packed is not None:
            self.packed.refresh(weight, scale, bias)
        if self.weight.numel():
            by_channel = None if scale is None else scale[:, None, None, None]
            self.weight.copy_(weight if by_channel is None else weight * by_channel)
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve in the copy's dtype."""
        x = x.to(self.weight.dtype)
        if x.device.type == "cpu" and x.dim() == 4:
            shape = result_shape(self.shape, x)
            if misread(x, shape, self.shape.stride):
                return on_wider_images(self._convolve, x, shape, self.shape.stride)
        return self._convolve(x)

    def _convolve(self, x: Tensor) -> Tensor:
        s = self.shape
        return F.conv2d(x, self.weight, self.bias, s.stride, s.padding, s.dilation, s.groups)

    def input_gradient(self, gradient: Tensor, x: Tensor) -> Tensor:
        """The gradient in ``x`` of a gradient at the result."""
        return torch.ops.aten.convolution_backward(
            gradient,
            x.to(self.weight.dtype),
            self.weight,
            None,
            self.shape.stride,
            self.shape.padding,
            self.shape.dilation,
            False,
            (0, 0),
            self.shape.groups,
            (True, False, False),
        )[0]


class CopiedScaleShift(nn.Module):
    """BatchNorm of eval mode with no convolution before it, as in pre-activation nets: ``x * s + t``."""

    def __init__(self, channels: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.scale: Tensor
        self.shift: Tensor
        self._dtype = dtype
        kept = torch.promote_types(dtype, torch.float32)
        for name in ("scale", "shift"):
            values = torch.empty(channels, dtype=kept, device=device)
            self.register_buffer(name, values, persistent=False)

    def refresh(self, norm: NormTensors) -> None:
        """Copy the live statistics and weights."""
        scale, shift = norm.scale_and_shift()
        self.scale.copy_(scale)
        self.shift.copy_(shift)

    def forward(self, x: Tensor) -> Tensor:
        """Scale and shift each channel."""
        channels = (1, -1, *[1] * (x.dim() - 2))
        scale, shift = (t.to(self._dtype).view(channels) for t in (self.scale, self.shift))
        return torch.addcmul(shift, x.to(self._dtype), scale)


class CopiedLinear(nn.Module):
    """A linear layer."""

    def __init__(self, weight: Tensor, has_bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight: Tensor
        self.bias: Tensor | None
        self.small = False
        self.generation = 0  # how often the weights have been copied
        own = torch.empty_like(weight, dtype=dtype).detach()
        self.register_buffer("weight", own, persistent=False)
        bias = own.new_empty(weight.shape[0]) if has_bias else None
        self.register_buffer("bias", bias, persistent=False)

    def pack(self) -> None:
        """Keep few weights in float32: narrow ones save less time than it takes to convert to and fro."""
        self.small = self.weight.numel() <= _FEW_WEIGHTS
        if self.small:
            self.float()

    def refresh(self, weight: Tensor, bias: Tensor | None) -> None:
        """Copy the live weights."""
        self.generation += 1
        self.weight.copy_(weight)
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply in the dtype of the weights."""
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


class CopiedFunction(nn.Module):
    """Any other layer: a torch function whose weights are kept, and whose images are cast, to the copy's dtype.

    Args:
        function: the function.
        names: keyword of each weight, or its place among the positional arguments.
        weights: the live weights.
        dtype: of the copy.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        names: list[int | str],
        weights: list[Tensor],
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.function, self.names, self._dtype = function, names, dtype
        for number, weight in enumerate(weights):
            wide = function in _MIXED_NORMS and weight.device.type == "cpu"
            kept = torch.promote_types(dtype, torch.float32) if wide else dtype
            own = torch.empty_like(weight, dtype=_narrowed(weight, kept)).detach()
            self.register_buffer(f"weight{number}", own, persistent=False)

    def refresh(self, *weights: Tensor) -> None:
        """Copy the live weights."""
        for number, weight in enumerate(weights):
            self.get_buffer(f"weight{number}").copy_(weight)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function with the weights in their places."""
        full = [_cast(a, self._dtype) for a in args]
        named = {k: _cast(v, self._dtype) for k, v in kwargs.items()}
        for number, name in enumerate(self.names):
            weight = self.get_buffer(f"weight{number}")
            if isinstance(name, int):
                full[name] = weight
            else:
                named[name] = weight
        return self.function(*full, **named)


def instance_norm(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """As `torch.nn.functional.instance_norm`, more exact on the CPU.

    There torch 2.13 keeps the statistics of narrow maps as coarse as the maps: too coarse for the gradient of few
    pixels. And it misreads the gradient of a single image that is channels-last, as in a copy it is.
    """
    if input.device.type != "cpu":
        return F.instance_norm(input, *args, **kwargs)
    wide = torch.promote_types(input.dtype, torch.float32)
    out = F.instance_norm(
        input.to(wide),
        *(_cast(value, wide) for value in args),
        **{name: _cast(value, wide) for name, value in kwargs.items()},
    )
    if out.requires_grad:
        out.register_hook(torch.Tensor.contiguous)
    return out.to(input.dtype)


def _narrowed(weight: Tensor, dtype: torch.dtype) -> torch.dtype:
    return dtype if weight.is_floating_point() else weight.dtype


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(dtype)
    if isinstance(value, (list, tuple)):
        parts = [_cast(part, dtype) for part in value]
        return tuple(parts) if isinstance(value, tuple) else parts
    return value
