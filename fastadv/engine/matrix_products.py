"""Networks that consist of matrix products, which no copy computes faster in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastadv.engine.live_engines import LiveEngine
from fastadv.engine.recording import RecordedOp, Recording, Ref
from fastadv.engine.request import EngineRequest
from fastadv.engine.tape import Tape

_CONVOLUTIONS = frozenset(("conv1d", "conv2d", "conv3d"))
_TRANSPOSED = frozenset(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"))
_ATTENTION = frozenset(("scaled_dot_product_attention",))
_SECOND_TIMES_THIRD = frozenset(("addmm", "baddbmm"))
_PRODUCTS = frozenset(
    ("linear", "matmul", "__matmul__", "mm", "bmm", "einsum", "multi_head_attention_forward")
) | _ATTENTION | _SECOND_TIMES_THIRD  # fmt: skip
_MANY_PRODUCTS = 10
# Largest part of the multiply-adds that convolutions may have. It is .16 in LeViT, .09 in XCiT, .07 in ConvNeXt
# and .01 in ViT. In MobileViT it is .55, and there a program is faster.
_CONVOLVED = 0.2


def live_is_known_to_win(
    tape: Tape, recording: Recording, precision: str, request: EngineRequest
) -> bool:
    """Whether no copy is faster than the live model, so that nothing is to be built, proven or measured.

    In float32 on the CPU torch's matrix products are as fast as any, and the live model needs few proofs. So this
    holds for networks that consist of such products, with few and small convolutions.
    """
    if not request.is_free or precision != "fp32" or tape.autocast:
        return False
    if recording.images.device.type != "cpu" or recording.images.dtype != torch.float32:
        return False
    products = _calls(recording, _PRODUCTS)
    if len(products) < _MANY_PRODUCTS:
        return False
    multiplied = sum(_multiply_adds(op, recording) for op in products)
    convolutions = _calls(recording, _CONVOLUTIONS | _TRANSPOSED)
    convolved = sum(_multiply_adds(op, recording) for op in convolutions)
    is_of_products = convolved <= _CONVOLVED * (multiplied + convolved)
    return is_of_products and LiveEngine("fp32", "", False, tape).may_skip_proofs


def convolves_features(recording: Recording) -> bool:
    """Whether a network has more convolutions than the one that cuts the images into patches.

    Then the layout of the images' memory matters.
    """
    return len(_calls(recording, _CONVOLUTIONS | _TRANSPOSED)) > 1


def _calls(recording: Recording, names: frozenset[str]) -> list[RecordedOp]:
    """The calls of functions of these names whose results depend on the images."""
    return [op for op in recording.ops if _name(op) in names and recording.depends[op.place]]


def _name(op: RecordedOp) -> str:
    return getattr(op.function, "__name__", "")


def _multiply_adds(op: RecordedOp, recording: Recording) -> int:
    """The number of multiply-adds of a convolution or a product; 0 where it is not known."""

    def tensor(argument: Any) -> Tensor | None:
        return recording.values[argument.place] if isinstance(argument, Ref) else None

    operands = [tensor(argument) for argument in (*op.args, *op.kwargs.values())]
    tensors, name = [operand for operand in operands if operand is not None], _name(op)
    if op.result_dim is None or len(tensors) < 2:
        return 0
    first, second, result = tensors[0], tensors[1], recording.values[op.place]
    if name in _CONVOLUTIONS:
        return result.numel() * second[0].numel()
    if name in _TRANSPOSED:
        return first.numel() * second[0].numel()
    if name in _ATTENTION:  # queries by keys, and these by values of the same width
        return 2 * first.numel() * second.shape[-2]
    if name in _SECOND_TIMES_THIRD:
        first = second
    return 0 if name == "einsum" else result.numel() * first.shape[-1]
