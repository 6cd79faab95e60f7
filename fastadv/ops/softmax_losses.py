"""Losses on logits, computed row by row in log space: value and gradients in one pass.

One op serves the whole family, because its members differ only in a few lines between the softmax and the
result. The forward pass writes the gradients in the logits as well; the backward pass multiplies them by the
incoming gradient. The public functions, one per loss, are in `fastadv.losses`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastadv.ops import checks, transforms
from fastadv.ops.registry import Op, define, register_gradient, register_traced_gradient
from fastadv.ops.softmax_formulas import KINDS, Kind, Result
from fastadv.ops.traced import call, changes


def _known(kind: str) -> Kind:
    checks.check_choice("kind", kind, KINDS)
    return KINDS[kind]


def _fitting(kind: str, other: Tensor | None, y: Tensor | None) -> Kind:
    """The kind, whose arguments these must be: all that it takes and no others."""
    known = _known(kind)
    for name, value, taken in (("other", other, known.takes_other), ("y", y, known.takes_labels)):
        if (value is not None) != taken:
            found = "None" if value is None else "a tensor"
            raise ValueError(
                f"{name} must {'be given' if taken else 'be None'} for {kind}, got {found}"
            )
    return known


def _reference(
    logits: Tensor,
    other: Tensor | None,
    y: Tensor | None,
    kind: str,
    weight: float,
    temperature: float,
    mean: bool,
    wanted: bool,
    other_wanted: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    known, dtype = _fitting(kind, other, y), _compute_dtype(logits, other)
    batch = logits.shape[0]
    a = logits.to(dtype)
    b = a if other is None else other.to(dtype)
    labels = logits.new_zeros(batch, dtype=torch.int64) if y is None else y
    if labels.device.type == "cpu" and not _in_transform():
        _check_range(labels, logits.shape[1])
    if batch == 0:
        losses, gradient, other_gradient = _empty(a, known)
    else:
        losses, gradient, other_gradient = known.formula(a, b, labels, weight, temperature)
    if mean:
        losses = losses.mean(0)
        gradient = None if gradient is None else gradient / batch
        other_gradient = None if other_gradient is None else other_gradient / batch
    nothing = logits.new_empty((batch, 0), dtype=dtype)
    gradient = gradient.contiguous() if wanted and gradient is not None else nothing
    if other_wanted and other_gradient is not None:
        return losses, gradient, other_gradient.contiguous()
    return losses, gradient, nothing.clone()


def _check_range(y: Tensor, classes: int) -> None:
    """Refuse the first label that is no class, in the words of the compiled kernel."""
    wrong = ((y < 0) | (y >= classes)).nonzero().flatten()
    if len(wrong):
        raise IndexError(
            f"y must lie in 0 .. {classes - 1}, got {int(y[wrong[0]])} at sample {int(wrong[0])}"
        )


def _empty(logits: Tensor, kind: Kind) -> Result:
    rows = logits.new_empty(logits.shape)
    other_rows = rows.clone() if kind.takes_other else None
    return logits.new_empty((0, *kind.per_sample)), rows, other_rows


def _compute_dtype(logits: Tensor, other: Tensor | None) -> torch.dtype:
    return checks.accumulate_dtype(logits, logits if other is None else other)


def _fake(
    logits: Tensor,
    other: Tensor | None,
    y: Tensor | None,
    kind: str,
    weight: float,
    temperature: float,
    mean: bool,
    wanted: bool,
    other_wanted: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    torch._check(logits.dim() == 2, lambda: "logits must have shape [B, C]")
    pair = _fitting(kind, other, y).per_sample
    dtype = _compute_dtype(logits, other)
    batch, classes = logits.shape
    columns = classes if wanted else 0, classes if other_wanted and other is not None else 0
    return (
        logits.new_empty(pair if mean else (batch, *pair), dtype=dtype),
        logits.new_empty((batch, columns[0]), dtype=dtype),
        logits.new_empty((batch, columns[1]), dtype=dtype),
    )


def _backward_reference(grad: Tensor, gradient: Tensor, dtype: torch.dtype) -> Tensor:
    slope = grad.to(gradient.dtype)
    slope = slope if grad.dim() == 0 else slope[:, None]
    return (slope * gradient).to(dtype).contiguous()


def _backward_fake(grad: Tensor, gradient: Tensor, dtype: torch.dtype) -> Tensor:
    return gradient.new_empty(gradient.shape, dtype=dtype)


# Below the first the inverse of a temperature overflows in float32, above the second its square.
_TEMPERATURES = (2.0**-126, 2.0**63)
_TRITON_SUFFICES = "called once or twice a step, or from a graph; see kernels/softmax_losses.py"

# The gradient is registered in csrc/softmax_losses_autograd.cpp: at ten classes these losses take a few
# microseconds, and autograd by way of Python would take a hundred.
_op = define(
    Op(
        "softmax_losses",
        "(Tensor logits, Tensor? other, Tensor? y, str kind, float weight, float temperature, bool mean, "
        "bool wanted, bool other_wanted) -> (Tensor, Tensor, Tensor)",
        reference=_reference,
        fake=_fake,
        triton="softmax_losses:softmax_losses",
        without={"CUDA C++": _TRITON_SUFFICES},
    )
)
define(
    Op(
        "softmax_losses_backward",
        "(Tensor grad, Tensor gradient, ScalarType dtype) -> Tensor",
        reference=_backward_reference,
        fake=_backward_fake,
        triton="softmax_losses:softmax_losses_backward",
        without={"CUDA C++": _TRITON_SUFFICES},
        backward_of="softmax_losses",
    )
)


# The gradient in Python, for torch.func, which does not use gradients registered in C++, and for installations
# without the compiled part.
def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, other, _, kind, *_ = inputs
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.dtypes = logits.dtype, (logits if other is None else other).dtype
    ctx.pair = KINDS[kind].losses == 2


def _backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    found: list[Tensor | None] = [None] * 9
    for i, (gradient, dtype) in enumerate(zip(ctx.saved_tensors, ctx.dtypes, strict=True)):
        if grad is None or not ctx.needs_input_grad[i]:
            continue
        if gradient.shape[1] == 0:
            raise RuntimeError("softmax_losses must be called with wanted=True under torch.func")
        slope = grad[..., i] if ctx.pair else grad
        found[i] = torch.ops.fastadv.softmax_losses_backward(slope, gradient, dtype)
    return tuple(found)


transforms.GRADIENTS["softmax_losses"] = transforms.Gradient(_backward, _setup_context)
register_traced_gradient(_op, _backward, _setup_context)


_python_gradient = False


def register_python_gradient() -> None:
    """Register the gradient in Python for plain autograd, where there is no compiled part to register its own."""
    global _python_gradient
    register_gradient(_op, _backward, _setup_context)
    _python_gradient = True


def _in_transform() -> bool:
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None


REDUCTIONS = ("mean", "none")


class Names(NamedTuple):
    """The names of the arguments of `softmax_losses` in messages."""

    logits: str = "logits"
    other: str = "other"
    weight: str = "weight"


_NAMES = Names()


def softmax_losses(
    kind: str,
    logits: Tensor,
    other: Tensor | None = None,
    y: Tensor | None = None,
    *,
    weight: float = 0.0,
    temperature: float = 1.0,
    reduction: str = "mean",
    names: Names = _NAMES,
) -> Tensor:
    """One of the losses on logits, for the functions of `fastadv.losses`, whose docstrings give sources.

    Args:
        kind: one of `KINDS`. The docstring of its formula defines it, with p = softmax(logits) and
            q = softmax(other).
        logits: z, [B, C], float32, float64, bfloat16 or float16.
        other: z', [B, C], for the kinds that have a q; its dtype may differ.
        y: labels [B], of any integer dtype, for the kinds that take labels. On a GPU a label out of range gives
            NaN.
        weight: the weight in the formula of the kind, finite and >= 0.
        temperature: T, above 0.
        reduction: ``"mean"`` over the batch, or ``"none"``.
        names: the arguments' names in messages.

    Returns:
        A scalar, or [B]. For ``"act"``, the kind with two losses, [2] or [B, 2]. float32, or float64 if an
        argument is float64.

    Raises:
        TypeError: logits are not floating point, ``y`` holds no integers, or a number is of another type.
        ValueError: unknown kind or reduction, shapes or devices differ, ``y`` is not [B], too few classes, a
            weight that is negative or not finite, a temperature that is not above 0, or of which float32 cannot
            hold the inverse and the square.
        IndexError: on the CPU, a label that is no class.
    """
    of_kind = _known(kind)
    _check_logits(names.logits, logits, of_kind.fewest_classes)
    if of_kind.takes_other:
        _check_logits(names.other, other, 1)
        checks.check_same_shape(names.other, other, names.logits, logits)  # type: ignore[arg-type]
    elif other is not None:
        raise ValueError(f"{names.other} must be None for {kind}, got {type(other).__name__}")
    if of_kind.takes_labels:
        y = _labels(y, logits)
    elif y is not None:
        raise ValueError(f"y must be None for {kind}, got {type(y).__name__}")
    checks.check_choice("reduction", reduction, REDUCTIONS)
    weight = checks.limit(names.weight, weight)
    temperature = checks.number("temperature", temperature)
    if not _TEMPERATURES[0] <= temperature <= _TEMPERATURES[1]:
        low, high = _TEMPERATURES
        raise ValueError(
            f"temperature must be > 0, and between {low:.1e} and {high:.1e}, got {temperature}"
        )
    # The gradient in C++ asks for what it needs by itself. The gradient in Python reads what the forward pass
    # left.
    in_python = _python_gradient or changes(weight, temperature)
    wanted = _in_transform() or (in_python and torch.is_grad_enabled())
    losses: Tensor
    losses, _, _ = call(
        "softmax_losses",
        *(logits, other, y, kind, weight, temperature, reduction == "mean", wanted, wanted),
    )
    return losses


def _check_logits(name: str, logits: Tensor | None, fewest_classes: int) -> None:
    if not isinstance(logits, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(logits).__name__}")
    checks.check_float(name, logits)
    if logits.dim() != 2 or logits.shape[1] < fewest_classes:
        raise ValueError(
            f"{name} must have shape [B, C] with C >= {fewest_classes}, got {tuple(logits.shape)}"
        )


def _labels(y: Tensor | None, logits: Tensor) -> Tensor:
    labels = checks.class_labels("y", y, logits.shape[0])  # type: ignore[arg-type]
    checks.check_same_device("y", labels, "the logits", logits)
    return labels
