"""Programs: an attack copy's forward and input-gradient pass on the CPU, as a fixed list of fused steps.

Autograd would run a convolution, an addition and a ReLU as three passes over memory forward and three backward,
and allocate every result anew. A program runs each such group as one step in both directions:

* forward: ``relu(conv(x) + bias + residual)`` in the convolution's own last pass;
* backward: the gradient's convolution adds the gradients from other branches and applies the ReLU mask of the
  activation it flows into, again in its last pass;
* results go to memory that the program keeps between calls.

Global average pooling and small classifiers are steps of their own, in float32. In a float32 program so are all
linear layers, sums and views. Everything else (other layers, the model's own arithmetic) runs as it stands, one
node at a time, under autograd. So every traced model has a program; convolutional ones are mostly fused.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fastadv.engine.buffer_pool import Memory
from fastadv.engine.copy import AttackCopy
from fastadv.engine.cpu_pass import Pass
from fastadv.engine.cpu_recognition import rows_steps
from fastadv.engine.cpu_steps import (
    ConvStep,
    ItemStep,
    LinearStep,
    PlainStep,
    PoolStep,
    ProgramStep,
    ScaleShiftStep,
)
from fastadv.engine.layers import CopiedConv2d, CopiedLinear, CopiedScaleShift
from fastadv.engine.recording import item

_RELUS = (F.relu, torch.relu)
_ADDS = (operator.add, torch.add)


class Program:
    """An attack copy's passes on the CPU.

    The result of a pass lies in the program's memory and is valid until the next pass.

    Args:
        copy: made with ``pack=True``.
    """

    def __init__(self, copy: AttackCopy) -> None:
        module = copy.graph_module
        nodes = list(module.graph.nodes)
        self._module = module
        self._memory = Memory(copy.dtype)
        self._steps = fused_steps(copy)
        self._constants = {node: str(node.target) for node in nodes if node.op == "get_attr"}
        self._input = next(node for node in nodes if node.op == "placeholder")
        self._output = next(node for node in nodes if node.op == "output").args[0]
        self._masked = {step.node for step in self._steps if step.rectifies}
        self._uses: dict[fx.Node, int] = defaultdict(int)
        for node in (self._output, *(source for step in self._steps for source in step.inputs)):
            self._uses[node] += 1

    @property
    def steps(self) -> Sequence[ProgramStep]:
        """In the order in which they run forward."""
        return self._steps

    @property
    def memory(self) -> Memory:
        """The buffers that are kept between passes."""
        return self._memory

    def release(self) -> None:
        """Let go of the memory kept between passes."""
        self._memory = Memory(self._memory.dtype)

    def forward(self, x: Tensor) -> tuple[Any, Pass]:
        """Logits in the copy's dtype, and the pass for `backward` to go on with."""
        self._memory.reset(x.shape[0])
        run = Pass(self._memory, self._masked, self._uses)
        run.values[self._input] = x
        for node, name in self._constants.items():
            run.values[node] = getattr(self._module, name)
        with torch.no_grad():
            for step in self._steps:
                step.forward(run)
        return run.values[self._output], run

    def backward(self, run: Pass, logits_gradient: Tensor) -> Tensor | None:
        """The gradient in the images, given the one in the logits; None if the logits are detached."""
        self._memory.begin_backward()
        with torch.no_grad():
            run.arrive_tensor(self._output, logits_gradient)
            for step in reversed(self._steps):
                if run.has_gradient(step.node):
                    step.backward(run)
                    run.forget(step.node)
                    continue
                for source in reversed(step.inputs):
                    run.arrive_nothing(source)
        return run.gradient(self._input) if run.has_gradient(self._input) else None


def fused_steps(copy: AttackCopy) -> list[ProgramStep]:
    """Cover a copy's graph with steps, as few as the fused ones allow, in an order in which they can run."""
    module = copy.graph_module
    nodes = [node for node in module.graph.nodes if node.op.startswith("call")]
    order = {node: place for place, node in enumerate(nodes)}
    parts = {
        node: module.get_submodule(str(node.target)) for node in nodes if node.op == "call_module"
    }
    covered: set[fx.Node] = set()
    steps: list[ProgramStep] = []

    def relu_behind(node: fx.Node) -> fx.Node | None:
        return _only_user(node, lambda user: _is_relu(user, parts))

    # Our own convolution adds a residual for nothing, so it takes an addition before any other may.
    convs = [node for node in nodes if isinstance(parts.get(node), CopiedConv2d)]
    for node in sorted(convs, key=lambda n: not _is_packed(parts[n])):
        steps.append(_conv_step(node, parts, covered))
    steps.extend(rows_steps(copy, nodes, parts, covered, relu_behind))
    for node in nodes:
        if node in covered:
            continue
        part = parts.get(node)
        if isinstance(part, CopiedScaleShift):
            relu = relu_behind(node)
            covered.update({node, relu or node})
            steps.append(ScaleShiftStep(relu or node, part, _input_of(node), relu is not None))
        elif isinstance(part, CopiedLinear) and (part.small or copy.dtype == torch.float32):
            covered.add(node)
            steps.append(LinearStep(node, part, _input_of(node)))
        elif node.target is item:
            covered.add(node)
            source, number = node.args
            assert isinstance(source, fx.Node) and isinstance(number, int)
            steps.append(ItemStep(node, source, number))
        elif (pooling := _pooling(node, parts)) is not None:
            covered.add(node)
            steps.append(PoolStep(node, copy, *pooling))
    steps.extend(PlainStep(node, copy) for node in nodes if node not in covered)
    return sorted(steps, key=lambda step: order[step.node])


def _conv_step(node: fx.Node, parts: dict[fx.Node, nn.Module], covered: set[fx.Node]) -> ConvStep:
    conv = parts[node]
    assert isinstance(conv, CopiedConv2d)
    end, residual = node, None
    addition = _only_user(end, lambda user: _is_addition(user) and user not in covered)
    if addition is not None:
        (residual,) = (source for source in addition.all_input_nodes if source is not node)
        end = addition
    relu = _only_user(end, lambda user: _is_relu(user, parts))
    covered.update({node, end, relu or end})
    return ConvStep(relu or end, conv, _input_of(node), residual, relu is not None)


def _is_packed(part: nn.Module) -> bool:
    packed = part.packed if isinstance(part, CopiedConv2d) else None
    return packed is not None and packed.forward is not None


def _input_of(node: fx.Node) -> fx.Node:
    (source,) = node.all_input_nodes
    return source


def _only_user(node: fx.Node, wanted: Callable[[fx.Node], bool]) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 and wanted(users[0]) else None


def _is_relu(node: fx.Node, parts: dict[fx.Node, nn.Module]) -> bool:
    if node.op == "call_method":
        return node.target == "relu"
    return node.target in _RELUS if node.op == "call_function" else type(parts[node]) is nn.ReLU


def _is_addition(node: fx.Node) -> bool:
    """Whether a node adds two different results, neither of them a number or a constant of the model."""
    is_add = node.op == "call_function" and node.target in _ADDS
    is_add = is_add or (node.op == "call_method" and node.target == "add")
    if not is_add or node.kwargs or len(node.args) != 2 or node.args[0] is node.args[1]:
        return False
    return all(isinstance(a, fx.Node) and a.op != "get_attr" for a in node.args)


def _pooling(
    node: fx.Node, parts: dict[fx.Node, nn.Module]
) -> tuple[Callable[[torch.Size], bool], bool] | None:
    """The arguments of `PoolStep` for a node, if it may be a mean over height and width."""
    part = parts.get(node)
    if len(node.all_input_nodes) != 1:
        return None
    if type(part) is nn.AdaptiveAvgPool2d or node.target is F.adaptive_avg_pool2d:
        size = part.output_size if part is not None else _argument(node, 1, "output_size")
        return (lambda shape: True, False) if _pair(size) == (1, 1) else None
    if node.target is F.avg_pool2d and len(node.args) + len(node.kwargs) == 2:
        kernel = _pair(_argument(node, 1, "kernel_size"))
        return lambda shape: tuple(shape[2:]) == kernel, False
    if node.target in ("mean", torch.mean) and node.kwargs.keys() <= {"input", "dim", "keepdim"}:
        axes, keepdim = _argument(node, 1, "dim"), _argument(node, 2, "keepdim")
        if isinstance(axes, (tuple, list)) and sorted(axes) in ([2, 3], [-2, -1]):
            return lambda shape: True, not keepdim
    return None


def _argument(node: fx.Node, place: int, name: str) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name)


def _pair(size: Any) -> Any:
    return tuple(size) if isinstance(size, (tuple, list)) else (size, size)
