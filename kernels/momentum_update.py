"""The accumulated gradient of momentum attacks in Triton. Definition: fastadv/ops/momentum_update.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import (
    compute_dtype,
    double_bits,
    elements_to_read,
    launch,
    number,
    rounded_to_float_precision,
)
from .layout import Parts, apart_from, batch_major, dense, in_layout_of, reduction_loop, sample_size


@triton.jit
def _l1_norm(grad, at, length, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """The sum of ``length`` magnitudes."""
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for i in range(STEPS):
        first = i * BLOCK
        g = tl.load(grad + at + first + lane, lane < length - first, other=0.0)
        total += tl.abs(g.to(tl.float64))
    return tl.sum(total, 0)


@triton.jit
def _factor(norm, COMPUTE: tl.constexpr):
    """The factor of the gradient, 1 / norm; 0, so that the gradient adds nothing, if this is not finite."""
    factor = 1 / norm
    usable = (norm > 0) & (norm < float("inf")) & (factor < float("inf"))
    if tl.float32 == COMPUTE:
        factor = rounded_to_float_precision(factor)
    return tl.where(usable, factor, 0.0)


@triton.jit
def _add(
    momentum,
    grad,
    at,
    length,
    decay,
    factor,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    lane = tl.arange(0, BLOCK)
    for i in range(STEPS):
        first = i * BLOCK
        inside = lane < length - first
        here = at + first + lane
        g = tl.load(grad + here, inside, other=0.0).to(tl.float64)
        added = tl.where(factor == 0, 0.0, g * factor).to(COMPUTE)
        m = tl.load(momentum + here, inside, other=0.0)
        tl.store(momentum + here, decay * m + added, inside)


@triton.jit(do_not_specialize=["decay"])
def _update_samples(
    momentum,
    grad,
    decay: tl.int64,
    active,
    size,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """One program per sample; its second pass finds the gradient in the caches."""
    sample = tl.program_id(0).to(tl.int64)
    at = sample * size
    read = elements_to_read(size, active, sample)
    factor = _factor(_l1_norm(grad, at, read, BLOCK, STEPS), COMPUTE)
    _add(momentum, grad, at, read, number(decay, COMPUTE), factor, BLOCK, STEPS, COMPUTE)


@triton.jit
def _part(size, parts, length, active):
    """Sample, start and number of elements of this program, which shares a large sample with others."""
    sample = tl.program_id(0).to(tl.int64) // parts
    first = (tl.program_id(0) % parts).to(tl.int64) * length
    count = elements_to_read(tl.minimum(length, size - first), active, sample)
    return sample, sample * size + first, count


@triton.jit(do_not_specialize=["parts"])
def _norms_of_parts(
    partial, grad, active, size, parts, length, BLOCK: tl.constexpr, STEPS: tl.constexpr
):
    _, at, count = _part(size, parts, length, active)
    tl.store(partial + tl.program_id(0), _l1_norm(grad, at, count, BLOCK, STEPS))


@triton.jit(do_not_specialize=["decay", "parts"])
def _update_parts(
    momentum,
    partial,
    grad,
    decay: tl.int64,
    active,
    size,
    parts,
    length,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
    PARTS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    sample, at, count = _part(size, parts, length, active)
    lane = tl.arange(0, PARTS)
    norm = tl.sum(tl.load(partial + sample * parts + lane, lane < parts, other=0.0), 0)
    factor = _factor(norm, COMPUTE)
    _add(momentum, grad, at, count, number(decay, COMPUTE), factor, BLOCK, STEPS, COMPUTE)


def momentum_update_(momentum: Tensor, grad: Tensor, decay: float, active: Tensor | None) -> None:
    """The op ``fastadv::momentum_update_``."""
    batch, size = momentum.shape[0], sample_size(momentum)
    if batch == 0 or size == 0:
        return
    at_hand = batch_major(momentum)
    g = apart_from(at_hand, in_layout_of(grad, at_hand))
    chosen = dense(active)
    bits, compute = double_bits(decay), compute_dtype(momentum)
    parts = Parts.of(size)
    loop = reduction_loop(parts.length)
    if parts.count == 1:
        arguments = (at_hand, g, bits, chosen, size)
        launch(_update_samples, batch, momentum, *arguments, COMPUTE=compute, **loop)
    else:
        programs = batch * parts.count
        divided = (chosen, size, parts.count, parts.length)
        partial = torch.empty(programs, dtype=torch.float64, device=momentum.device)
        launch(_norms_of_parts, programs, momentum, partial, g, *divided, **loop)
        loop["PARTS"] = triton.next_power_of_2(parts.count)
        arguments = (at_hand, partial, g, bits, *divided)
        launch(_update_parts, programs, momentum, *arguments, COMPUTE=compute, **loop)
    if at_hand is not momentum:
        momentum.copy_(at_hand)
