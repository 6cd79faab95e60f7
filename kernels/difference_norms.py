"""Norms of differences from one common batch of features, in Triton.

The Euclidean distance has one difference, VFD's loss has two. Definitions: fastadv/ops/euclidean_distance.py and
fastadv/ops/vanilla_feature_distillation.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import compute_dtype, divide, launch, rounded
from .layout import Gradient, Parts, batch_major, in_layout_of, reduction_loop, sample_size

_BLOCK = 1024
_TORCH_DTYPES = {tl.float32: torch.float32, tl.float64: torch.float64}


@triton.jit
def _square_sums(
    u, w, v, at, length, BLOCK: tl.constexpr, STEPS: tl.constexpr, COMPUTE: tl.constexpr
):
    """|u - v|^2 and |w - v|^2 (|u - v|^2 again without ``w``): short sums in COMPUTE, added in float64."""
    lane = tl.arange(0, BLOCK)
    uu = tl.zeros([BLOCK], COMPUTE)
    ww = tl.zeros([BLOCK], COMPUTE)
    for i in range(STEPS):
        first = i * BLOCK
        inside = lane < length - first
        center = tl.load(v + at + first + lane, inside, other=0.0).to(COMPUTE)
        d = tl.load(u + at + first + lane, inside, other=0.0).to(COMPUTE) - center
        uu += d * d
        if w is not None:
            e = tl.load(w + at + first + lane, inside, other=0.0).to(COMPUTE) - center
            ww += e * e
    total = tl.sum(uu.to(tl.float64), 0)
    return total, tl.sum(ww.to(tl.float64), 0) if w is not None else total


@triton.jit
def _finish(result, norms, sample, uu, ww, SQUARED: tl.constexpr, COMPUTE: tl.constexpr):
    """Write one sample's results; ``norms`` is None for the Euclidean distance."""
    if norms is None:
        tl.store(result + sample, (uu if SQUARED else tl.sqrt(uu)).to(COMPUTE))
    else:
        of_u, of_w = tl.sqrt(uu), tl.sqrt(ww)
        tl.store(result + sample, (of_u + of_w).to(COMPUTE))
        tl.store(norms + 2 * sample, of_u.to(COMPUTE))
        tl.store(norms + 2 * sample + 1, of_w.to(COMPUTE))


@triton.jit
def _norms(
    result,
    norms,
    u,
    w,
    v,
    size,
    SQUARED: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """One program per sample."""
    sample = tl.program_id(0).to(tl.int64)
    uu, ww = _square_sums(u, w, v, sample * size, size, BLOCK, STEPS, COMPUTE)
    _finish(result, norms, sample, uu, ww, SQUARED, COMPUTE)


@triton.jit(do_not_specialize=["parts"])
def _squares_of_parts(
    partial,
    u,
    w,
    v,
    size,
    parts,
    length,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """First stage for large samples: the sums of each part, [1 or 2, B, parts]."""
    sample = tl.program_id(0).to(tl.int64) // parts
    first = (tl.program_id(0) % parts).to(tl.int64) * length
    count = tl.minimum(length, size - first)
    uu, ww = _square_sums(u, w, v, sample * size + first, count, BLOCK, STEPS, COMPUTE)
    to = partial + tl.program_id(0)
    tl.store(to, uu)
    if w is not None:
        tl.store(to + tl.num_programs(0), ww)


@triton.jit(do_not_specialize=["parts"])
def _norms_from_parts(
    result,
    norms,
    partial,
    parts,
    PARTS: tl.constexpr,
    SQUARED: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Second stage for large samples."""
    sample = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, PARTS)
    of_sample = partial + sample * parts + lane
    plane = tl.num_programs(0).to(tl.int64) * parts
    uu = tl.sum(tl.load(of_sample, lane < parts, other=0.0), 0)
    ww = uu
    if norms is not None:
        ww = tl.sum(tl.load(of_sample + plane, lane < parts, other=0.0), 0)
    _finish(result, norms, sample, uu, ww, SQUARED, COMPUTE)


@triton.jit
def _slope(grad, norm, SQUARED: tl.constexpr, COMPUTE: tl.constexpr):
    """The factor of the difference in the gradient; 0 if the norm is 0."""
    if SQUARED:
        slope = 2 * grad
    else:
        length = tl.load(norm).to(COMPUTE)
        slope = tl.where(length == 0, 0.0, divide(grad, length))
    return slope


@triton.jit(do_not_specialize=["parts"])
def _gradients(
    out_u,
    out_w,
    out_v,
    grad,
    grad_stride,
    u,
    w,
    v,
    norms,
    norms_stride,
    size,
    parts,
    SQUARED: tl.constexpr,
    BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """The gradients whose outputs are not None; the norm for ``w`` lies beside the norm for ``u``."""
    sample = tl.program_id(0).to(tl.int64) // parts
    first = (tl.program_id(0) % parts).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    inside = lane < size - first
    at = sample * size + first + lane
    slope = tl.load(grad + sample * grad_stride).to(COMPUTE)
    norm = norms + sample * norms_stride
    center = tl.load(v + at, inside, other=0.0).to(COMPUTE)
    d = tl.load(u + at, inside, other=0.0).to(COMPUTE) - center
    gradient = _slope(slope, norm, SQUARED, COMPUTE) * d
    if out_u is not None:
        tl.store(out_u + at, rounded(gradient, out_u.dtype.element_ty), inside)
    if out_v is not None:
        tl.store(out_v + at, rounded(-gradient, out_v.dtype.element_ty), inside)
    if w is not None:
        e = tl.load(w + at, inside, other=0.0).to(COMPUTE) - center
        of_w = _slope(slope, norm + 1, SQUARED, COMPUTE) * e
        tl.store(out_w + at, rounded(of_w, out_w.dtype.element_ty), inside)


def _forward(u: Tensor, w: Tensor | None, v: Tensor, squared: bool) -> tuple[Tensor, Tensor | None]:
    """One number per sample, and the two norms [B, 2] if there is a ``w``."""
    batch, size = u.shape[0], sample_size(u)
    compute = compute_dtype(*(t for t in (u, w, v) if t is not None))
    a = batch_major(u)
    b = None if w is None else in_layout_of(w, a)
    center = in_layout_of(v, a)
    result = torch.empty(batch, dtype=_TORCH_DTYPES[compute], device=u.device)
    norms = None if w is None else result.new_empty((batch, 2))
    parts = Parts.of(size)
    finish = {"SQUARED": squared, "COMPUTE": compute}
    loop = reduction_loop(parts.length)
    if parts.count == 1:
        launch(_norms, batch, u, result, norms, a, b, center, size, **loop, **finish)
        return result, norms
    sums = 1 if w is None else 2
    partial = torch.empty((sums, batch, parts.count), dtype=torch.float64, device=u.device)
    divided = (size, parts.count, parts.length)
    programs = batch * parts.count
    launch(_squares_of_parts, programs, u, partial, a, b, center, *divided, **loop, COMPUTE=compute)
    launch(
        _norms_from_parts,
        batch,
        u,
        result,
        norms,
        partial,
        parts.count,
        PARTS=triton.next_power_of_2(parts.count),
        num_warps=1,
        **finish,
    )
    return result, norms


def _backward(
    grad: Tensor,
    features: tuple[Tensor, Tensor | None, Tensor],
    norms: Tensor,
    squared: bool,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor, ...]:
    """The wanted gradients with respect to u, w and v; an empty tensor for each unwanted one."""
    u, _, _ = features
    a = batch_major(u)
    aligned = [None if t is None else in_layout_of(t, a) for t in features]
    gradients = [
        None if t is None else Gradient(t, a, want)
        for t, want in zip(features, wanted, strict=True)
    ]
    size = sample_size(u)
    parts = triton.cdiv(size, _BLOCK)
    launch(
        _gradients,
        u.shape[0] * parts,
        u,
        *(None if g is None else g.written for g in gradients),
        grad,
        grad.stride(0),
        *aligned,
        norms,
        norms.stride(0),
        size,
        parts,
        SQUARED=squared,
        BLOCK=_BLOCK,
        COMPUTE=compute_dtype(*(t for t in features if t is not None)),
    )
    return tuple(g.finished() for g in gradients if g is not None)


def euclidean_distance(u: Tensor, v: Tensor, squared: bool) -> Tensor:
    """The op ``fastadv::euclidean_distance``."""
    return _forward(u, None, v, squared)[0]


def euclidean_distance_backward(
    grad: Tensor, u: Tensor, v: Tensor, distance: Tensor, squared: bool, want_u: bool, want_v: bool
) -> tuple[Tensor, ...]:
    """The op ``fastadv::euclidean_distance_backward``."""
    if not (want_u or want_v):
        return u.new_empty(0), v.new_empty(0)
    return _backward(grad, (u, None, v), distance, squared, (want_u, False, want_v))


def vanilla_feature_distillation(
    f_adv: Tensor, f_clean: Tensor, f_vanilla: Tensor
) -> tuple[Tensor, Tensor]:
    """The op ``fastadv::vanilla_feature_distillation``."""
    loss, norms = _forward(f_adv, f_clean, f_vanilla, squared=False)
    assert norms is not None
    return loss, norms


def vanilla_feature_distillation_backward(
    grad: Tensor,
    f_adv: Tensor,
    f_clean: Tensor,
    f_vanilla: Tensor,
    norms: Tensor,
    want_adv: bool,
    want_clean: bool,
) -> tuple[Tensor, Tensor]:
    """The op ``fastadv::vanilla_feature_distillation_backward``."""
    norms = norms.contiguous()
    of_adv, of_clean = f_adv.new_empty(0), f_clean.new_empty(0)
    if want_adv and want_clean:
        features = (f_adv, f_clean, f_vanilla)
        of_adv, of_clean, _ = _backward(grad, features, norms, False, (True, True, False))
    elif want_adv:
        one = (True, False, False)
        of_adv, _ = _backward(grad, (f_adv, None, f_vanilla), norms, False, one)
    elif want_clean:
        one = (True, False, False)
        of_clean, _ = _backward(grad, (f_clean, None, f_vanilla), norms[:, 1], False, one)
    return of_adv, of_clean
