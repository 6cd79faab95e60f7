"""Passes of a model that run all of its own code and compute few of the results that depend on the images.

Which operations a model calls, for how many images and in which order, does not depend on the values that it
computes: a model that looks at them is not copied. So where a recording's values are not needed, the result of a
known function is only memory of the right shape. Other functions run, on whatever that memory holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastadv.engine.hidden_draws import is_torchs
from fastadv.engine.operands import broadcast_shapes, count_write, storage_of, tensors_in
from fastadv.engine.recorder import Recorder, recorded
from fastadv.engine.recording import RecordedOp, Recording, refs

# Their result has the shape of their first argument, and so has that of their forms that write to it.
_ALIKE = frozenset(
    ("relu", "relu6", "gelu", "silu", "hardswish", "hardsigmoid", "sigmoid", "tanh", "softmax", "log_softmax",
     "hardtanh", "leaky_relu", "elu", "mish", "softplus", "exp", "normalize", "square", "sqrt", "rsqrt", "neg",
     "abs", "clone", "contiguous")
)  # fmt: skip
# Theirs is that of all operands, spread.
_SPREAD = frozenset(
    ("add", "sub", "mul", "div", "true_divide", "__add__", "__radd__", "__sub__", "__rsub__", "__mul__",
     "__rmul__", "__truediv__", "__iadd__", "__imul__", "addcmul")
)  # fmt: skip
# They treat each image, or each row, alone: functions by the number of axes of the first argument, at least.
_ROWS = {
    "linear": 2, "batch_norm": 2, "group_norm": 3, "instance_norm": 3, "conv1d": 3, "conv2d": 4, "conv3d": 5,
    "conv_transpose2d": 4, "max_pool2d": 4, "avg_pool2d": 4, "adaptive_avg_pool2d": 4, "interpolate": 4,
}  # fmt: skip


def outlined(
    model: nn.Module,
    images: Tensor,
    like: Recording,
    *,
    careful: bool,
    gradients: bool = True,
) -> Recording | None:
    """As `fastadv.engine.recorder.recorded`, without the values; None where only a real pass can tell.

    Args:
        model: the live model.
        images: [B, ...], any number.
        like: an earlier recording with values.
        careful: as in `fastadv.engine.recorder.record`.
        gradients: as in `fastadv.engine.recorder.record`.
    """
    try:
        return recorded(
            model,
            images,
            careful=careful,
            gradients=gradients,
            make=lambda x, graph: _Outline(x, graph, like),
        )
    except Exception:  # if it is the model's own, the real pass raises it again
        return None


def blank(like: Tensor, device: torch.device, requires_grad: bool) -> Tensor:
    """Memory for a result of a shape and order of elements, whatever it holds; whole numbers are 0."""
    made = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=device)
    if not made.is_floating_point():
        return made.zero_()
    return made.requires_grad_(requires_grad)


def makes_new(op: RecordedOp, recording: Recording) -> bool:
    """Whether an operation has one result, a plain tensor in memory of its own."""
    value = recording.values[op.place]
    if op.result_dim is None or type(value) is not Tensor:
        return False
    sources = (recording.values[ref.place] for ref in refs((op.args, op.kwargs)))
    return all(storage_of(value) != storage_of(source) for source in sources)


class _Outline(Recorder):
    """Records, and computes no known function of the images that the earlier recording has at this place."""

    def __init__(self, images: Tensor, gradients: bool, like: Recording) -> None:
        super().__init__(images, gradients)
        self._like = like

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """As in `Recorder.call`.

        Raises:
            RuntimeError: the function is none of torch's, and may not take arbitrary values.
        """
        operands, number = tensors_in((args, kwargs)), len(self.recording.ops)
        if not any(map(self._places.depends, operands)):
            return super().call(func, args, kwargs)
        if not is_torchs(func):
            raise RuntimeError("only a real pass can tell")
        then = self._like.ops[number] if number < len(self._like.ops) else None
        if then is None or func is not then.function or not args:
            return super().call(func, args, kwargs)
        value = self._like.values[then.place]
        if func is torch.cat and not then.writes:
            shape = _joined_shape(*args, **kwargs)
        elif args[0] is operands[0]:
            shape = _shape_of(func.__name__, then, self._like, operands)
        else:
            return super().call(func, args, kwargs)
        if then.writes and shape == args[0].shape and self._places.depends(args[0]):
            count_write(args[0])
            return args[0]
        if shape is None or then.writes or not makes_new(then, self._like):
            return super().call(func, args, kwargs)
        tracked = value.requires_grad and any(t.requires_grad for t in operands)
        return blank(_in_order_of(value, shape), self.recording.images.device, tracked)

    def record_own_function(self, cls: Any, args: tuple[Any, ...], result: Any) -> None:
        """As in `Recorder.record_own_function`.

        Raises:
            RuntimeError: always, since only a real pass tells what such a function gives.
        """
        raise RuntimeError("only a real pass can tell")


def _shape_of(
    name: str, then: RecordedOp, like: Recording, operands: list[Tensor]
) -> torch.Size | None:
    """The shape of a result, where it is known for sure."""
    first, value = operands[0], like.values[then.place]
    known = name.removesuffix("_") if not name.endswith("__") else name
    if known in _ALIKE:
        return first.shape if len(operands) == 1 else None
    if known in _SPREAD:
        return broadcast_shapes(*(t.shape for t in operands))
    before = [like.values[ref.place].shape for ref in refs((then.args, then.kwargs))]
    if len(before) != len(operands):
        return None
    if known in _ROWS and first.dim() >= _ROWS[known] and not then.writes:
        # What else it is given are weights, whose shapes are the same.
        same = first.shape[1:] == before[0][1:] and value.shape[:1] == before[0][:1]
        same = same and [t.shape for t in operands[1:]] == before[1:]
        return torch.Size((first.shape[0], *value.shape[1:])) if same else None
    if known == "layer_norm":
        shape: Any = then.args[1] if len(then.args) > 1 else then.kwargs.get("normalized_shape", ())
        return first.shape if first.shape[-len(shape) :] == torch.Size(shape) else None
    if known in ("matmul", "__matmul__", "bmm") and len(operands) == 2 and first.dim() > 2:
        other = operands[1]
        if other.dim() < 2 or first.shape[-1] != other.shape[-2]:
            return None
        batches = broadcast_shapes(first.shape[:-2], other.shape[:-2])
        return torch.Size((*batches, first.shape[-2], other.shape[-1]))
    return None


def _joined_shape(parts: Sequence[Tensor], dim: int = 0, **others: Any) -> torch.Size | None:
    """The shape of the result of `torch.cat`, where it is known for sure."""
    shapes = [list(part.shape) for part in parts]
    if others or not all(-len(shape) <= dim < len(shape) for shape in shapes):
        return None
    sizes = [shape.pop(dim) for shape in shapes]
    if any(shape != shapes[0] for shape in shapes):
        return None
    shapes[0].insert(dim % (len(shapes[0]) + 1), sum(sizes))
    return torch.Size(shapes[0])


def _in_order_of(value: Tensor, shape: torch.Size) -> Tensor:
    """A tensor without memory, of a shape, whose axes lie in the order of those of another one."""
    strides = value.stride()
    order = sorted(range(len(shape)), key=lambda axis: (-strides[axis], axis))
    made = torch.empty([shape[axis] for axis in order], dtype=value.dtype, device="meta")
    return made.permute([order.index(axis) for axis in range(len(shape))])
