"""One step of projected gradient ascent in Triton: linf, and the ops. Formula: fastadv/ops/pgd_step.py."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import pgd_step_l1, pgd_step_l2
from .launch import clip, compute_dtype, elements_to_read, launch, number, per_sample
from .layout import apart_from, batch_major, in_layout_of, same_layout, sample_size
from .pgd_step_shared import Step, count_gradient, linf_moved

_BLOCK = 1024


@triton.jit(do_not_specialize=["eps", "alpha", "low", "high", "parts"])
def _step_linf(
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
    parts,
    BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    sample = tl.program_id(0) // parts
    first = (tl.program_id(0) % parts).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    inside = lane < size - first
    at = sample.to(tl.int64) * size + first + lane
    live = lane < elements_to_read(size, active, sample) - first
    g = tl.load(grad + at, live, other=0.0)
    if counts is not None:
        count_gradient(g, live, counts, counts_stride)
    radius = per_sample(eps, eps_values, sample, COMPUTE)
    step = per_sample(alpha, alpha_values, sample, COMPUTE)
    centre = tl.load(x + at, live, other=0.0).to(COMPUTE)
    old = tl.load(adv + at, inside, other=0.0)
    moved = linf_moved(old.to(COMPUTE), g, centre, radius, step)
    moved = clip(moved, number(low, COMPUTE), number(high, COMPUTE))
    tl.store(out + at, tl.where(live, moved.to(old.dtype), old), inside)


def _linf_into(out: Tensor, adv: Tensor, grad: Tensor, x: Tensor, step: Step) -> None:
    batch, size = adv.shape[0], sample_size(adv)
    if step.same_for_all:
        batch, size = min(batch, 1), batch * size
    parts = triton.cdiv(size, _BLOCK)
    launch(
        _step_linf,
        batch * parts,
        adv,
        out,
        adv,
        grad,
        x,
        *step.arguments(),
        step.active,
        *step.counters(),
        size,
        parts,
        BLOCK=_BLOCK,
        COMPUTE=compute_dtype(adv),
    )


_INTO = {"linf": _linf_into, "l2": pgd_step_l2.step_into, "l1": pgd_step_l1.step_into}


def _step_into(out: Tensor, adv: Tensor, grad: Tensor, x: Tensor, step: Step) -> None:
    g, centre = (apart_from(out, in_layout_of(t, adv)) for t in (grad, x))
    _INTO[step.norm](out, adv, g, centre, step)


def pgd_step(adv: Tensor, grad: Tensor, x: Tensor, *numbers: Any) -> Tensor:
    """The op ``fastadv::pgd_step``."""
    source = batch_major(adv)
    out = torch.empty_like(adv)
    to = out if same_layout(out, source) else torch.empty_like(source)
    _step_into(to, source, grad, x, Step(*numbers))
    return out if to is out else out.copy_(to)


def pgd_step_(adv: Tensor, grad: Tensor, x: Tensor, *numbers: Any) -> None:
    """The op ``fastadv::pgd_step_``, whose last argument is ``counts``."""
    at_hand = batch_major(adv)
    _step_into(at_hand, at_hand, grad, x, Step(*numbers))
    if at_hand is not adv:
        adv.copy_(at_hand)
