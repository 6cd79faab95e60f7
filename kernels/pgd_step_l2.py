"""The PGD step in l2 in Triton. Formula and budget: fastadv/ops/pgd_step.py.

The step and the projection follow from three sums per sample, g.g, g.d and d.d with d = adv - x, because
||d + f g||^2 = d.d + 2 f g.d + f^2 g.g. The sums are in float64. There squares of tiny float32 gradients do not
vanish, and the sum does not cancel, so that one pass over the operands is enough before the pass that writes.
Only a float64 gradient is first scaled by its largest magnitude.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import (
    clip,
    compute_dtype,
    elements_to_read,
    launch,
    number,
    per_sample,
    rounded_to_float_precision,
)
from .layout import Parts, reduction_loop, sample_size
from .pgd_step_shared import Step, count_gradient


@triton.jit
def _largest(grad, at, length, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """The largest magnitude among ``length`` elements."""
    lane = tl.arange(0, BLOCK)
    largest = tl.zeros([BLOCK], tl.float64)
    for i in range(STEPS):
        first = i * BLOCK
        g = tl.abs(tl.load(grad + at + first + lane, lane < length - first, other=0.0))
        largest = tl.where(g > largest, g, largest)
    return tl.max(largest, 0)


@triton.jit
def _scaled(grad, scale, SCALED: tl.constexpr):
    """The gradient in float64, divided by its scale if it has one."""
    g = grad.to(tl.float64)
    if SCALED:
        g = tl.where(scale > 0, g / scale, g)
    return g


@triton.jit
def _sums(
    adv,
    grad,
    x,
    at,
    length,
    scale,
    counts,
    counts_stride,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
    SCALED: tl.constexpr,
):
    """g.g, g.d and d.d of ``length`` elements."""
    lane = tl.arange(0, BLOCK)
    gg = tl.zeros([BLOCK], tl.float64)
    gd = tl.zeros([BLOCK], tl.float64)
    dd = tl.zeros([BLOCK], tl.float64)
    for i in range(STEPS):
        first = i * BLOCK
        inside = lane < length - first
        here = at + first + lane
        raw = tl.load(grad + here, inside, other=0.0)
        if counts is not None:
            count_gradient(raw, inside, counts, counts_stride)
        g = _scaled(raw, scale, SCALED)
        d = tl.load(adv + here, inside, other=0.0).to(tl.float64)
        d -= tl.load(x + here, inside, other=0.0).to(tl.float64)
        gg += g * g
        gd += g * d
        dd += d * d
    return tl.sum(gg, 0), tl.sum(gd, 0), tl.sum(dd, 0)


@triton.jit
def _step_and_shrink(gg, gd, dd, alpha, eps, COMPUTE: tl.constexpr):
    """The factor of the (scaled) gradient and the factor that brings the moved point into the ball."""
    usable = (gg > 0) & (gg < float("inf"))
    factor = tl.where(usable, alpha / tl.sqrt(gg), 0.0)
    if tl.float32 == COMPUTE:
        factor = rounded_to_float_precision(factor)
    squared = tl.where(usable, dd + 2 * factor * gd + factor * factor * gg, dd)
    length = tl.sqrt(tl.where(squared < 0, 0.0, squared))
    return factor, tl.where(length > eps, eps / length, 1.0)


@triton.jit
def _write(
    out,
    adv,
    grad,
    x,
    at,
    length,
    read,
    scale,
    factor,
    shrink,
    low,
    high,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
    COMPUTE: tl.constexpr,
    SCALED: tl.constexpr,
):
    """The second pass over ``length`` elements: the first ``read`` are stepped, the rest are copied."""
    lane = tl.arange(0, BLOCK)
    for i in range(STEPS):
        first = i * BLOCK
        inside = lane < length - first
        live = lane < read - first
        here = at + first + lane
        g = _scaled(tl.load(grad + here, live, other=0.0), scale, SCALED)
        step = tl.where(factor == 0, 0.0, g * factor).to(COMPUTE)
        centre = tl.load(x + here, live, other=0.0).to(COMPUTE)
        old = tl.load(adv + here, inside, other=0.0)
        delta = old.to(COMPUTE) + step - centre
        moved = clip(centre + delta * shrink, low, high).to(old.dtype)
        tl.store(out + here, tl.where(live, moved, old), inside)


@triton.jit(do_not_specialize=["eps", "alpha", "low", "high"])
def _step_l2(
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
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
    COMPUTE: tl.constexpr,
    SCALED: tl.constexpr,
):
    """One program per sample; its second pass finds the operands in the caches."""
    sample = tl.program_id(0).to(tl.int64)
    at = sample * size
    read = elements_to_read(size, active, sample)
    scale = 0.0
    if SCALED:
        scale = _largest(grad, at, read, BLOCK, STEPS)
    gg, gd, dd = _sums(adv, grad, x, at, read, scale, counts, counts_stride, BLOCK, STEPS, SCALED)
    radius = per_sample(eps, eps_values, sample, COMPUTE).to(tl.float64)
    step = per_sample(alpha, alpha_values, sample, COMPUTE).to(tl.float64)
    factor, shrink = _step_and_shrink(gg, gd, dd, step, radius, COMPUTE)
    lowest, highest = number(low, COMPUTE), number(high, COMPUTE)
    shrink = shrink.to(COMPUTE)
    # In place, this overwrites terms of the sums; all threads have finished the sums by now.
    _write(
        out,
        adv,
        grad,
        x,
        at,
        size,
        read,
        scale,
        factor,
        shrink,
        lowest,
        highest,
        BLOCK,
        STEPS,
        COMPUTE,
        SCALED,
    )


@triton.jit
def _part(size, parts, length):
    """Sample, start and number of elements of this program in a two-stage reduction."""
    sample = tl.program_id(0).to(tl.int64) // parts
    first = (tl.program_id(0) % parts).to(tl.int64) * length
    return sample, sample * size + first, tl.minimum(length, size - first)


@triton.jit(do_not_specialize=["parts"])
def _largest_parts(
    partial, active, grad, size, parts, length, BLOCK: tl.constexpr, STEPS: tl.constexpr
):
    sample, at, count = _part(size, parts, length)
    read = elements_to_read(count, active, sample)
    tl.store(partial + tl.program_id(0), _largest(grad, at, read, BLOCK, STEPS))


@triton.jit
def _largest_of_sample(partial, sample, parts, PARTS: tl.constexpr):
    lane = tl.arange(0, PARTS)
    return tl.max(tl.load(partial + sample * parts + lane, lane < parts, other=0.0), 0)


@triton.jit(do_not_specialize=["parts"])
def _sum_parts(
    partial,
    largest,
    active,
    adv,
    grad,
    x,
    counts,
    counts_stride,
    size,
    parts,
    length,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
    PARTS: tl.constexpr,
    SCALED: tl.constexpr,
):
    """First stage for large samples: the sums of each part, [3, B, parts]."""
    sample, at, count = _part(size, parts, length)
    scale = 0.0
    if SCALED:
        scale = _largest_of_sample(largest, sample, parts, PARTS)
    read = elements_to_read(count, active, sample)
    gg, gd, dd = _sums(adv, grad, x, at, read, scale, counts, counts_stride, BLOCK, STEPS, SCALED)
    programs = tl.num_programs(0)
    to = partial + tl.program_id(0)
    tl.store(to, gg)
    tl.store(to + programs, gd)
    tl.store(to + 2 * programs, dd)


@triton.jit(do_not_specialize=["eps", "alpha", "low", "high", "parts"])
def _write_parts(
    out,
    partial,
    largest,
    active,
    adv,
    grad,
    x,
    eps: tl.int64,
    alpha: tl.int64,
    eps_values,
    alpha_values,
    low: tl.int64,
    high: tl.int64,
    size,
    parts,
    length,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
    PARTS: tl.constexpr,
    COMPUTE: tl.constexpr,
    SCALED: tl.constexpr,
):
    """Second stage for large samples."""
    sample, at, count = _part(size, parts, length)
    scale = 0.0
    if SCALED:
        scale = _largest_of_sample(largest, sample, parts, PARTS)
    programs = tl.num_programs(0)
    lane = tl.arange(0, PARTS)
    of_sample = partial + sample * parts + lane
    gg = tl.sum(tl.load(of_sample, lane < parts, other=0.0), 0)
    gd = tl.sum(tl.load(of_sample + programs, lane < parts, other=0.0), 0)
    dd = tl.sum(tl.load(of_sample + 2 * programs, lane < parts, other=0.0), 0)
    radius = per_sample(eps, eps_values, sample, COMPUTE).to(tl.float64)
    step = per_sample(alpha, alpha_values, sample, COMPUTE).to(tl.float64)
    factor, shrink = _step_and_shrink(gg, gd, dd, step, radius, COMPUTE)
    lowest, highest = number(low, COMPUTE), number(high, COMPUTE)
    shrink = shrink.to(COMPUTE)
    _write(
        out,
        adv,
        grad,
        x,
        at,
        count,
        elements_to_read(count, active, sample),
        scale,
        factor,
        shrink,
        lowest,
        highest,
        BLOCK,
        STEPS,
        COMPUTE,
        SCALED,
    )


def step_into(out: Tensor, adv: Tensor, grad: Tensor, x: Tensor, step: Step) -> None:
    """Run the step on tensors with one batch-major layout; ``out`` may be ``adv``."""
    batch, size = adv.shape[0], sample_size(adv)
    if batch == 0 or size == 0:
        return
    parts = Parts.of(size)
    scaled = grad.dtype == torch.float64
    loop = reduction_loop(parts.length)
    settings = {**loop, "SCALED": scaled}
    compute = compute_dtype(adv)
    if parts.count == 1:
        launch(
            _step_l2,
            batch,
            adv,
            out,
            adv,
            grad,
            x,
            *step.arguments(),
            step.active,
            *step.counters(),
            size,
            COMPUTE=compute,
            **settings,
        )
        return
    programs = batch * parts.count
    divided = (size, parts.count, parts.length)
    partial = torch.empty(3 * programs, dtype=torch.float64, device=adv.device)
    largest = None
    if scaled:
        largest = torch.empty(programs, dtype=torch.float64, device=adv.device)
        launch(_largest_parts, programs, adv, largest, step.active, grad, *divided, **loop)
    settings["PARTS"] = triton.next_power_of_2(parts.count)
    operands = (partial, largest, step.active, adv, grad, x)
    launch(_sum_parts, programs, adv, *operands, *step.counters(), *divided, **settings)
    launch(
        _write_parts,
        programs,
        adv,
        out,
        *operands,
        *step.arguments(),
        *divided,
        COMPUTE=compute,
        **settings,
    )
