"""The number of multiply-adds of a network for one image."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from fastadv.engine.frozen import frozen
from fastadv.ops.values import integer, shown


def multiply_adds(model: nn.Module, shape: Sequence[int]) -> int:
    """Count the multiplications, each with its addition, of one pass of one image.

    Convolutions, matrix products, attention and the merger of a stack are counted, as PyTorch carries them out.
    Elementwise operations, such as BatchNorm and ReLU, are not counted, as in the figures of papers.

    Args:
        model: the network; the pass is in evaluation mode.
        shape: shape of one image, [C, H, W].

    Returns:
        The number of multiplications.

    Raises:
        TypeError: if the model is not a module, or the shape is not a sequence of integers.
        ValueError: if the shape has not three axes, or a length below 1.
        Exception: the exception of the network for such an image.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module, got {shown(model)}")
    if not isinstance(shape, Sequence):
        raise TypeError(f"shape must be [C, H, W], got {shown(shape)}")
    size = [integer("shape", length, at_least=1) for length in shape]
    if len(size) != 3:
        raise ValueError(f"shape must be [C, H, W], got {list(shape)}")
    # On the meta device tensors have shapes and no values, so that nothing is computed and no random number drawn.
    tensors = {
        name: tensor.to("meta")
        for name, tensor in chain(model.named_parameters(), model.named_buffers())
    }
    merger: dict[Any, Any] = {torch.ops.fastadv.linear_merger: _merger_flops}
    counting = FlopCounterMode(display=False, custom_mapping=merger)
    with frozen(model, seed=0), torch.no_grad(), counting as counter:
        functional_call(model, tensors, torch.empty(1, *size, device="meta"))
    return int(counter.get_total_flops()) // 2


def _merger_flops(
    features: Any, weight: Sequence[int], *_: Any, out_shape: Any = None, **__: Any
) -> int:
    """The operations of a merger by the shapes of its arguments: features n x [B, d_i], weights [K, D]."""
    batch = features[0][0]
    return int(2 * batch * weight[0] * weight[1])
