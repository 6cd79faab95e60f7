"""Convolutions of a training pass on the CPU in bfloat16, each direction by the fastest kernel that serves it.

With AMX our packed convolutions compute the result and the gradient in the input, and a kernel of its own the
gradient in the weights, in float32. Without AMX the gradient in the input is by Winograd's convolution. All else
is torch's own. BatchNorm goes by `fastadv.engine.training_norm`.

A context watches the calls of `torch.conv2d` and of `torch.nn.functional.batch_norm`, so that any model is served
and no module changes.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastadv.engine import cpu_convolution as convolution
from fastadv.engine.buffer_pool import Memory
from fastadv.engine.convolution_kernels import (
    ConvShape,
    Epilogue,
    Kernel,
    TileKernel,
    WinogradKernel,
    result_shape,
)
from fastadv.engine.cpu_training import serves_weight_gradient
from fastadv.engine.packed_convolution import make_kernel
from fastadv.engine.replaced_functions import replaced_function
from fastadv.engine.training_norm import fast_batch_norm

_BF16 = torch.bfloat16
_MANY_OUTPUTS = 256


class _FreshMemory(Memory):
    """Results that are the caller's own."""

    def take(self, shape: torch.Size | tuple[int, ...]) -> Tensor:
        """A new tensor with arbitrary contents."""
        return torch.empty(
            tuple(shape), dtype=_BF16, memory_format=torch.channels_last, device="cpu"
        )


class _PackedFilters:
    """The filters of one weight, packed for one direction when they are needed."""

    def __init__(self, kernel: Kernel | None) -> None:
        self.kernel = kernel
        self._packed_at: tuple[int, int] | None = None

    def ready(self, weight: Tensor, use: int) -> Kernel | None:
        """The kernel with the weight as it is in the use of this number."""
        if self.kernel is not None and self._packed_at != (use, weight._version):
            self.kernel.refresh(weight.detach(), None)
            self._packed_at = (use, weight._version)
        return self.kernel


@dataclass
class _ServedConv:
    """The kernel for the convolutions with one weight."""

    weight: weakref.ref[Tensor]
    shape: ConvShape
    forward: _PackedFilters
    backward: _PackedFilters
    weight_kernel: bool  # whether our kernel computes the gradient in the weights


class _ConvPlan(NamedTuple):
    """One call of a convolution."""

    layer: _ServedConv
    use: int


class TrainingConvolutions(TorchFunctionMode):
    """Within, convolutions with trained weights and BatchNorm in bfloat16 on the CPU are the fastest here.

    Weights are packed once within one context, unless they change. The object may be entered again and again; it
    keeps the memory for the packed filters.

    While others have replaced a function of torch, nothing is served: under a mode a replacement may run twice.
    """

    def __init__(self) -> None:
        super().__init__()
        self._layers: dict[int, _ServedConv] = {}  # by id of the weight
        self._use = 0
        self._serves: list[bool] = []  # of the contexts that are open

    def __enter__(self) -> Any:
        """Begin a pass, whose weights may have changed since the last one in any way."""
        self._use += 1
        self._serves.append(replaced_function() is None)
        return super().__enter__() if self._serves[-1] else self

    def __exit__(self, *error: Any) -> None:
        """End a pass."""
        if self._serves.pop():
            super().__exit__(*error)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run one function of torch."""
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():  # which has convolutions of its own
            return func(*args, **kwargs)
        if func is torch.conv2d and torch.is_autocast_enabled("cpu") and not _is_watched():
            call = _call(*args, **kwargs)
            plan = None if call is None else self._plan(call.weight, call.shape)
            if call is not None and plan is not None:
                return _FastConv2d.apply(call.x, call.weight, call.bias, plan)
        if func is F.batch_norm and not _is_watched():
            found = fast_batch_norm(*args, **kwargs)
            if found is not None:
                return found
        return func(*args, **kwargs)

    def _plan(self, weight: Tensor, shape: ConvShape) -> _ConvPlan | None:
        """The kernel for a convolution; None where torch's own is as good."""
        layer = self._layers.get(id(weight))
        if layer is None or layer.weight() is not weight or layer.shape != shape:
            self._layers = {k: v for k, v in self._layers.items() if v.weight() is not None}
            ours = serves_weight_gradient(shape.in_channels, shape.out_channels)
            forward, backward = map(_PackedFilters, _kernels(shape))
            layer = _ServedConv(weakref.ref(weight), shape, forward, backward, ours)
            self._layers[id(weight)] = layer
        if not (layer.forward.kernel or layer.backward.kernel or layer.weight_kernel):
            return None
        return _ConvPlan(layer, self._use)


def _is_watched() -> bool:
    """Whether somebody keeps account of the tensors that autograd saves, as activation checkpointing does.

    It runs the forward pass once more outside of this context, and expects the same there.
    """
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


class _TrainedConv(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    shape: ConvShape


def _call(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> _TrainedConv | None:
    """The call of a convolution that may be served."""
    trained = type(weight) is nn.Parameter and weight.requires_grad and torch.is_grad_enabled()
    if not trained or groups != 1 or isinstance(padding, str) or type(input) is not Tensor:
        return None
    if weight.dtype != torch.float32 or weight.dim() != 4 or input.dim() != 4 or not input.numel():
        return None
    if input.device.type != "cpu" or torch.get_autocast_dtype("cpu") != _BF16:
        return None
    pairs: Any = [
        tuple(n) if isinstance(n, (tuple, list)) else (n, n) for n in (stride, padding, dilation)
    ]
    if any(len(pair) != 2 for pair in pairs) or input.shape[1] != weight.shape[1]:
        return None
    outof, into, height, width = weight.shape
    return _TrainedConv(input, weight, bias, ConvShape(into, outof, (height, width), *pairs))


def _kernels(shape: ConvShape) -> tuple[Kernel | None, Kernel | None]:
    """Our kernels for the result and for the gradient in the input, where they are faster than oneDNN's.

    Their filters are packed for every step. Tiles save more than that, but for the gradients of 1x1 convolutions
    with few channels. Winograd's kernel computes gradients alone: its rounding is coarse, and coarse results would
    make all gradients so.
    """
    if not convolution.available():
        return None, None
    forward, backward = (make_kernel(shape, backward=way) for way in (False, True))
    if not isinstance(forward, TileKernel):
        forward = None
    worth = shape.out_channels >= _MANY_OUTPUTS or shape.kernel_size != (1, 1)
    if not (isinstance(backward, WinogradKernel) or (isinstance(backward, TileKernel) and worth)):
        backward = None
    return forward, backward


class _FastConv2d(torch.autograd.Function):
    """conv2d(x, weight) + bias in bfloat16, of images [B, C, H, W] and a weight in float32."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, plan: _ConvPlan
    ) -> Tensor:
        shape = plan.layer.shape
        narrow = _narrow(x)
        ctx.save_for_backward(x, weight)
        ctx.plan, ctx.dtype, ctx.has_bias = plan, x.dtype, bias is not None
        kernel = plan.layer.forward.ready(weight, plan.use)
        if kernel is None:
            return _narrow(F.conv2d(narrow, weight.to(_BF16), _cast(bias, _BF16), *shape[3:]))
        wide = _cast(bias, torch.float32)
        return kernel.run(_FreshMemory(), result_shape(shape, x), narrow, Epilogue(wide))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        plan, wanted = ctx.plan, ctx.needs_input_grad
        at_bias = gradient.float().sum((0, 2, 3)) if ctx.has_bias and wanted[2] else None
        if torch.is_grad_enabled():  # the gradient is to be differentiated
            found = _by_torch(gradient, x, weight, plan.layer.shape, (wanted[0], wanted[1]))
            return _cast(found[0], ctx.dtype), _cast(found[1], weight.dtype), at_bias, None
        gradient, narrow = _narrow(gradient), _narrow(x)
        at_x = at_weight = None
        kernel = plan.layer.backward.ready(weight, plan.use) if wanted[0] else None
        if kernel is not None:
            at_x = kernel.run(_FreshMemory(), tuple(x.shape), gradient, Epilogue())
        ours = plan.layer.weight_kernel and wanted[1]
        if ours:
            at_weight = _gradient_in_weight(gradient, narrow, weight, plan.layer.shape)
        rest = (wanted[0] and kernel is None, wanted[1] and not ours)
        if any(rest):
            found = _by_torch(gradient, narrow, weight, plan.layer.shape, rest)
            at_x = found[0] if rest[0] else at_x
            at_weight = found[1] if rest[1] else at_weight
        return _cast(at_x, ctx.dtype), _cast(at_weight, weight.dtype), at_bias, None


def _by_torch(
    gradient: Tensor, x: Tensor, weight: Tensor, shape: ConvShape, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients in the images and in the weights, as far as they are wanted."""
    found = torch.ops.aten.convolution_backward(
        gradient.to(_BF16), x.to(_BF16), weight.to(_BF16), None, *shape[3:6], False, (0, 0), 1,
        (*wanted, False),
    )  # fmt: skip
    return found[0], found[1]


def _gradient_in_weight(gradient: Tensor, x: Tensor, weight: Tensor, shape: ConvShape) -> Tensor:
    """The gradient in the weights [K, C, h, w], channels-last float32."""
    out = torch.empty(
        weight.shape, dtype=torch.float32, memory_format=torch.channels_last, device="cpu"
    )
    torch.ops.fastadv.conv_weight_gradient_(
        out, gradient, x, shape.stride, shape.padding, shape.dilation
    )
    return out


def _narrow(x: Tensor) -> Tensor:
    return x.to(_BF16).contiguous(memory_format=torch.channels_last)


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)
