"""Losses on logits, computed row by row in log space: value and gradients in one pass.

One op serves the whole family, because its members differ only in a few lines between the softmax and the
result. The forward pass writes the gradients in the logits as well; the backward pass multiplies them by the
incoming gradient. The public functions, one per loss, are in `fastadv.losses`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastadv.ops import checks, transforms
from fastadv.ops.registry import Op, define, register_gradient, register_traced_gradient
from fastadv.ops.traced import call, changes

# Shifted logits are kept above this, so that differences of finite logits stay finite: [dtype of computation].
LOWEST = {torch.float32: -1e30, torch.float64: -1e300}
TINY = 1e-12  # keeps DLR's quotient finite where the three largest logits are equal

Result = tuple[Tensor, Tensor | None, Tensor | None]  # losses [B] or [B, 2], gradients [B, C]


class _Rows:
    """Softmax of logits [B, C], by way of its logarithm.

    Attributes:
        log_p: logarithm of the probabilities.
        p: probabilities.
    """

    def __init__(self, logits: Tensor, temperature: float = 1.0) -> None:
        shifted = (logits - logits.amax(1, keepdim=True)) / temperature
        shifted = torch.where(shifted < LOWEST[logits.dtype], LOWEST[logits.dtype], shifted)
        self.log_p = shifted - shifted.exp().sum(1, keepdim=True).log()
        self.p = self.log_p.exp()

    def cross_entropy(self, y: Tensor) -> Tensor:
        """-log p_y, [B]."""
        return -_at(self.log_p, y)

    def cross_entropy_gradient(self, y: Tensor) -> Tensor:
        """The gradient of `cross_entropy`, p - onehot(y), [B, C]."""
        return self.p - _one_hot(y, self.p)


def _at(values: Tensor, y: Tensor) -> Tensor:
    return values.gather(1, y[:, None])[:, 0]


def _one_hot(y: Tensor, like: Tensor) -> Tensor:
    return F.one_hot(y, like.shape[1]).to(like.dtype)


def _divergence(p: _Rows, q: _Rows) -> Tensor:
    """KL(p || q) of each row, [B]."""
    return (p.p * (p.log_p - q.log_p)).sum(1)


def _divergence_gradient(p: _Rows, q: _Rows, divergence: Tensor) -> Tensor:
    """The gradient of KL(p || q) in p's logits; in q's it is q - p."""
    return p.p * (p.log_p - q.log_p - divergence[:, None])


def _best_other(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The largest logit of a wrong class and that class, [B] each."""
    values, classes = logits.masked_fill(_one_hot(y, logits).bool(), -torch.inf).max(1)
    return values, classes


def _cross_entropy(
    logits: Tensor, other: Tensor, y: Tensor, weight: float, temperature: float
) -> Result:
    """``-log p_y``, its target smoothed by ``weight``."""
    rows, classes = _Rows(logits), logits.shape[1]
    losses = rows.cross_entropy(y)
    gradient = rows.cross_entropy_gradient(y)
    if weight:
        losses = (1 - weight) * losses - weight / classes * rows.log_p.sum(1)
        gradient = rows.p - (1 - weight) * _one_hot(y, rows.p) - weight / classes
    return losses, gradient, None


def _boosted(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """MART's boosted cross-entropy, -log q_y - log(1 - q_j), j the likeliest wrong class, and its gradient."""
    rows = _Rows(logits)
    _, best = _best_other(logits, y)
    is_best = _one_hot(best, logits)
    rest = _Rows(logits.masked_fill(is_best.bool(), -torch.inf))  # the softmax without class j
    # 1 - q_j is the others' share. Of it and their softmax, both known at one class, follows its logarithm.
    at = rest.log_p.argmax(1)
    log_rest = _at(rows.log_p, at) - _at(rest.log_p, at)
    losses = rows.cross_entropy(y) - log_rest
    q_best = _at(rows.p, best)[:, None]
    return losses, rows.cross_entropy_gradient(y) + q_best * (is_best - rest.p * (1 - is_best))


def _boosted_cross_entropy(
    logits: Tensor, other: Tensor, y: Tensor, weight: float, temperature: float
) -> Result:
    """``-log p_y - log(1 - max_{k != y} p_k)``."""
    return *_boosted(logits, y), None


def _cw(logits: Tensor, other: Tensor, y: Tensor, weight: float, temperature: float) -> Result:
    """``max_{k != y} z_k - z_y``."""
    value, best = _best_other(logits, y)
    losses = value - _at(logits, y)
    gradient = _one_hot(best, logits) - _one_hot(y, logits)
    return losses, gradient.masked_fill(losses.isnan()[:, None], torch.nan), None


def _dlr(logits: Tensor, other: Tensor, y: Tensor, weight: float, temperature: float) -> Result:
    """The margin of ``"cw"`` over the largest less the third largest logit."""
    value, best = _best_other(logits, y)
    margin, toward = value - _at(logits, y), _one_hot(best, logits) - _one_hot(y, logits)
    order = torch.argsort(logits, dim=1, descending=True, stable=True)
    largest, third = order[:, 0], order[:, 2]
    span = _at(logits, largest) - _at(logits, third) + TINY
    losses = margin / span
    steps = _one_hot(largest, logits) - _one_hot(third, logits)
    return losses, (toward - losses[:, None] * steps) / span[:, None], None


def _kl(logits: Tensor, other: Tensor, y: Tensor, weight: float, temperature: float) -> Result:
    """``T^2 KL(p || q)``, both at the temperature T."""
    p, q = _Rows(logits, temperature), _Rows(other, temperature)
    divergence = _divergence(p, q)
    gradient = temperature * _divergence_gradient(p, q, divergence)
    return temperature**2 * divergence, gradient, temperature * (q.p - p.p)


def _trades(logits: Tensor, other: Tensor, y: Tensor, weight: float, temperature: float) -> Result:
    """``-log p_y + weight KL(p || q)``."""
    p, q = _Rows(logits), _Rows(other)
    divergence = _divergence(p, q)
    gradient = p.cross_entropy_gradient(y) + weight * _divergence_gradient(p, q, divergence)
    return p.cross_entropy(y) + weight * divergence, gradient, weight * (q.p - p.p)


def _mart(logits: Tensor, other: Tensor, y: Tensor, weight: float, temperature: float) -> Result:
    """Boosted cross-entropy of q ``+ weight KL(p || q) (1 - p_y)``."""
    p, q = _Rows(logits), _Rows(other)
    boosted, other_gradient = _boosted(other, y)
    divergence = _divergence(p, q)
    own = _one_hot(y, p.p)
    doubt = (p.p * (1 - own)).sum(1, keepdim=True)  # 1 - p_y, without its cancellation
    slope = p.p * (1 - own) - doubt * own  # of the doubt in the logits, over p_y
    gradient = doubt * _divergence_gradient(p, q, divergence)
    gradient = gradient + (divergence * _at(p.p, y))[:, None] * slope
    losses = boosted + weight * divergence * doubt[:, 0]
    return losses, weight * gradient, other_gradient + weight * doubt * (q.p - p.p)


def _alp(logits: Tensor, other: Tensor, y: Tensor, weight: float, temperature: float) -> Result:
    """``(-log p_y - log q_y) / 2 + weight mean_k (z_k - z'_k)^2``."""
    p, q = _Rows(logits), _Rows(other)
    apart = logits - other
    pairing = apart.square().mean(1)
    losses = (p.cross_entropy(y) + q.cross_entropy(y)) / 2 + weight * pairing
    pull = (2 * weight / logits.shape[1]) * apart
    gradient, other_gradient = p.cross_entropy_gradient(y) / 2, q.cross_entropy_gradient(y) / 2
    return losses, gradient + pull, other_gradient - pull


def _act(logits: Tensor, other: Tensor, y: Tensor, weight: float, temperature: float) -> Result:
    """``(1 - weight) (-log p_y) + weight T^2 KL(q || p)``, and the same with p and q exchanged."""
    pairs = []
    soft = _Rows(logits, temperature), _Rows(other, temperature)
    for student, (own, teacher) in zip((logits, other), (soft, soft[::-1]), strict=True):
        rows = _Rows(student)
        divergence = temperature**2 * _divergence(teacher, own)
        losses = (1 - weight) * rows.cross_entropy(y) + weight * divergence
        gradient = (1 - weight) * rows.cross_entropy_gradient(y)
        pairs.append((losses, gradient + weight * temperature * (own.p - teacher.p)))
    (losses, gradient), (other_losses, other_gradient) = pairs
    return torch.stack((losses, other_losses), 1), gradient, other_gradient


@dataclass(frozen=True)
class Kind:
    """One of the losses, whichever backend computes it.

    Attributes:
        formula: losses and gradients in plain torch, from both kinds of logits, labels, weight and temperature.
        takes_other: whether there is a second kind of logits.
        takes_labels: whether there are labels.
        fewest_classes: the loss needs.
        losses: of a sample; of two, each has a gradient in its own kind of logits alone.
    """

    formula: Callable[[Tensor, Tensor, Tensor, float, float], Result]
    takes_other: bool = False
    takes_labels: bool = True
    fewest_classes: int = 1
    losses: int = 1

    @property
    def per_sample(self) -> tuple[int, ...]:
        """The shape of a sample's losses."""
        return () if self.losses == 1 else (self.losses,)


# The kinds, here and in csrc/cpu/softmax_losses.cpp. Tests and benchmarks go through these.
KINDS = {
    "cross_entropy": Kind(_cross_entropy),
    "boosted_cross_entropy": Kind(_boosted_cross_entropy, fewest_classes=2),
    "cw": Kind(_cw, fewest_classes=2),
    "dlr": Kind(_dlr, fewest_classes=3),
    "kl": Kind(_kl, takes_other=True, takes_labels=False),
    "trades": Kind(_trades, takes_other=True),
    "mart": Kind(_mart, takes_other=True, fewest_classes=2),
    "alp": Kind(_alp, takes_other=True),
    "act": Kind(_act, takes_other=True, losses=2),
}


def _known(kind: str) -> Kind:
    checks.check_choice("kind", kind, KINDS)
    return KINDS[kind]


def _fitting(kind: str, other: Tensor | None, y: Tensor | None) -> Kind:
    """The kind, whose arguments these must be: all that it takes and no others."""
    known = _known(kind)
    for name, value, taken in (("other", other, known.takes_other), ("y", y, known.takes_labels)):
        if (value is not None) != taken:
            raise ValueError(f"{name} must {'be given' if taken else 'be None'} for {kind}")
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


# Under torch.func, which has no use for gradients registered in C++, and without the compiled part.
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
    """Give the losses their gradient where no compiled part is there to do so."""
    global _python_gradient
    register_gradient(_op, _backward, _setup_context)
    _python_gradient = True


def _in_transform() -> bool:
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None


REDUCTIONS = ("mean", "none")


class Names(NamedTuple):
    """What messages call the arguments of `softmax_losses`."""

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
        kind: one of `KINDS`. The docstring of its formula says what it is, with p = softmax(logits) and
            q = softmax(other).
        logits: z, [B, C], float32, float64, bfloat16 or float16.
        other: z', [B, C], for the kinds that have a q; its dtype may differ.
        y: labels [B], of any integer dtype, for the kinds that take labels. On a GPU a label out of range gives
            NaN.
        weight: in these formulas.
        temperature: T, above 0.
        reduction: ``"mean"`` over the batch, or ``"none"``.
        names: the arguments' names in messages.

    Returns:
        A scalar, or [B]; of a kind with two losses, ``"act"``, [2] or [B, 2]. float32, or float64 if an argument
        is.

    Raises:
        TypeError: logits are not floating point, ``y`` holds no integers, or a number is of another type.
        ValueError: unknown kind or reduction, shapes or devices differ, ``y`` is not [B], too few classes, a
            weight that is negative or not finite, a temperature that is not finite and above 0.
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
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be finite and > 0, got {temperature}")
    # Autograd in C++ asks for the gradients that it needs by itself; in Python they must be there.
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
