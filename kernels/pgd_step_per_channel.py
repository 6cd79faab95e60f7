"""The linf step with numbers per image and channel in Triton. Formula: fastadv/ops/pgd_step_per_channel.py.

There is no CUDA C++ version: a step with numbers per channel is bound by memory, too, and the time of its launch
from Python matters only in attacks that are not recorded as a graph.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import clip, compute_dtype, elements_to_read, launch
from .layout import apart_from, batch_major, dense, in_layout_of, same_layout, sample_size
from .pgd_step_shared import count_gradient, linf_moved

_BLOCK = 1024


@triton.jit(do_not_specialize=["parts"])
def _step_per_channel(
    out,
    adv,
    grad,
    x,
    limits,
    sample_stride,
    active,
    counts,
    counts_stride,
    size,
    run,
    channels,
    parts,
    BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """The channel changes every ``run`` elements of a sample, whatever the order of its axes."""
    sample = (tl.program_id(0) // parts).to(tl.int64)
    first = (tl.program_id(0) % parts).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    inside = lane < size - first
    at = sample * size + first + lane
    live = lane < elements_to_read(size, active, sample) - first
    g = tl.load(grad + at, live, other=0.0)
    if counts is not None:
        count_gradient(g, live, counts, counts_stride)
    numbers = limits + sample * sample_stride + (first + lane) // run % channels * 4
    radius = tl.load(numbers, live, other=0.0)
    step = tl.load(numbers + 1, live, other=0.0)
    low = tl.load(numbers + 2, live, other=0.0)
    high = tl.load(numbers + 3, live, other=0.0)
    centre = tl.load(x + at, live, other=0.0).to(COMPUTE)
    old = tl.load(adv + at, inside, other=0.0)
    moved = clip(linf_moved(old.to(COMPUTE), g, centre, radius, step), low, high)
    tl.store(out + at, tl.where(live, moved.to(old.dtype), old), inside)


def _step_into(
    out: Tensor,
    adv: Tensor,
    grad: Tensor,
    x: Tensor,
    limits: Tensor,
    active: Tensor | None,
    counts: Tensor | None,
) -> None:
    """Run the step on images with a batch-major layout."""
    size, channels = sample_size(adv), adv.shape[1]
    compute = compute_dtype(adv)
    limits = limits.to(torch.float64 if compute == tl.float64 else torch.float32)
    if limits.stride()[1:] != (4, 1):
        limits = limits.contiguous()
    parts = triton.cdiv(size, _BLOCK)
    launch(
        _step_per_channel,
        adv.shape[0] * parts,
        adv,
        out,
        adv,
        apart_from(out, in_layout_of(grad, adv)),
        apart_from(out, in_layout_of(x, adv)),
        limits,
        limits.stride(0),
        dense(active),
        counts,
        1 if counts is None else counts.stride(0),
        size,
        adv.stride(1) if channels > 1 else max(size, 1),
        channels,
        parts,
        BLOCK=_BLOCK,
        COMPUTE=compute,
    )


def pgd_step_per_channel(
    adv: Tensor, grad: Tensor, x: Tensor, limits: Tensor, active: Tensor | None
) -> Tensor:
    """The op ``fastadv::pgd_step_per_channel``."""
    source = batch_major(adv)
    out = torch.empty_like(adv)
    to = out if same_layout(out, source) else torch.empty_like(source)
    _step_into(to, source, grad, x, limits, active, None)
    return out if to is out else out.copy_(to)


def pgd_step_per_channel_(
    adv: Tensor,
    grad: Tensor,
    x: Tensor,
    limits: Tensor,
    active: Tensor | None,
    counts: Tensor | None,
) -> None:
    """The op ``fastadv::pgd_step_per_channel_``."""
    at_hand = batch_major(adv)
    _step_into(at_hand, at_hand, grad, x, limits, active, counts)
    if at_hand is not adv:
        adv.copy_(at_hand)
