"""A linear layer over the features of several extractors, without concatenating them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastadv.ops import checks
from fastadv.ops.registry import Op, define, register_gradient


def _reference(features: list[Tensor], weight: Tensor, bias: Tensor | None) -> Tensor:
    dtype = checks.accumulate_dtype(weight)
    out = weight.new_zeros((features[0].shape[0], weight.shape[0]), dtype=dtype)
    if bias is not None:
        out += bias
    # In place, so that autocast leaves the products in this dtype.
    for part, columns in zip(features, _columns(weight, _widths(features)), strict=True):
        out.addmm_(part.to(dtype), columns.to(dtype).t())
    return out.to(weight.dtype)


def _widths(features: Sequence[Tensor]) -> list[int]:
    return [part.shape[1] for part in features]


def _columns(weight: Tensor, widths: Sequence[int]) -> Iterator[Tensor]:
    """The columns of the weight that belong to each of the features, as views."""
    start = 0
    for width in widths:
        yield weight[:, start : start + width]
        start += width


def _check_parts(features: list[Tensor], weight: Tensor) -> None:
    torch._check(len(features) > 0, lambda: "features must hold at least one tensor")
    torch._check(weight.dim() == 2, lambda: "weight must have axes [C, D]")
    for part in features:
        torch._check(part.dim() == 2, lambda: "features must have axes [B, d]")
        torch._check(part.shape[0] == features[0].shape[0], lambda: "features must agree in B")
        torch._check(part.dtype == weight.dtype, lambda: "features must have the dtype of weight")


def _fake(features: list[Tensor], weight: Tensor, bias: Tensor | None) -> Tensor:
    _check_parts(features, weight)
    torch._check(
        sum(_widths(features)) == weight.shape[1],
        lambda: "weight must have a column for each feature",
    )
    return weight.new_empty((features[0].shape[0], weight.shape[0]))


def _features_reference(
    grad: Tensor, weight: Tensor, widths: list[int], wanted: list[bool]
) -> list[Tensor]:
    dtype = checks.accumulate_dtype(weight)
    wide = grad.to(dtype)
    found = []
    for columns, width, asked in zip(_columns(weight, widths), widths, wanted, strict=True):
        if asked:
            product = wide.new_empty((grad.shape[0], width))
            product.addmm_(wide, columns.to(dtype), beta=0)
            found.append(product.to(weight.dtype))
    return found


def _features_fake(
    grad: Tensor, weight: Tensor, widths: list[int], wanted: list[bool]
) -> list[Tensor]:
    torch._check(len(widths) == len(wanted), lambda: "wanted must have an entry for each width")
    return [
        weight.new_empty((grad.shape[0], width))
        for width, asked in zip(widths, wanted, strict=True)
        if asked
    ]


def _weight_reference(grad: Tensor, features: list[Tensor]) -> Tensor:
    dtype = checks.accumulate_dtype(grad)
    wide = grad.to(dtype).t()
    widths = _widths(features)
    found = grad.new_empty((grad.shape[1], sum(widths)), dtype=dtype)
    for part, columns in zip(features, _columns(found, widths), strict=True):
        columns.addmm_(wide, part.to(dtype), beta=0)
    return found.to(grad.dtype)


def _weight_fake(grad: Tensor, features: list[Tensor]) -> Tensor:
    _check_parts(features, grad)
    return grad.new_empty((grad.shape[1], sum(_widths(features))))


_op = define(
    Op(
        "linear_merger",
        "(Tensor[] features, Tensor weight, Tensor? bias) -> Tensor",
        reference=_reference,
        fake=_fake,
        triton="linear_merger:linear_merger",
        without={"CUDA C++": "Triton suffices, see kernels/linear_merger.py"},
        batched=("features",),
    )
)
_features_op = define(
    Op(
        "linear_merger_backward_features",
        "(Tensor grad, Tensor weight, SymInt[] widths, bool[] wanted) -> Tensor[]",
        reference=_features_reference,
        fake=_features_fake,
        triton="linear_merger:linear_merger_backward_features",
        without={"CUDA C++": "Triton suffices, see kernels/linear_merger.py"},
        backward_of="linear_merger",
        batched=("grad",),
    )
)
_weight_op = define(
    Op(
        "linear_merger_backward_weight",
        "(Tensor grad, Tensor[] features) -> Tensor",
        reference=_weight_reference,
        fake=_weight_fake,
        triton="linear_merger:linear_merger_backward_weight",
        without={"CUDA C++": "Triton suffices, see kernels/linear_merger.py"},
        backward_of="linear_merger",
    )
)


def _setup_context(
    ctx: Any, inputs: tuple[list[Tensor], Tensor, Tensor | None], output: Tensor
) -> None:
    features, weight, _ = inputs
    ctx.widths = _widths(features)
    # An attack through a frozen merger must not hold on to the features: only weight's gradient reads them.
    ctx.save_for_backward(weight, *(features if weight.requires_grad else ()))
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad: Tensor | None
) -> tuple[list[Tensor | None], Tensor | None, Tensor | None]:
    nothing: list[Tensor | None] = [None] * len(ctx.widths)
    if grad is None:
        return nothing, None, None
    weight, *features = ctx.saved_tensors
    wanted, weight_wanted, bias_wanted = ctx.needs_input_grad
    grad_features = nothing
    if any(wanted):
        backward = torch.ops.fastadv.linear_merger_backward_features
        found = iter(backward(grad, weight, ctx.widths, list(wanted)))
        grad_features = [next(found) if asked else None for asked in wanted]
    grad_weight = None
    if weight_wanted:
        grad_weight = torch.ops.fastadv.linear_merger_backward_weight(grad, features)
    return grad_features, grad_weight, grad.sum(0) if bias_wanted else None


register_gradient(_op, _backward, _setup_context)


def linear_merger(features: Sequence[Tensor], weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``w^T [g_1; ...; g_n] + b``: one linear layer over the pooled features of n extractors side by side.

    Source: AFS, equations 1 and 2. The same as ``F.linear(torch.cat(features, 1), weight, bias)`` without
    the concatenation, forward and backward. Half precision is summed over all features in float32 and rounded
    once. Only the gradients of arguments that require one are computed. There is no second derivative. As with
    any matrix product a row's last bits may depend on how many rows are computed with it.

    Args:
        features: n >= 1 tensors [B, d_i], one per extractor; the widths d_i may differ.
        weight: [C, d_1 + ... + d_n], the layout of ``torch.nn.Linear``, in the order of ``features``.
        bias: [C], or None.

    Returns:
        [B, C] in the dtype of the arguments, contiguous.

    Raises:
        TypeError: ``features`` is no sequence, an argument is not floating point, or dtypes differ; unlike
            ``F.linear`` the function does not take part in autocast.
        ValueError: no features, an argument with another number of axes, or sizes or devices that do not fit.
    """
    _check(features, weight, bias)
    return torch.ops.fastadv.linear_merger(list(features), weight, bias)


def _check(features: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> None:
    if not isinstance(features, (list, tuple)):
        raise TypeError(
            f"features must be a list or tuple of tensors, got {type(features).__name__}"
        )
    if not features:
        raise ValueError("features must hold at least one tensor [B, d], got none")
    for i, part in enumerate(features):
        _check_axes(f"features[{i}]", part, "[B, d]", 2)
        _check_kind(f"features[{i}]", part, features[0])
        if part.shape[0] != features[0].shape[0]:
            raise ValueError(
                f"features[{i}] must have the rows of features[0], {features[0].shape[0]}, "
                f"got shape {tuple(part.shape)}"
            )
    _check_axes("weight", weight, "[C, D]", 2)
    _check_kind("weight", weight, features[0])
    widths = _widths(features)
    if weight.shape[1] != sum(widths):
        raise ValueError(
            f"weight must have shape [C, {sum(widths)}] for features of widths {widths}, "
            f"got {tuple(weight.shape)}"
        )
    if bias is not None:
        _check_axes("bias", bias, "[C]", 1)
        _check_kind("bias", bias, features[0])
        if bias.shape[0] != weight.shape[0]:
            raise ValueError(
                f"bias must have shape ({weight.shape[0]},), as weight has that many rows, "
                f"got {tuple(bias.shape)}"
            )


def _check_axes(name: str, value: Tensor, axes: str, count: int) -> None:
    checks.check_float(name, value)
    if value.dim() != count:
        raise ValueError(f"{name} must have axes {axes}, got shape {tuple(value.shape)}")


def _check_kind(name: str, value: Tensor, first: Tensor) -> None:
    if value.dtype != first.dtype:
        raise TypeError(
            f"{name} must have the dtype of features[0], {first.dtype}, got {value.dtype}"
        )
    checks.check_same_device(name, value, "features[0]", first)
