"""The PGD step in l1 in Triton. Formula and budget: fastadv/ops/pgd_step.py.

One program steps a sample in many passes. It finds the k-th largest gradient magnitude by bisection on its bits
(at most 31 counts, 63 for float64), then the threshold of the projection, mostly in fewer than ten sums. The last
pass writes. Between the passes an image of 3x32x32 stays in the multiprocessor's cache and an image of 3x224x224
in the GPU's cache, so that a pass costs far less than reading from memory.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import clip, compute_dtype, elements_to_read, launch, number, per_sample
from .layout import reduction_loop, sample_size
from .pgd_step_shared import Step, count_gradient


@triton.jit
def _magnitude_bits(grad):
    """The bits of magnitudes as integers, which have the same order."""
    if grad.dtype.scalar == tl.float64:
        return grad.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    else:
        return grad.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _count_at_least(grad, at, size, threshold, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """The number of magnitudes, of ``size``, that are at least ``threshold``, which is not 0."""
    lane = tl.arange(0, BLOCK)
    found = tl.zeros([BLOCK], tl.int32)
    for i in range(STEPS):
        first = i * BLOCK
        g = tl.load(grad + at + first + lane, lane < size - first, other=0.0)
        found += (_magnitude_bits(g) >= threshold).to(tl.int32)
    return tl.sum(found.to(tl.int64), 0)


@triton.jit
def _choose(grad, at, size, k, BITS: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """The threshold of the k largest magnitudes, the number of elements that reach it, and whether any moves."""
    INTEGER: tl.constexpr = tl.int64 if BITS == 63 else tl.int32
    INFINITY: tl.constexpr = 0x7FF0000000000000 if BITS == 63 else 0x7F800000
    bit = tl.full((), 1 << (BITS - 1), INTEGER)
    threshold = tl.full((), 0, INTEGER)
    while bit > 0:
        found = _count_at_least(grad, at, size, threshold | bit, BLOCK, STEPS)
        threshold = tl.where(found >= k, threshold | bit, threshold)
        # If exactly k are found, lower bits change nothing.
        bit = tl.where(found == k, 0, bit >> 1).to(INTEGER)
    threshold = tl.where(threshold > 0, threshold, 1).to(INTEGER)
    count = _count_at_least(grad, at, size, threshold, BLOCK, STEPS)
    infinite = _count_at_least(grad, at, size, tl.full((), INFINITY, INTEGER), BLOCK, STEPS)
    return threshold, count, (count > 0) & (infinite == 0)


@triton.jit
def _moved(adv, grad, threshold, usable, share, COMPUTE: tl.constexpr):
    chosen = (_magnitude_bits(grad) >= threshold) & usable
    return adv.to(COMPUTE) + tl.where(chosen, tl.where(grad > 0, share, -share), 0.0)


@triton.jit
def _largest_distance(
    adv,
    grad,
    x,
    at,
    size,
    threshold,
    usable,
    share,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """The largest |moved - x|; NaN is left out."""
    lane = tl.arange(0, BLOCK)
    largest = tl.zeros([BLOCK], COMPUTE)
    for i in range(STEPS):
        first = i * BLOCK
        inside = lane < size - first
        here = at + first + lane
        g = tl.load(grad + here, inside, other=0.0)
        moved = _moved(tl.load(adv + here, inside, other=0.0), g, threshold, usable, share, COMPUTE)
        distance = tl.abs(moved - tl.load(x + here, inside, other=0.0).to(COMPUTE))
        largest = tl.where(distance > largest, distance, largest)
    return tl.max(largest, 0)


@triton.jit
def _summation_grid(largest, HEAD: tl.constexpr, COMPUTE: tl.constexpr):
    """The number that rounds distances when it is added and subtracted, so that sums are exact; 0 for float64."""
    if tl.float64 == COMPUTE:
        return tl.full((), 0.0, tl.float64)
    else:
        exponent = largest.to(tl.float64).to(tl.int64, bitcast=True) >> 52
        return (((exponent + 1 + HEAD) << 52) | (1 << 51)).to(tl.float64, bitcast=True)


@triton.jit
def _sum_above(
    adv,
    grad,
    x,
    at,
    size,
    threshold,
    usable,
    share,
    theta,
    grid,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Sum and number of the distances |moved - x| that exceed theta; NaN counts among them."""
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    count = tl.zeros([BLOCK], tl.float64)
    for i in range(STEPS):
        first = i * BLOCK
        inside = lane < size - first
        here = at + first + lane
        g = tl.load(grad + here, inside, other=0.0)
        moved = _moved(tl.load(adv + here, inside, other=0.0), g, threshold, usable, share, COMPUTE)
        distance = tl.abs(moved - tl.load(x + here, inside, other=0.0).to(COMPUTE))
        term = (distance.to(tl.float64) + grid) - grid
        below = term <= theta
        total += tl.where(below, 0.0, term)
        count += tl.where(below, 0.0, 1.0)
    return tl.sum(total, 0), tl.sum(count, 0)


@triton.jit
def _soft_threshold(
    adv,
    grad,
    x,
    at,
    size,
    threshold,
    usable,
    share,
    radius,
    HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """The threshold theta of the projection, by Michelot's iteration; 0 inside the ball.

    In each iteration theta is the excess over the radius, divided by the number of distances above the last theta.
    """
    largest = _largest_distance(
        adv, grad, x, at, size, threshold, usable, share, BLOCK, STEPS, COMPUTE
    )
    grid = _summation_grid(largest, HEAD, COMPUTE)
    theta = tl.full((), 0.0, tl.float64)
    total, count = _sum_above(
        adv, grad, x, at, size, threshold, usable, share, theta, grid, BLOCK, STEPS, COMPUTE
    )
    outside = (total > radius) & (total < float("inf")) & (largest < float("inf"))
    left = tl.where(outside, count, 0.0)  # distances above theta; 0 ends the iteration
    while left > 0:
        theta = (total - radius) / count
        total, above = _sum_above(
            adv, grad, x, at, size, threshold, usable, share, theta, grid, BLOCK, STEPS, COMPUTE
        )
        left = tl.where(above < count, above, 0.0)
        count = above
    return tl.where(outside & (radius == 0), float("inf"), theta)


@triton.jit
def _write(
    out,
    adv,
    grad,
    x,
    at,
    size,
    read,
    threshold,
    usable,
    share,
    theta,
    low,
    high,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """The last pass over ``size`` elements: the first ``read`` are stepped, the rest are copied."""
    lane = tl.arange(0, BLOCK)
    for i in range(STEPS):
        first = i * BLOCK
        inside = lane < size - first
        live = lane < read - first
        here = at + first + lane
        old = tl.load(adv + here, inside, other=0.0)
        g = tl.load(grad + here, live, other=0.0)
        moved = _moved(old, g, threshold, usable, share, COMPUTE)
        centre = tl.load(x + here, live, other=0.0).to(COMPUTE)
        delta = moved - centre
        left = (tl.abs(delta).to(tl.float64) - theta).to(COMPUTE)
        left = tl.where(left > 0, left, 0.0)
        projected = centre + tl.where(delta < 0, -left, left)
        moved = clip(tl.where(theta > 0, projected, moved), low, high).to(old.dtype)
        tl.store(out + here, tl.where(live, moved, old), inside)


@triton.jit
def _count_all(grad, at, size, counts, stride, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    for i in range(STEPS):
        inside = lane < size - i * BLOCK
        g = tl.load(grad + at + i * BLOCK + lane, inside, other=0.0)
        count_gradient(g, inside, counts, stride)


@triton.jit(do_not_specialize=["eps", "alpha", "low", "high", "k"])
def _step_l1(
    out,
    adv,
    grad,
    x,
    eps: tl.int64,
    alpha: tl.int64,
    eps_values,
    alpha_values,
    low: tl.int64,
    high: tl.int64,
    active,
    counts,
    counts_stride,
    size,
    k,
    HEAD: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    at = sample * size
    read = elements_to_read(size, active, sample)
    if counts is not None:
        _count_all(grad, at, read, counts, counts_stride, BLOCK, STEPS)
    threshold, count, usable = _choose(grad, at, read, k, BITS, BLOCK, STEPS)
    step = per_sample(alpha, alpha_values, sample, COMPUTE).to(tl.float64)
    share = tl.where(usable, step / count.to(tl.float64), 0.0).to(COMPUTE)
    radius = per_sample(eps, eps_values, sample, COMPUTE).to(tl.float64)
    theta = _soft_threshold(
        adv,
        grad,
        x,
        at,
        read,
        threshold,
        usable,
        share,
        radius,
        HEAD,
        BLOCK,
        STEPS,
        COMPUTE,
    )
    # In place, this overwrites terms of the sums; all threads have finished the sums by now.
    _write(
        out,
        adv,
        grad,
        x,
        at,
        size,
        read,
        threshold,
        usable,
        share,
        theta,
        number(low, COMPUTE),
        number(high, COMPUTE),
        BLOCK,
        STEPS,
        COMPUTE,
    )


def step_into(out: Tensor, adv: Tensor, grad: Tensor, x: Tensor, step: Step) -> None:
    """Run the step on tensors with one batch-major layout; ``out`` may be ``adv``."""
    size = sample_size(adv)
    if size == 0:
        return
    launch(
        _step_l1,
        adv.shape[0],
        adv,
        out,
        adv,
        grad,
        x,
        *step.arguments(),
        step.active,
        *step.counters(),
        size,
        max(1, size - math.floor(step.sparsity * size)),
        HEAD=max(2, (size - 1).bit_length()),
        BITS=63 if grad.dtype == torch.float64 else 31,
        COMPUTE=compute_dtype(adv),
        maxnreg=128,  # else the compiler spills registers to run three programs on one multiprocessor
        **reduction_loop(size),
    )
