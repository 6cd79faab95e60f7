"""The feature distance of vanilla feature distillation (VFD-Adv)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastadv.ops import checks
from fastadv.ops.registry import Op, define, register_gradient

REDUCTIONS = ("mean", "none")


def _reference(f_adv: Tensor, f_clean: Tensor, f_vanilla: Tensor) -> tuple[Tensor, Tensor]:
    dtype = checks.accumulate_dtype(f_adv, f_clean, f_vanilla)
    vanilla = checks.rows(f_vanilla).to(dtype)
    of_adv, of_clean = (
        (checks.rows(f).to(dtype) - vanilla).square().sum(1).sqrt() for f in (f_adv, f_clean)
    )
    return of_adv + of_clean, torch.stack((of_adv, of_clean), dim=1)


def _fake(f_adv: Tensor, f_clean: Tensor, f_vanilla: Tensor) -> tuple[Tensor, Tensor]:
    torch._check(f_adv.shape == f_clean.shape, lambda: "f_clean must have the shape of f_adv")
    torch._check(f_adv.shape == f_vanilla.shape, lambda: "f_vanilla must have the shape of f_adv")
    loss = f_adv.new_empty(
        f_adv.shape[:1], dtype=checks.accumulate_dtype(f_adv, f_clean, f_vanilla)
    )
    return loss, loss.new_empty((f_adv.shape[0], 2))


def _backward_reference(
    grad: Tensor,
    f_adv: Tensor,
    f_clean: Tensor,
    f_vanilla: Tensor,
    norms: Tensor,
    want_adv: bool,
    want_clean: bool,
) -> tuple[Tensor, Tensor]:
    dtype = checks.accumulate_dtype(f_adv, f_clean, f_vanilla)
    slopes = torch.where(norms == 0, 0, grad[:, None] / norms)
    vanilla = f_vanilla.to(dtype)

    def gradient(f: Tensor, slope: Tensor) -> Tensor:
        difference = f.to(dtype) - vanilla
        return torch.empty_like(f).copy_(checks.over_samples(slope, f) * difference)

    return (
        gradient(f_adv, slopes[:, 0]) if want_adv else f_adv.new_empty(0),
        gradient(f_clean, slopes[:, 1]) if want_clean else f_clean.new_empty(0),
    )


def _backward_fake(
    grad: Tensor,
    f_adv: Tensor,
    f_clean: Tensor,
    f_vanilla: Tensor,
    norms: Tensor,
    want_adv: bool,
    want_clean: bool,
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(f_adv) if want_adv else f_adv.new_empty(0),
        torch.empty_like(f_clean) if want_clean else f_clean.new_empty(0),
    )


_op = define(
    Op(
        "vanilla_feature_distillation",
        "(Tensor f_adv, Tensor f_clean, Tensor f_vanilla) -> (Tensor, Tensor)",
        reference=_reference,
        fake=_fake,
        triton="difference_norms:vanilla_feature_distillation",
        batched=("f_adv", "f_clean", "f_vanilla"),
    )
)
# Both gradients come from one pass over the features. A gradient that is not wanted is empty, and its features are
# not read.
_backward_op = define(
    Op(
        "vanilla_feature_distillation_backward",
        "(Tensor grad, Tensor f_adv, Tensor f_clean, Tensor f_vanilla, Tensor norms, bool want_adv,"
        " bool want_clean) -> (Tensor, Tensor)",
        reference=_backward_reference,
        fake=_backward_fake,
        triton="difference_norms:vanilla_feature_distillation_backward",
        batched=("grad", "f_adv", "f_clean", "f_vanilla", "norms"),
        backward_of="vanilla_feature_distillation",
    )
)


def _setup_context(
    ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: tuple[Tensor, Tensor]
) -> None:
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, Tensor | None, None]:
    if grad is None:
        return None, None, None
    want_adv, want_clean, _ = ctx.needs_input_grad
    backward = torch.ops.fastadv.vanilla_feature_distillation_backward
    grad_adv, grad_clean = backward(grad, *ctx.saved_tensors, want_adv, want_clean)
    return grad_adv if want_adv else None, grad_clean if want_clean else None, None


register_gradient(_op, _backward, _setup_context)


def vanilla_feature_distillation(
    f_adv: Tensor, f_clean: Tensor, f_vanilla: Tensor, reduction: str = "mean"
) -> Tensor:
    """Mean over the batch of ``||f_adv - f_vanilla||_2 + ||f_clean - f_vanilla||_2``.

    Source: VFD-Adv, equation 5. The norms are per sample, over all axes but the first. The gradient of a norm
    is taken as 0 where the norm is 0; NaN features give NaN for their sample. Gradients flow to ``f_adv`` and
    ``f_clean``, each computed only where it is needed. ``f_vanilla`` gets no gradient. The forward and the
    backward pass read it once each. There is no second derivative. float32 has the same range as in
    `euclidean_distance`.

    Args:
        f_adv: the trained model's features of the attacked images [B, ...], any dense layout, float32,
            float64, bfloat16 or float16.
        f_clean: the trained model's features of the clean images, of the same shape.
        f_vanilla: the frozen vanilla model's features of the clean images, of the same shape; dtypes and
            layouts of the three may differ.
        reduction: "mean" over the batch (NaN for an empty one, as in torch) or "none".

    Returns:
        A scalar, or [B] with reduction "none"; float32 (float64 if an argument is float64), accumulated in
        that dtype.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: shapes or devices differ, or the reduction is unknown.
    """
    checks.check_float("f_adv", f_adv)
    for name, features in (("f_clean", f_clean), ("f_vanilla", f_vanilla)):
        checks.check_float(name, features)
        checks.check_same_shape(name, features, "f_adv", f_adv)
    checks.check_choice("reduction", reduction, REDUCTIONS)
    op = torch.ops.fastadv.vanilla_feature_distillation
    loss = op(f_adv, f_clean, f_vanilla.detach())[0]
    return loss.mean() if reduction == "mean" else loss
