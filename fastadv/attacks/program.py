"""Programs: an attack copy's forward and input-gradient pass on the CPU, as a fixed list of fused steps.

Autograd would run a convolution, an addition and a ReLU as three passes over memory forward and three backward,
and allocate every result anew. A program runs each such group as one step in both directions:

* forward: ``relu(conv(x) + bias + residual)`` in the convolution's own last pass;
* backward: the gradient's convolution adds what arrived from other branches and applies the ReLU mask of the
  activation it flows into, again in its last pass;
* results go to memory that the program keeps between calls.

What is not such a group (pooling, the classifier, the model's own arithmetic) runs as it stands, one node at a
time, under autograd. So every traced model has a program; convolutional ones are mostly fused.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fastadv.attacks.copy import AttackCopy, CopiedConv2d, CopiedScaleShift
from fastadv.attacks.tracing import Untraceable

_RELUS = (F.relu, torch.relu)
_ADDS = (operator.add, torch.add)
_OPS = torch.ops.fastadv


class Memory:
    """Channels-last bfloat16 buffers, handed out during a pass and all taken back at its end."""

    def __init__(self) -> None:
        self._free: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
        self._taken: list[tuple[tuple[int, ...], Tensor]] = []

    def take(self, shape: torch.Size | tuple[int, ...]) -> Tensor:
        """A buffer with arbitrary contents."""
        key = tuple(shape)
        free = self._free[key]
        buffer = free.pop() if free else _new_buffer(key)
        self._taken.append((key, buffer))
        return buffer

    def reset(self, batch: int) -> None:
        """Take every buffer back; drop those of other batch sizes."""
        for key, buffer in self._taken:
            self._free[key].append(buffer)
        self._taken.clear()
        for key in [key for key in self._free if key[0] != batch]:
            del self._free[key]


def _new_buffer(shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, memory_format=torch.channels_last)


Emit = Callable[[Tensor, Tensor | None, Tensor | None], None]  # (out, add, mask): writes a gradient


class Pass:
    """One forward and backward pass: activations and gradients by node.

    Gradients arrive at a node one user at a time, in reverse order. The last to arrive writes their sum, and
    where the node is the result of a fused ReLU also masks it; users' backward steps therefore always find
    the gradient before the ReLU.
    """

    def __init__(self, memory: Memory, masked: set[fx.Node], uses: dict[fx.Node, int]) -> None:
        self.memory = memory
        self.values: dict[fx.Node, Any] = {}
        self.tapes: dict[fx.Node, tuple[Tensor, dict[fx.Node, Tensor]]] = {}
        self._gradients: dict[fx.Node, Tensor] = {}
        self._masked = masked
        self._remaining = dict(uses)

    def gradient(self, node: fx.Node) -> Tensor:
        """The whole gradient at a node."""
        return self._gradients[node]

    def has_gradient(self, node: fx.Node) -> bool:
        """Whether any contribution has arrived at a node."""
        return node in self._gradients

    def arrive_nothing(self, node: fx.Node) -> None:
        """Note that a user of a node, such as one that reads its size, passes no gradient on."""
        mask = self._mask(node)
        if mask is not None and node in self._gradients:
            self._gradients[node] = _merged(self.memory, self._gradients[node], None, mask)

    def arrive(self, node: fx.Node, shape: torch.Size, emit: Emit) -> None:
        """Add a contribution that a fused step can write together with the sum and the mask."""
        out = self.memory.take(shape)
        emit(out, self._gradients.get(node), self._mask(node))
        self._gradients[node] = out

    def arrive_tensor(self, node: fx.Node, gradient: Tensor) -> None:
        """Add a contribution that exists already; it is not written to."""
        mask, before = self._mask(node), self._gradients.get(node)
        self._gradients[node] = _merged(self.memory, gradient, before, mask)

    def _mask(self, node: fx.Node) -> Tensor | None:
        """The activation whose sign masks the gradient, once its last contribution is here."""
        self._remaining[node] -= 1
        last = self._remaining[node] == 0
        return self.values[node] if last and node in self._masked else None


def _merged(memory: Memory, new: Tensor, before: Tensor | None, mask: Tensor | None) -> Tensor:
    """The sum of two gradients, masked; ``new`` itself where there is nothing to do."""
    if before is None and mask is None:
        return new
    operands = [t for t in (new, before, mask) if t is not None]
    if all(_is_buffer(t) for t in operands):
        out = memory.take(new.shape)
        _OPS.merge_gradients_(out, new, before, mask)
        return out
    total = new if before is None else new + before
    return total if mask is None else total * (mask > 0)


def _is_buffer(t: Tensor) -> bool:
    return (
        t.dtype == torch.bfloat16
        and t.dim() == 4
        and t.is_contiguous(memory_format=torch.channels_last)
    )


def _as_buffer(t: Tensor) -> Tensor:
    return t.to(torch.bfloat16).contiguous(memory_format=torch.channels_last)


class Step(ABC):
    """One step of a program: what computes ``node`` from ``inputs`` (repeated where used twice).

    Attributes:
        rectifies: the step ends in a ReLU, so that its gradient is masked where its result is 0.
    """

    def __init__(self, node: fx.Node, inputs: list[fx.Node], rectifies: bool = False) -> None:
        self.node, self.inputs, self.rectifies = node, inputs, rectifies

    @abstractmethod
    def forward(self, run: Pass) -> None:
        """Compute the node's value."""

    @abstractmethod
    def backward(self, run: Pass) -> None:
        """Pass the node's gradient on to its inputs, in reverse order of `inputs`."""


class ConvStep(Step):
    """``relu(conv(x) + residual)``, the ReLU and the residual optional."""

    def __init__(
        self, node: fx.Node, conv: CopiedConv2d, x: fx.Node, residual: fx.Node | None, relu: bool
    ) -> None:
        super().__init__(node, [x] if residual is None else [x, residual], relu)
        assert conv.packed is not None
        self._conv, self._packed = conv, conv.packed
        self._x, self._residual = x, residual

    def forward(self, run: Pass) -> None:
        """Convolve, add and rectify in one pass if our convolution serves, else in torch's passes."""
        x, packed = _as_buffer(run.values[self._x]), self._packed
        residual = None if self._residual is None else run.values[self._residual]
        if packed.forward is not None:
            out = run.memory.take(packed.result_shape(x))
            residual = None if residual is None else _as_buffer(residual.expand(out.shape))
            packed.forward.run(out, x, packed.bias, residual, None, self.rectifies)
        else:
            out = self._conv(x)
            out = out if residual is None else out.add_(residual)
            out = _as_buffer(out.relu_() if self.rectifies else out)
        run.values[self.node] = out

    def backward(self, run: Pass) -> None:
        """The gradient's convolution into the input; the gradient itself into the residual."""
        gradient = _as_buffer(run.gradient(self.node))
        if self._residual is not None:
            shape = run.values[self._residual].shape  # smaller where the addition broadcast it
            run.arrive_tensor(self._residual, gradient.sum_to_size(shape))
        x, kernel = run.values[self._x], self._packed.backward
        if kernel is None:
            run.arrive_tensor(self._x, self._conv.input_gradient(gradient, x))
            return

        def emit(out: Tensor, add: Tensor | None, mask: Tensor | None) -> None:
            add = None if add is None else _as_buffer(add)
            mask = None if mask is None else _as_buffer(mask)
            kernel.run(out, gradient, None, add, mask, False)

        run.arrive(self._x, x.shape, emit)


class ScaleShiftStep(Step):
    """``relu(x * scale + shift)`` per channel, the ReLU optional."""

    def __init__(self, node: fx.Node, part: CopiedScaleShift, x: fx.Node, relu: bool) -> None:
        super().__init__(node, [x], relu)
        self._part, self._x = part, x
        self._no_shift = torch.zeros_like(part.shift)

    def forward(self, run: Pass) -> None:
        """One pass."""
        x, part = _as_buffer(run.values[self._x]), self._part
        out = run.memory.take(x.shape)
        _OPS.channel_affine_(out, x, part.scale, part.shift, None, None, self.rectifies)
        run.values[self.node] = out

    def backward(self, run: Pass) -> None:
        """Scale, and add what came from other users; a mask needs a pass of its own."""
        gradient, scale = _as_buffer(run.gradient(self.node)), self._part.scale

        def emit(out: Tensor, add: Tensor | None, mask: Tensor | None) -> None:
            add = None if add is None else _as_buffer(add)
            _OPS.channel_affine_(out, gradient, scale, self._no_shift, add, None, False)
            if mask is not None:
                _OPS.merge_gradients_(out, out, None, _as_buffer(mask))

        run.arrive(self._x, gradient.shape, emit)


class PlainStep(Step):
    """Any other node, as it stands, differentiated by autograd."""

    def __init__(self, node: fx.Node, module: fx.GraphModule) -> None:
        super().__init__(node, list(node.all_input_nodes))
        self._module = module

    def forward(self, run: Pass) -> None:
        """Run the node on leaves of its own, so that its graph ends at its inputs."""
        leaves: dict[fx.Node, Any] = {}
        for source in self.inputs:
            value = run.values[source]
            if isinstance(value, Tensor) and value.is_floating_point():
                value = value.detach().requires_grad_()
            leaves[source] = value
        with torch.enable_grad():
            value = self._call(leaves)
        if isinstance(value, (tuple, list)) and any(isinstance(v, Tensor) for v in value):
            raise Untraceable(f"its {self.node.name} gives several tensors")
        run.values[self.node] = value
        if isinstance(value, Tensor) and value.requires_grad:
            run.values[self.node] = value.detach()
            inputs = {n: v for n, v in leaves.items() if isinstance(v, Tensor) and v.requires_grad}
            run.tapes[self.node] = (value, inputs)

    def _call(self, leaves: dict[fx.Node, Any]) -> Any:
        node = self.node
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: leaves[n])
        if node.op == "call_function":
            return node.target(*args, **kwargs)  # type: ignore[operator]
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return self._module.get_submodule(str(node.target))(*args, **kwargs)

    def backward(self, run: Pass) -> None:
        """Autograd through the one node; inputs that carry no gradient get none."""
        if self.node not in run.tapes:
            for source in reversed(self.inputs):
                run.arrive_nothing(source)
            return
        value, inputs = run.tapes[self.node]
        leaves = list(inputs.values())
        gradient = run.gradient(self.node).to(value.dtype)
        parts = torch.autograd.grad(value, leaves, gradient, allow_unused=True)
        found = dict(zip(inputs, parts, strict=True))
        for source in reversed(self.inputs):
            part = found.get(source)
            if part is None:
                run.arrive_nothing(source)
            else:
                run.arrive_tensor(source, part)


class Program:
    """An attack copy's passes on the CPU.

    What a pass returns lies in the program's memory and is valid until the next pass.

    Args:
        copy: made with ``pack=True``.
    """

    def __init__(self, copy: AttackCopy) -> None:
        module = copy.graph_module
        nodes = list(module.graph.nodes)
        self._module = module
        self._copy_autocast = copy.autocast
        self._memory = Memory()
        self._steps = fused_steps(module)
        self._constants = {node: str(node.target) for node in nodes if node.op == "get_attr"}
        self._input = next(node for node in nodes if node.op == "placeholder")
        self._output = next(node for node in nodes if node.op == "output").args[0]
        self._masked = {step.node for step in self._steps if step.rectifies}
        self._uses: dict[fx.Node, int] = defaultdict(int)
        for node in (self._output, *(source for step in self._steps for source in step.inputs)):
            self._uses[node] += 1

    def forward(self, x: Tensor) -> tuple[Any, Pass]:
        """Logits in the copy's dtype, and the pass for `backward` to go on with."""
        self._memory.reset(x.shape[0])
        run = Pass(self._memory, self._masked, self._uses)
        run.values[self._input] = x
        for node, name in self._constants.items():
            run.values[node] = getattr(self._module, name)
        with torch.no_grad(), self._copy_autocast(x.device):
            for step in self._steps:
                step.forward(run)
        return run.values[self._output], run

    def backward(self, run: Pass, logits_gradient: Tensor) -> Tensor | None:
        """The gradient in the images, given the one in the logits; None if the logits are detached."""
        with torch.no_grad():
            run.arrive_tensor(self._output, logits_gradient)
            for step in reversed(self._steps):
                if run.has_gradient(step.node):
                    step.backward(run)
                    continue
                for source in reversed(step.inputs):
                    run.arrive_nothing(source)
        return run.gradient(self._input) if run.has_gradient(self._input) else None


def fused_steps(module: fx.GraphModule) -> list[Step]:
    """Cover a graph with steps, as few as the fused ones allow, in an order in which they can run."""
    nodes = [node for node in module.graph.nodes if node.op.startswith("call")]
    order = {node: place for place, node in enumerate(nodes)}
    parts = {
        node: module.get_submodule(str(node.target)) for node in nodes if node.op == "call_module"
    }
    covered: set[fx.Node] = set()
    steps: list[Step] = []
    # Our own convolution adds a residual for nothing, so it takes an addition before any other may.
    convs = [node for node in nodes if isinstance(parts.get(node), CopiedConv2d)]
    for node in sorted(convs, key=lambda n: not _is_packed(parts[n])):
        steps.append(_conv_step(node, parts, covered))
    for node in nodes:
        part = parts.get(node)
        if isinstance(part, CopiedScaleShift):
            relu = _only_user(node, lambda user: _is_relu(user, parts))
            covered.update({node, relu or node})
            steps.append(ScaleShiftStep(relu or node, part, _input_of(node), relu is not None))
    steps.extend(PlainStep(node, module) for node in nodes if node not in covered)
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
