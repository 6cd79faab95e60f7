"""The work of one Auto-PGD step on a batch whose rows are at different steps, in one pass over memory.

Source: F. Croce and M. Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse
parameter-free attacks", ICML 2020, algorithm 1. On the CPU csrc/cpu/apgd_advance.cpp reads and writes each image
once. As operations of torch this is about twenty passes over the batch, each of which starts and joins all
threads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastadv.attacks.best import where_images
from fastadv.ops import NATIVE, pgd_step_
from fastadv.ops.checks import in_layout_of

MOMENTUM = 0.75  # alpha of algorithm 1: the weight of the new step; the last movement has the rest

torch.library.define(
    "fastadv::apgd_advance_",
    "(Tensor(a!) adv, Tensor(b!) before, Tensor(c!) best, Tensor(d!) best_grad, Tensor(e!) kept, Tensor grad, "
    "Tensor x, Tensor alpha, Tensor fresh, Tensor better, Tensor keep, Tensor back, float eps, float low, "
    "float high, float momentum) -> ()",
)


class SlotImages(NamedTuple):
    """The images of a batch's rows, each [S, ...], as `fastadv.attacks.apgd_slots.Slots` has them."""

    x: Tensor
    adv: Tensor
    before: Tensor
    best: Tensor
    best_grad: Tensor
    kept: Tensor


class RowFlags(NamedTuple):
    """Flags that decide what happens to each row, [S] bool.

    Attributes:
        fresh: the row's run has made no step yet.
        better: the row's point is the best so far.
        keep: the row's point is the worst case so far.
        back: the row's run goes on from its best point; None if no run does.
    """

    fresh: Tensor
    better: Tensor
    keep: Tensor
    back: Tensor | None = None


def advance(
    images: SlotImages,
    grad: Tensor,
    rows: RowFlags,
    alpha: Tensor,
    eps: float,
    norm: str,
    bounds: tuple[float, float],
) -> SlotImages:
    """Keep the best points and the worst cases, and step every row.

    Args:
        images: the images before the step; they are overwritten if possible.
        grad: the gradients at ``images.adv``, [S, ...].
        rows: flags that say what happens to each row.
        alpha: step sizes [S].
        eps: radius of the ball.
        norm: ``"linf"`` or ``"l2"``.
        bounds: lowest and highest allowed value.

    Returns:
        The images after the step; ``before`` are the points from which the step was made.
    """
    if images.best_grad.dtype != grad.dtype:
        images = images._replace(best_grad=images.best_grad.to(grad.dtype))
    if norm != "linf" or not _is_compiled(images.adv):
        return advance_by_torch(images, grad, rows, alpha, eps, norm, bounds)
    images = SlotImages(*(in_layout_of(one, images.adv) for one in images))
    torch.ops.fastadv.apgd_advance_(
        images.adv,
        images.before,
        images.best,
        images.best_grad,
        images.kept,
        in_layout_of(grad, images.adv),
        images.x,
        alpha,
        *rows[:3],
        torch.zeros_like(rows.fresh) if rows.back is None else rows.back,
        eps,
        *bounds,
        MOMENTUM,
    )
    return images


def advance_by_torch(
    images: SlotImages,
    grad: Tensor,
    rows: RowFlags,
    alpha: Tensor,
    eps: float,
    norm: str,
    bounds: tuple[float, float],
) -> SlotImages:
    """Compute `advance` by operations of torch, on any device; nothing is overwritten."""
    x, adv, before, best, best_grad, kept = images
    kept = where_images(rows.keep, adv, kept)
    best, best_grad = (
        where_images(rows.better, new, old) for new, old in ((adv, best), (grad, best_grad))
    )
    point, direction = adv, grad
    if rows.back is not None:
        point = where_images(rows.back, best, adv)
        direction = where_images(rows.back, best_grad, grad)
    stepped = pgd_step_(point.clone(), direction, x, eps, alpha, norm, bounds)
    moved = point + MOMENTUM * (stepped - point) + (1 - MOMENTUM) * (point - before)
    moved = pgd_step_(moved, x, x, eps, 0.0, norm, bounds)
    # A run's first step has no earlier movement to go on with.
    return SlotImages(x, where_images(rows.fresh, stepped, moved), point, best, best_grad, kept)


def _is_compiled(adv: Tensor) -> bool:
    fits = adv.dtype in (torch.float32, torch.float64) and _is_batch_major(adv)
    return fits and adv.device.type == "cpu" and NATIVE.library is not None


def _is_batch_major(t: Tensor) -> bool:
    last = torch.channels_last
    return t.is_contiguous() or (t.dim() == 4 and t.is_contiguous(memory_format=last))
