"""Which nodes of a copy's graph the steps of `fastadv.engine.cpu_steps_rows` can take."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fastadv.engine import cpu_channels
from fastadv.engine import cpu_convolution as convolution
from fastadv.engine.copy import AttackCopy
from fastadv.engine.cpu_steps import ProgramStep
from fastadv.engine.cpu_steps_attention import AttentionStep, UnbindStep
from fastadv.engine.cpu_steps_dense import dense_steps
from fastadv.engine.cpu_steps_rows import (
    ActivationStep,
    AliasStep,
    GateStep,
    LayerNormStep,
    PermuteStep,
    ReshapeStep,
    RowsLinearStep,
    SumStep,
)
from fastadv.engine.layers import CopiedFunction, CopiedLinear

_ADDS = (operator.add, torch.add, "add")
_PRODUCTS = (operator.mul, torch.mul, "mul")
_PERMUTES = (torch.permute, "permute")
_RESHAPES = (torch.flatten, torch.reshape, torch.unsqueeze, "flatten", "reshape", "unsqueeze")
_ACTIVATIONS: dict[Any, str] = {
    F.silu: "silu",
    F.hardswish: "hardswish",
    F.hardsigmoid: "hardsigmoid",
    F.relu6: "relu6",
    F.sigmoid: "sigmoid",
    torch.sigmoid: "sigmoid",
    "sigmoid": "sigmoid",
}
_ATTENTION = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale")
_NORM = ("input", "normalized_shape", "weight", "bias", "eps")


def rows_steps(
    copy: AttackCopy,
    nodes: list[fx.Node],
    parts: dict[fx.Node, nn.Module],
    covered: set[fx.Node],
    relu_behind: Callable[[fx.Node], fx.Node | None],
) -> list[ProgramStep]:
    """Steps for nodes that are not covered yet; they are covered then.

    In float32 linear layers and attention have none. There are no steps where the processor has no kernel.

    Args:
        copy: whose graph it is.
        nodes: of the graph.
        parts: the layers that nodes call.
        covered: nodes that have a step.
        relu_behind: the ReLU that alone uses a node.
    """
    if not _has_kernels(copy):
        return []
    steps = dense_steps(nodes, parts, covered, relu_behind)
    for node in nodes:
        if node in covered:
            continue
        part = parts.get(node)
        if copy.is_narrow and isinstance(part, CopiedLinear):
            steps.extend(_linear_steps(node, part, copy, covered))
            covered.add(node)
            continue
        step = (
            _norm_step(node, part, copy)
            or _activation_step(node, copy)
            or _view_step(node, copy)
            or _narrow_step(node, part, copy)
            or _pair_step(node, copy)
        )
        if step is not None:
            steps.append(step)
            covered.add(node)
    return steps


def _has_kernels(copy: AttackCopy) -> bool:
    """Whether this processor has the passes over rows in the dtype of a copy."""
    if copy.is_narrow:
        return cpu_channels.available() and convolution.onednn_available()
    return convolution.available() and copy.dtype == torch.float32


def _narrow_step(node: fx.Node, part: nn.Module | None, copy: AttackCopy) -> ProgramStep | None:
    """A step that there is for bfloat16 alone."""
    if not copy.is_narrow:
        return None
    return _attention_step(node, part, copy) or _unbind_step(node, copy)


def _linear_steps(
    node: fx.Node, part: CopiedLinear, copy: AttackCopy, covered: set[fx.Node]
) -> list[ProgramStep]:
    """The layer, and with it the constant that alone multiplies its result, also behind a permutation."""
    (x,) = node.all_input_nodes
    end, axis = node, -1
    user = _only_user(end)
    if user is not None and _is_call(user, _PERMUTES) and _order(user) == (0, 3, 1, 2):
        end, axis = user, 1
        user = _only_user(end)
    if user is None or user in covered or not _is_call(user, _PRODUCTS) or len(user.args) != 2:
        return [RowsLinearStep(node, part, x)]
    scales = [a for a in user.args if a is not end]
    scale = scales[0] if len(scales) == 1 and not user.kwargs else None
    if not (isinstance(scale, fx.Node) and scale.op == "get_attr"):
        return [RowsLinearStep(node, part, x)]
    values = getattr(copy.graph_module, str(scale.target))
    if not _is_per_channel(values, part.weight.shape[0], axis):
        return [RowsLinearStep(node, part, x)]
    covered.add(user)
    return [RowsLinearStep(node, part, x, scale), AliasStep(user, end)]


def _is_per_channel(values: Tensor, channels: int, axis: int) -> bool:
    """Whether a constant has one number for each place of one axis, the first of four counted or the last."""
    behind = 0 if axis == -1 else 2
    shape = list(values.shape)
    if values.numel() != channels or len(shape) < behind + 1 or len(shape) > behind + 1 + 3:
        return False
    return shape[len(shape) - 1 - behind] == channels and values.is_floating_point()


def _norm_step(node: fx.Node, part: nn.Module | None, copy: AttackCopy) -> ProgramStep | None:
    function = part.function if isinstance(part, CopiedFunction) else node.target
    if function not in (F.layer_norm, torch.layer_norm):
        return None
    call = {**dict(zip(_NORM, node.args, strict=False)), **node.kwargs}
    buffers: dict[str, str] = {}
    if isinstance(part, CopiedFunction):
        for number, where in enumerate(part.names):
            name = _NORM[where] if isinstance(where, int) and where < len(_NORM) else str(where)
            buffers[name] = f"weight{number}"
            if part.get_buffer(f"weight{number}").dtype != torch.float32:
                return None
    elif call.get("weight") is not None or call.get("bias") is not None:
        return None
    x, shape, eps = call.get("input"), call.get("normalized_shape"), call.get("eps", 1e-5)
    if not isinstance(x, fx.Node) or not isinstance(shape, (tuple, list)) or len(shape) != 1:
        return None
    if (
        not isinstance(shape[0], int)
        or not isinstance(eps, float)
        or not buffers.keys() <= {"weight", "bias"}
    ):
        return None
    weight, bias = buffers.get("weight"), buffers.get("bias")
    return LayerNormStep(node, copy, x, shape[0], weight, bias, eps)


def _activation_step(node: fx.Node, copy: AttackCopy) -> ProgramStep | None:
    if node.op == "call_module" or len(node.all_input_nodes) != 1:
        return None
    kind = _ACTIVATIONS.get(node.target)
    others = (*node.args[1:], *(v for k, v in node.kwargs.items() if k not in ("input", "inplace")))
    if node.target is F.gelu:
        approximate = others[0] if others else "none"
        kind = {"none": "gelu", "tanh": "gelu_tanh"}.get(str(approximate))
    elif node.target is F.hardtanh:
        limits: dict[str, Any] = {"min_val": -1.0, "max_val": 1.0}
        limits |= dict(zip(limits, node.args[1:3], strict=False))
        limits |= {k: v for k, v in node.kwargs.items() if k in limits}
        kind = "relu6" if tuple(limits.values()) == (0, 6) else None
    elif any(other is not False for other in others):  # such as an argument `inplace`
        kind = None
    if kind is None:
        return None
    return ActivationStep(node, copy, cpu_channels.ACTIVATIONS.index(kind))


def _view_step(node: fx.Node, copy: AttackCopy) -> ProgramStep | None:
    if node.op == "call_module" or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    x = node.args[0]
    if _is_call(node, _PERMUTES):
        order = _order(node)
        if order is None:
            return None
        return PermuteStep(node, copy, x, tuple(order.index(axis) for axis in range(len(order))))
    if _is_call(node, _RESHAPES) and node.all_input_nodes.count(x) == 1:
        return ReshapeStep(node, copy, x)
    return None


def _order(node: fx.Node) -> tuple[int, ...] | None:
    """The axes of a permutation, as numbers that are not negative."""
    axes: Any = node.args[1:] or (node.kwargs.get("dims"),)
    if len(axes) == 1 and isinstance(axes[0], (tuple, list)):
        axes = axes[0]
    if not all(isinstance(axis, int) for axis in axes):
        return None
    order = tuple(axis % len(axes) for axis in axes)
    return order if sorted(order) == list(range(len(order))) else None


def _attention_step(node: fx.Node, part: nn.Module | None, copy: AttackCopy) -> ProgramStep | None:
    layer = part if isinstance(part, CopiedFunction) else None
    if (layer.function if layer else node.target) is not F.scaled_dot_product_attention:
        return None
    call = {**dict(zip(_ATTENTION, node.args, strict=False)), **node.kwargs}
    allowed = {"dropout_p": 0.0, "is_causal": False, "scale": None}
    three = [call.pop(name, None) for name in ("query", "key", "value")]
    mask: Any = call.pop("attn_mask", None)
    if any(k not in allowed or v != allowed[k] for k, v in call.items()):
        return None
    if not all(isinstance(t, fx.Node) for t in three) or len(set(three)) != 3 or mask in three:
        return None
    if layer:
        if [_ATTENTION[n] if isinstance(n, int) else n for n in layer.names] != ["attn_mask"]:
            return None
        mask = "weight0"
    elif mask is not None and _may_have_gradient(mask):
        return None
    return AttentionStep(node, copy, tuple(three), mask)  # type: ignore[arg-type]


def _may_have_gradient(node: Any) -> bool:
    """Whether a value depends on the images other than on their sizes."""
    if not isinstance(node, fx.Node) or node.op == "placeholder":
        return True
    if node.target == "size" or (node.target is getattr and node.args[1] == "shape"):
        return False
    return any(_may_have_gradient(source) for source in node.all_input_nodes)


def _unbind_step(node: fx.Node, copy: AttackCopy) -> ProgramStep | None:
    if not _is_call(node, (torch.unbind, "unbind")) or len(node.all_input_nodes) != 1:
        return None
    axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    return UnbindStep(node, copy, axis) if isinstance(axis, int) else None


def _pair_step(node: fx.Node, copy: AttackCopy) -> ProgramStep | None:
    """A sum or product of two different results of the network."""
    is_product = _is_call(node, _PRODUCTS) and _has_two_results(node)
    return GateStep(node, copy) if is_product else _sum_step(node, copy)


def _sum_step(node: fx.Node, copy: AttackCopy) -> ProgramStep | None:
    """A sum of two different results of the network."""
    return SumStep(node, copy) if _is_call(node, _ADDS) and _has_two_results(node) else None


def _has_two_results(node: fx.Node) -> bool:
    operands = [a for a in node.args if isinstance(a, fx.Node) and a.op != "get_attr"]
    two = len(node.args) == len(operands) == 2 and operands[0] is not operands[1]
    return two and not node.kwargs


def _only_user(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def _is_call(node: fx.Node, targets: tuple[str | Callable[..., Any], ...]) -> bool:
    return node.op in ("call_function", "call_method") and node.target in targets
