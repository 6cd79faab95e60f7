"""Losses on logits in Triton. Definitions: fastadv/ops/softmax_formulas.py.

There is no CUDA C++ version. A training step calls these ops once or twice, and an attack replays them from a
graph. There the cost of Triton's launcher does not matter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import compute_dtype, divide, double_bits, launch, number, rounded

_MOST_CLASSES = 65536  # the limit, as a program holds whole rows
_TILE = 512  # elements of a program with several rows
# The key is whether there is a second kind of logits. The kernels treat any other KIND as the last word of the
# tuple.
KINDS = {
    False: ("cw", "dlr", "boosted_cross_entropy", "cross_entropy"),
    True: ("kl", "alp", "act", "trades", "mart"),
}
_TORCH_DTYPES = {tl.float32: torch.float32, tl.float64: torch.float64}


@triton.jit
def _softmax(z, inside, temperature):
    """Log-probabilities, probabilities, largest logit and log of the sum, over each row's elements inside."""
    lowest = -1e300 if z.dtype == tl.float64 else -1e30
    high = tl.max(tl.where(inside, z, -float("inf")), 1)
    shifted = divide(z - high[:, None], temperature + tl.zeros_like(z))
    shifted = tl.where(shifted < lowest, lowest, shifted)
    e = tl.where(inside, tl.exp(shifted), 0.0)
    total = tl.sum(e, 1)
    log_total = tl.log(total)
    log_p = tl.where(inside, shifted - log_total[:, None], lowest)
    return log_p, divide(e, total[:, None] + tl.zeros_like(z)), high, log_total


@triton.jit
def _at(values, chosen):
    """The value of each row at its chosen element."""
    return tl.sum(tl.where(chosen, values, 0.0), 1)


@triton.jit
def _best(z, inside, column):
    """The first of the largest logits among each row's elements inside, as a mask, and its value."""
    seen = tl.where(inside, z, -float("inf"))
    best = tl.argmax(seen, 1, tie_break_left=True)
    return column == best[:, None], tl.max(seen, 1)


@triton.jit
def _divergence(log_p, p, log_q, inside):
    """KL(p || q) of each row, and its gradient with respect to p's logits."""
    apart = tl.where(inside, log_p - log_q, 0.0)
    value = tl.sum(p * apart, 1)
    return value, p * (apart - value[:, None])


@triton.jit
def _boosted(z, log_q, q, high, log_total, own, inside, column):
    """Boosted cross-entropy of q, and its gradient with respect to the logits z."""
    lowest = -1e300 if z.dtype == tl.float64 else -1e30
    is_best, _ = _best(z, inside & (own == 0), column)
    _, rest, rest_high, rest_log_total = _softmax(z, inside & (is_best == 0), 1.0)
    lower = rest_high - high
    lower = tl.where(lower < lowest, lowest, lower)
    log_rest = lower + rest_log_total - log_total
    q_best = _at(q, is_best)[:, None]
    gradient = q - tl.where(own, 1.0, 0.0) + q_best * tl.where(is_best, 1.0, -rest)
    return -_at(log_q, own) - log_rest, gradient


@triton.jit
def _margin(z, own, inside, column):
    """The largest wrong logit minus the label's logit, and its gradient."""
    is_best, value = _best(z, inside & (own == 0), column)
    gradient = tl.where(is_best, 1.0, 0.0) - tl.where(own, 1.0, 0.0)
    return value - _at(z, own), gradient.to(z.dtype)


@triton.jit
def _ratio(z, own, inside, column):
    """The difference of logits ratio and its gradient."""
    margin, gradient = _margin(z, own, inside, column)
    is_first, first = _best(z, inside, column)
    is_second, _ = _best(z, inside & (is_first == 0), column)
    is_third, third = _best(z, inside & (is_first == 0) & (is_second == 0), column)
    span = first - third + tl.full(first.shape, 1e-12, z.dtype)
    loss = divide(margin, span)
    slope = loss[:, None] * (tl.where(is_first, 1.0, 0.0) - tl.where(is_third, 1.0, 0.0))
    return loss, divide(gradient - slope.to(z.dtype), span[:, None] + tl.zeros_like(z))


@triton.jit
def _single(z, own, inside, column, weight, classes, KIND: tl.constexpr):
    """Loss and gradient of the kinds with one kind of logits."""
    if KIND == "cw":
        return _margin(z, own, inside, column)
    if KIND == "dlr":
        return _ratio(z, own, inside, column)
    log_p, p, high, log_total = _softmax(z, inside, 1.0)
    if KIND == "boosted_cross_entropy":
        return _boosted(z, log_p, p, high, log_total, own, inside, column)
    share = divide(weight, tl.cast(classes, z.dtype))
    loss = -(1 - weight) * _at(log_p, own) - share * tl.sum(tl.where(inside, log_p, 0.0), 1)
    return loss, p - share - tl.where(own, 1 - weight, 0.0)


@triton.jit
def _pair(a, b, own, inside, column, weight, temperature, classes, KIND: tl.constexpr):
    """Loss, second loss (ACT's) and both gradients of the kinds with two kinds of logits."""
    log_p, p, _, _ = _softmax(a, inside, 1.0)
    log_q, q, high, log_total = _softmax(b, inside, 1.0)
    hit = tl.where(own, 1.0, 0.0).to(a.dtype)
    ce_p, ce_q = -_at(log_p, own), -_at(log_q, own)
    if KIND == "kl":
        log_p, p, _, _ = _softmax(a, inside, temperature)
        log_q, q, _, _ = _softmax(b, inside, temperature)
        value, slope = _divergence(log_p, p, log_q, inside)
        loss = temperature * temperature * value
        return loss, loss, temperature * slope, temperature * (q - p)
    if KIND == "alp":
        apart = tl.where(inside, a - b, 0.0)
        count = tl.cast(classes, a.dtype)
        pull = divide(2 * weight, count) * apart
        loss = (ce_p + ce_q) * 0.5 + weight * divide(
            tl.sum(apart * apart, 1), tl.zeros_like(ce_p) + count
        )
        return loss, loss, (p - hit) * 0.5 + pull, (q - hit) * 0.5 - pull
    if KIND == "act":
        log_ps, ps, _, _ = _softmax(a, inside, temperature)
        log_qs, qs, _, _ = _softmax(b, inside, temperature)
        of_p, _ = _divergence(log_qs, qs, log_ps, inside)
        of_q, _ = _divergence(log_ps, ps, log_qs, inside)
        soft, hard = weight * temperature * temperature, 1 - weight
        pull = weight * temperature * (ps - qs)
        first, second = hard * ce_p + soft * of_p, hard * ce_q + soft * of_q
        return first, second, hard * (p - hit) + pull, hard * (q - hit) - pull
    value, slope = _divergence(log_p, p, log_q, inside)
    if KIND == "trades":
        loss = ce_p + weight * value
        return loss, loss, p - hit + weight * slope, weight * (q - p)
    doubt = tl.sum(tl.where(own, 0.0, p), 1)  # 1 - p_y as a sum, which does not cancel
    boosted, boosted_gradient = _boosted(b, log_q, q, high, log_total, own, inside, column)
    of_doubt = (value * _at(p, own))[:, None] * tl.where(own, -doubt[:, None], p)
    loss = boosted + weight * value * doubt
    gradient = weight * (doubt[:, None] * slope + of_doubt)
    return loss, loss, gradient, boosted_gradient + weight * doubt[:, None] * (q - p)


@triton.jit
def _store_rows(to, at, inside, gradient, scale, valid):
    if to is not None:
        rows = tl.where(valid[:, None], gradient * scale, float("nan"))
        tl.store(to + at, rows.to(to.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["weight", "temperature", "scale"])
def _rows(
    losses,
    gradient,
    other_gradient,
    logits,
    other,
    y,
    weight: tl.int64,
    temperature: tl.int64,
    scale: tl.int64,
    batch,
    classes,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """ROWS samples per program; gradients that are not wanted are None."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < batch)[:, None] & (column < classes)
    at = row[:, None] * classes + column
    label = tl.zeros([ROWS], tl.int64) if y is None else tl.load(y + row, row < batch, other=0)
    valid = (label >= 0) & (label < classes)
    own = column == label[:, None]
    a = tl.load(logits + at, inside, other=0.0).to(COMPUTE)
    w, factor = number(weight, COMPUTE), number(scale, COMPUTE)
    if other is None:
        loss, slope = _single(a, own, inside, column, w, classes, KIND)
        broken = tl.sum(tl.where(inside & (a != a), 1, 0), 1) > 0
        valid = valid & (broken == 0)
        tl.store(losses + row, tl.where(valid, loss, float("nan")), row < batch)
    else:
        b = tl.load(other + at, inside, other=0.0).to(COMPUTE)
        t = number(temperature, COMPUTE)
        loss, second, slope, other_slope = _pair(a, b, own, inside, column, w, t, classes, KIND)
        loss, second = tl.where(valid, loss, float("nan")), tl.where(valid, second, float("nan"))
        if KIND == "act":
            tl.store(losses + 2 * row, loss, row < batch)
            tl.store(losses + 2 * row + 1, second, row < batch)
        else:
            tl.store(losses + row, loss, row < batch)
        _store_rows(other_gradient, at, inside, other_slope, factor, valid)
    _store_rows(gradient, at, inside, slope, factor, valid)


@triton.jit
def _scale_rows(out, grad, grad_stride, gradient, size, classes, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    slope = tl.load(grad + at // classes * grad_stride, inside, other=0.0)
    product = slope.to(gradient.dtype.element_ty) * tl.load(gradient + at, inside, other=0.0)
    tl.store(out + at, rounded(product, out.dtype.element_ty), inside)


def _tile(classes: int) -> dict[str, int]:
    """The number of whole rows of one program, and its warps: 8 elements per thread if the row allows."""
    block = triton.next_power_of_2(classes)
    rows = max(1, _TILE // block)
    return {"ROWS": rows, "BLOCK": block, "num_warps": min(32, max(2, rows * block // 256))}


def softmax_losses(
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
    """The op ``fastadv::softmax_losses``."""
    batch, classes = logits.shape
    known = KINDS[other is not None]
    if kind not in known:
        which = "two kinds" if other is not None else "one kind"
        raise ValueError(
            f"kind must be one of {', '.join(known)} with {which} of logits, got {kind!r}"
        )
    if classes > _MOST_CLASSES:
        raise ValueError(f"logits must have at most {_MOST_CLASSES} classes, got {classes}")
    compute = compute_dtype(logits, logits if other is None else other)
    like = logits.new_empty(0, dtype=_TORCH_DTYPES[compute])
    losses = like.new_empty((batch, 2) if kind == "act" else (batch,))
    gradient = like.new_empty((batch, classes if wanted else 0))
    other_gradient = like.new_empty((batch, classes if other_wanted and other is not None else 0))
    tile = _tile(classes)
    launch(
        _rows,
        triton.cdiv(batch, tile["ROWS"]),
        logits,
        losses,
        gradient if gradient.shape[1] else None,
        other_gradient if other_gradient.shape[1] else None,
        logits.contiguous(),
        None if other is None else other.contiguous(),
        None if y is None else y.contiguous(),
        double_bits(weight),
        double_bits(temperature),
        double_bits(1 / max(batch, 1) if mean else 1.0),
        batch,
        classes,
        KIND=kind,
        COMPUTE=compute,
        **tile,
    )
    return losses.mean(0) if mean else losses, gradient, other_gradient


def softmax_losses_backward(grad: Tensor, gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """The op ``fastadv::softmax_losses_backward``."""
    out = gradient.new_empty(gradient.shape, dtype=dtype)
    size = gradient.numel()
    launch(
        _scale_rows,
        triton.cdiv(size, 1024),
        gradient,
        out,
        grad,
        grad.stride(0) if grad.dim() else 0,
        gradient.contiguous(),
        size,
        gradient.shape[1],
        BLOCK=1024,
    )
    return out
