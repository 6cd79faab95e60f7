"""BatchNorm of a training pass on the CPU in bfloat16, channels-last: one kernel for each direction.

The running statistics, and the statistics of the batch, are those of torch's own up to float32's rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastadv.engine import cpu_training

_BF16 = torch.bfloat16


def fast_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    """As `torch.nn.functional.batch_norm`; None where that is to be called instead.

    Served are images in bfloat16 that have a gradient, channels-last and in training mode, with parameters in
    float32.
    """
    vectors = (running_mean, running_var, weight, bias)
    if not training or not _serves(input) or not all(_is_vector(v, input) for v in vectors):
        return None
    if input.shape[0] * input.shape[2] * input.shape[3] < 2 or not isinstance(momentum, float):
        return None  # torch says what is wrong with it
    found: Tensor = _BatchNorm.apply(input, weight, bias, running_mean, running_var, momentum, eps)
    return found


def _serves(x: Tensor) -> bool:
    return (
        type(x) is Tensor
        and x.device.type == "cpu"
        and x.dtype == _BF16
        and x.dim() == 4
        and x.numel() > 0
        and x.requires_grad
        and not torch._C._are_functorch_transforms_active()
        and torch.is_grad_enabled()
        and x.is_contiguous(memory_format=torch.channels_last)
        and cpu_training.available()
    )


def _is_vector(v: Tensor | None, x: Tensor) -> bool:
    if v is None:
        return True
    return (
        v.device.type == "cpu"
        and v.dtype == torch.float32
        and v.shape == x.shape[1:2]
        and v.is_contiguous()
        and not v.is_inference()
    )


class _BatchNorm(torch.autograd.Function):
    """Images [B, C, H, W] normalised by the batch's statistics."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
    ) -> Tensor:
        out, statistics = (
            torch.empty_like(x),
            torch.empty(2, x.shape[1], device="cpu", dtype=torch.float32),
        )
        torch.ops.fastadv.batch_norm_train_(
            out, statistics, x, weight, bias, running_mean, running_var, momentum, eps
        )
        ctx.save_for_backward(x, weight)
        ctx.statistics, ctx.eps, ctx.has_bias = statistics, eps, bias is not None
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient is to be differentiated
            mean, inverse = ctx.statistics
            wanted = [True, weight is not None, ctx.has_bias]
            found = torch.ops.aten.native_batch_norm_backward(
                gradient, x, weight, None, None, mean, inverse, True, ctx.eps, wanted
            )
            return *found, *(None,) * 4
        out, at_parameters = (
            torch.empty_like(x),
            torch.empty(2, x.shape[1], device="cpu", dtype=torch.float32),
        )
        torch.ops.fastadv.batch_norm_train_backward_(
            out,
            at_parameters,
            gradient.contiguous(memory_format=torch.channels_last),
            x,
            ctx.statistics,
            weight,
        )
        at_weight, at_bias = at_parameters
        return (
            out,
            at_weight if weight is not None else None,
            at_bias if ctx.has_bias else None,
            *(None,) * 4,
        )
