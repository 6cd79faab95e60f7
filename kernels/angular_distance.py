"""Angular distance and the replay mask in Triton. Definition: fastadv/ops/angular_distance.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import compute_dtype, divide, double_bits, launch, number, rounded, square_root
from .layout import Gradient, Parts, batch_major, in_layout_of, reduction_loop, sample_size

_BLOCK = 1024
_TORCH_DTYPES = {tl.float32: torch.float32, tl.float64: torch.float64}


@triton.jit
def _moments(u, v, at, length, BLOCK: tl.constexpr, STEPS: tl.constexpr, COMPUTE: tl.constexpr):
    """u.v, u.u and v.v of ``length`` elements: short sums in the dtype of computation, added in float64."""
    lane = tl.arange(0, BLOCK)
    dot = tl.zeros([BLOCK], COMPUTE)
    uu = tl.zeros([BLOCK], COMPUTE)
    vv = tl.zeros([BLOCK], COMPUTE)
    for i in range(STEPS):
        first = i * BLOCK
        inside = lane < length - first
        a = tl.load(u + at + first + lane, inside, other=0.0).to(COMPUTE)
        b = tl.load(v + at + first + lane, inside, other=0.0).to(COMPUTE)
        dot += a * b
        uu += a * a
        vv += b * b
    return (
        tl.sum(dot.to(tl.float64), 0),
        tl.sum(uu.to(tl.float64), 0),
        tl.sum(vv.to(tl.float64), 0),
    )


@triton.jit
def _known(length):
    """The product of the two norms; NaN where squares have overflowed, as nothing can be said then."""
    return tl.where(length == float("inf"), float("nan"), length)


@triton.jit
def _finish(distance, moments, far, sample, dot, uu, vv, tau, COMPUTE: tl.constexpr):
    """Write one sample's results; ``moments`` or ``far`` is None if the op does not return it."""
    length = _known(tl.sqrt(uu) * tl.sqrt(vv))
    d = tl.where(length == 0, 1.0, 1 - tl.abs(dot) / length).to(COMPUTE)
    d = tl.where(d < 0, 0.0, d)  # rounding; a NaN stays
    tl.store(distance + sample, d)
    if moments is not None:
        tl.store(moments + 3 * sample, dot.to(COMPUTE))
        tl.store(moments + 3 * sample + 1, uu.to(COMPUTE))
        tl.store(moments + 3 * sample + 2, vv.to(COMPUTE))
    if far is not None:
        tl.store(far + sample, d > number(tau, COMPUTE))


@triton.jit(do_not_specialize=["tau"])
def _distance(
    distance,
    moments,
    far,
    u,
    v,
    tau: tl.int64,
    size,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """One program per sample."""
    sample = tl.program_id(0).to(tl.int64)
    dot, uu, vv = _moments(u, v, sample * size, size, BLOCK, STEPS, COMPUTE)
    _finish(distance, moments, far, sample, dot, uu, vv, tau, COMPUTE)


@triton.jit(do_not_specialize=["parts"])
def _moments_of_parts(
    partial,
    u,
    v,
    size,
    parts,
    length,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """First stage for large samples: the moments of each part, [3, B, parts]."""
    sample = tl.program_id(0).to(tl.int64) // parts
    first = (tl.program_id(0) % parts).to(tl.int64) * length
    count = tl.minimum(length, size - first)
    dot, uu, vv = _moments(u, v, sample * size + first, count, BLOCK, STEPS, COMPUTE)
    to = partial + tl.program_id(0)
    tl.store(to, dot)
    tl.store(to + tl.num_programs(0), uu)
    tl.store(to + 2 * tl.num_programs(0), vv)


@triton.jit(do_not_specialize=["tau", "parts"])
def _distance_of_parts(
    distance,
    moments,
    far,
    partial,
    tau: tl.int64,
    parts,
    PARTS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Second stage for large samples."""
    sample = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, PARTS)
    of_sample = partial + sample * parts + lane
    plane = tl.num_programs(0).to(tl.int64) * parts
    dot = tl.sum(tl.load(of_sample, lane < parts, other=0.0), 0)
    uu = tl.sum(tl.load(of_sample + plane, lane < parts, other=0.0), 0)
    vv = tl.sum(tl.load(of_sample + 2 * plane, lane < parts, other=0.0), 0)
    _finish(distance, moments, far, sample, dot, uu, vv, tau, COMPUTE)


@triton.jit(do_not_specialize=["parts"])
def _backward(
    out_u,
    out_v,
    grad,
    grad_stride,
    u,
    v,
    moments,
    size,
    parts,
    BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """The gradients whose outputs are not None."""
    sample = tl.program_id(0).to(tl.int64) // parts
    first = (tl.program_id(0) % parts).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    inside = lane < size - first
    at = sample * size + first + lane
    a = tl.load(u + at, inside, other=0.0).to(COMPUTE)
    b = tl.load(v + at, inside, other=0.0).to(COMPUTE)
    slope = tl.load(grad + sample * grad_stride).to(COMPUTE)
    dot = tl.load(moments + 3 * sample).to(COMPUTE)
    uu = tl.load(moments + 3 * sample + 1).to(COMPUTE)
    vv = tl.load(moments + 3 * sample + 2).to(COMPUTE)
    length = _known(square_root(uu) * square_root(vv))
    signed = tl.where(dot > 0, -slope, tl.where(dot < 0, slope, 0.0))
    across = tl.where(length == 0, 0.0, divide(signed, length))
    if out_u is not None:
        along = tl.where(length == 0, 0.0, divide(-across * dot, uu))
        tl.store(out_u + at, rounded(along * a + across * b, out_u.dtype.element_ty), inside)
    if out_v is not None:
        along = tl.where(length == 0, 0.0, divide(-across * dot, vv))
        tl.store(out_v + at, rounded(along * b + across * a, out_v.dtype.element_ty), inside)


def _results(
    u: Tensor, v: Tensor, tau: float, want_moments: bool, want_far: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    batch, size = u.shape[0], sample_size(u)
    compute = compute_dtype(u, v)
    a = batch_major(u)
    b = in_layout_of(v, a)
    distance = torch.empty(batch, dtype=_TORCH_DTYPES[compute], device=u.device)
    moments = distance.new_empty((batch, 3)) if want_moments else None
    far = distance.new_empty(batch, dtype=torch.bool) if want_far else None
    results = (distance, moments, far)
    parts = Parts.of(size)
    settings = {**reduction_loop(parts.length), "COMPUTE": compute}
    threshold = double_bits(tau)
    if parts.count == 1:
        launch(_distance, batch, u, *results, a, b, threshold, size, **settings)
        return results
    partial = torch.empty((3, batch, parts.count), dtype=torch.float64, device=u.device)
    divided = (size, parts.count, parts.length)
    launch(_moments_of_parts, batch * parts.count, u, partial, a, b, *divided, **settings)
    launch(
        _distance_of_parts,
        batch,
        u,
        *results,
        partial,
        threshold,
        parts.count,
        PARTS=triton.next_power_of_2(parts.count),
        COMPUTE=compute,
        num_warps=1,
    )
    return results


def angular_distance(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The op ``fastadv::angular_distance``."""
    distance, moments, _ = _results(u, v, 0.0, want_moments=True, want_far=False)
    assert moments is not None
    return distance, moments


def replay_mask(u: Tensor, v: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """The op ``fastadv::replay_mask``."""
    distance, _, far = _results(u, v, tau, want_moments=False, want_far=True)
    assert far is not None
    return distance, far


def angular_distance_backward(
    grad: Tensor, u: Tensor, v: Tensor, moments: Tensor, want_u: bool, want_v: bool
) -> tuple[Tensor, Tensor]:
    """The op ``fastadv::angular_distance_backward``."""
    a = batch_major(u)
    of_u, of_v = Gradient(u, a, want_u), Gradient(v, a, want_v)
    size = sample_size(u)
    parts = triton.cdiv(size, _BLOCK)
    launch(
        _backward,
        u.shape[0] * parts if want_u or want_v else 0,
        u,
        of_u.written,
        of_v.written,
        grad,
        grad.stride(0),
        a,
        in_layout_of(v, a),
        moments.contiguous(),
        size,
        parts,
        BLOCK=_BLOCK,
        COMPUTE=compute_dtype(u, v),
    )
    return of_u.finished(), of_v.finished()
