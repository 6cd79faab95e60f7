"""The steps of a program (see `fastadv.engine.cpu_program`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from fastadv.engine.convolution_kernels import Epilogue
from fastadv.engine.copy import AttackCopy
from fastadv.engine.cpu_pass import Pass, as_buffer, is_buffer, is_differentiable, laid_out_like
from fastadv.engine.layers import CopiedConv2d, CopiedLinear, CopiedScaleShift
from fastadv.engine.operands import broadcast_shapes

_OPS = torch.ops.fastadv


class ProgramStep(ABC):
    """One step of a program: it computes ``node`` from ``inputs`` (repeated where used twice).

    Attributes:
        rectifies: the step ends in a ReLU, so that its gradient is masked where its result is 0.
        is_known_to_win: it was never slower than torch's operations in measurements, so it is not timed.
    """

    is_known_to_win = False

    def __init__(self, node: fx.Node, inputs: list[fx.Node], rectifies: bool = False) -> None:
        self.node, self.inputs, self.rectifies = node, inputs, rectifies

    @abstractmethod
    def forward(self, run: Pass) -> None:
        """Compute the node's value."""

    @abstractmethod
    def backward(self, run: Pass) -> None:
        """Pass the node's gradient on to its inputs, in reverse order of `inputs`."""


class ConvStep(ProgramStep):
    """``relu(conv(x) + residual)``, the ReLU and the residual optional."""

    def __init__(
        self, node: fx.Node, conv: CopiedConv2d, x: fx.Node, residual: fx.Node | None, relu: bool
    ) -> None:
        super().__init__(node, [x] if residual is None else [x, residual], relu)
        assert conv.packed is not None
        self._conv, self._packed = conv, conv.packed
        self._x, self._residual = x, residual
        self.is_known_to_win = None not in (conv.packed.forward, conv.packed.backward)

    def forward(self, run: Pass) -> None:
        """Convolve, add and rectify in one pass if our convolution serves, else in torch's passes."""
        dtype = run.memory.dtype
        x, packed = as_buffer(run.values[self._x], dtype), self._packed
        residual = None if self._residual is None else run.values[self._residual]
        shape = packed.result_shape(x)
        if residual is not None and broadcast_shapes(shape, residual.shape) != shape:
            # The addition broadcasts the convolution's result, for example one value per channel over a whole map.
            out = residual + self._convolved(run, x, Epilogue(packed.bias))
            out = as_buffer(out.relu() if self.rectifies else out, dtype)
        else:
            residual = None if residual is None else as_buffer(residual.expand(shape), dtype)
            out = self._convolved(run, x, Epilogue(packed.bias, residual, relu=self.rectifies))
        run.values[self.node] = out

    def _convolved(self, run: Pass, x: Tensor, epilogue: Epilogue) -> Tensor:
        if self._packed.forward is not None:
            return self._packed.forward.run(run.memory, self._packed.result_shape(x), x, epilogue)
        out = self._conv(x)
        out = out if epilogue.add is None else out.add_(epilogue.add)
        return as_buffer(out.relu_() if epilogue.relu else out, run.memory.dtype)

    def backward(self, run: Pass) -> None:
        """The gradient's convolution into the input; the gradient itself into the residual."""
        gradient = as_buffer(run.gradient(self.node), run.memory.dtype)
        if self._residual is not None:
            shape = run.values[self._residual].shape  # smaller if the addition has broadcast it
            run.arrive_tensor(self._residual, gradient.sum_to_size(shape))
            spread = gradient.sum_to_size(self._packed.result_shape(run.values[self._x]))
            gradient = as_buffer(spread, run.memory.dtype)
        x, kernel = run.values[self._x], self._packed.backward
        if kernel is None:
            run.arrive_tensor(self._x, self._conv.input_gradient(gradient, x))
            return

        def emit(add: Tensor | None, mask: Tensor | None) -> Tensor:
            return kernel.run(run.memory, x.shape, gradient, Epilogue(add=add, mask=mask))

        run.arrive(self._x, emit)


class ScaleShiftStep(ProgramStep):
    """``relu(x * scale + shift)`` per channel, the ReLU optional."""

    is_known_to_win = True

    def __init__(self, node: fx.Node, part: CopiedScaleShift, x: fx.Node, relu: bool) -> None:
        super().__init__(node, [x], relu)
        self._part, self._x = part, x
        self._no_shift = torch.zeros_like(part.shift)

    def forward(self, run: Pass) -> None:
        """One pass."""
        x, part = as_buffer(run.values[self._x], run.memory.dtype), self._part
        out = run.memory.take(x.shape)
        _OPS.channel_affine_(out, x, part.scale, part.shift, None, None, self.rectifies)
        run.values[self.node] = out

    def backward(self, run: Pass) -> None:
        """Scale, and add the gradients from other users; a mask needs a pass of its own."""
        gradient = as_buffer(run.gradient(self.node), run.memory.dtype)
        scale = self._part.scale

        def emit(add: Tensor | None, mask: Tensor | None) -> Tensor:
            out = run.memory.take(gradient.shape)
            _OPS.channel_affine_(out, gradient, scale, self._no_shift, add, None, False)
            if mask is not None:
                _OPS.merge_gradients_(out, out, None, mask)
            return out

        run.arrive(self._x, emit)


class PlainStep(ProgramStep):
    """Any other node, as it stands, differentiated by autograd."""

    def __init__(self, node: fx.Node, copy: AttackCopy) -> None:
        super().__init__(node, list(node.all_input_nodes))
        self._module, self._autocast = copy.graph_module, copy.autocast

    def forward(self, run: Pass) -> None:
        """Run the node on leaves of its own, so that its graph ends at its inputs."""
        leaves: dict[fx.Node, Any] = {}
        for source in self.inputs:
            value = run.values[source]
            images = source.op != "get_attr"  # constants need no gradient
            if images and isinstance(value, Tensor) and is_differentiable(value):
                value = value.detach().requires_grad_()
            leaves[source] = value
        with torch.enable_grad(), self._autocast(torch.device("cpu")):
            value = self._call(leaves)
        several = isinstance(value, (tuple, list))
        results = tuple(value) if several else (value,)
        if not any(isinstance(v, Tensor) and v.requires_grad for v in results):
            run.values[self.node] = value
            return
        plain = tuple(v.detach() if isinstance(v, Tensor) else v for v in results)
        run.values[self.node] = plain if several else plain[0]
        inputs = {n: v for n, v in leaves.items() if isinstance(v, Tensor) and v.requires_grad}
        run.tapes[self.node] = (results, inputs)

    def part(self) -> nn.Module:
        """The layer that the node calls."""
        return self._module.get_submodule(str(self.node.target))

    def _call(self, leaves: dict[fx.Node, Any]) -> Any:
        node = self.node
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: leaves[n])
        if node.op == "call_function":
            return node.target(*args, **kwargs)  # type: ignore[operator]
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return self.part()(*args, **kwargs)

    def backward(self, run: Pass) -> None:
        """Autograd through the one node; inputs that carry no gradient are left out."""
        if self.node not in run.tapes:
            for source in reversed(self.inputs):
                run.arrive_nothing(source)
            return
        results, inputs = run.tapes[self.node]
        leaves = list(inputs.values())
        arrived = run.gradients_of_items(self.node)
        values = [results[number] for number in arrived if results[number].requires_grad]
        gradients = [
            laid_out_like(g, results[n]) for n, g in arrived.items() if results[n].requires_grad
        ]
        parts: tuple[Tensor | None, ...] = (None,) * len(leaves)
        if values:
            with torch.enable_grad():
                whole = _Arrived.apply(len(values), *values, *gradients)
            parts = torch.autograd.grad(whole, leaves, allow_unused=True)
        found = dict(zip(inputs, parts, strict=True))
        for source in reversed(self.inputs):
            part = found.get(source)
            if part is None:
                run.arrive_nothing(source)
            else:
                run.arrive_tensor(source, part)


class _Arrived(torch.autograd.Function):
    """A number whose gradients in some tensors are given.

    `torch.autograd.grad` takes such gradients, too, but then it imports torch's symbolic shapes, for half a second
    of the first call in a process.
    """

    @staticmethod
    def forward(ctx: Any, count: int, *values_and_gradients: Tensor) -> Tensor:
        """Zero; first come ``count`` tensors, then their gradients."""
        ctx.gradients = values_and_gradients[count:]
        return torch.zeros((), dtype=torch.float32, device=values_and_gradients[0].device)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients."""
        return (None, *ctx.gradients, *(None for _ in ctx.gradients))


class ItemStep(ProgramStep):
    """One of several results of another step."""

    is_known_to_win = True

    def __init__(self, node: fx.Node, source: fx.Node, number: int) -> None:
        super().__init__(node, [source])
        self._source, self._number = source, number

    def forward(self, run: Pass) -> None:
        """Take the result out."""
        run.values[self.node] = run.values[self._source][self._number]

    def backward(self, run: Pass) -> None:
        """Hand its gradient back."""
        run.arrive_item(self._source, self._number, run.gradient(self.node))


class PoolStep(PlainStep):
    """The mean over height and width of a map of the program's dtype, in float32; autograd has the rest.

    Args:
        whole: whether the node pools images of this shape as a whole.
        flat: the result is [B, C], not [B, C, 1, 1].
    """

    is_known_to_win = True

    def __init__(
        self, node: fx.Node, copy: AttackCopy, whole: Callable[[torch.Size], bool], flat: bool
    ) -> None:
        super().__init__(node, copy)
        (self._x,), self._whole, self._flat = self.inputs, whole, flat

    def forward(self, run: Pass) -> None:
        """Sum the pixels."""
        x = run.values[self._x]
        if not (is_buffer(x, run.memory.dtype) and self._whole(x.shape)):
            super().forward(run)
            return
        means = torch.empty(x.shape[:2], dtype=torch.float32, device=x.device)
        _OPS.pixel_means_(means, x)
        run.values[self.node] = means if self._flat else means[:, :, None, None]

    def backward(self, run: Pass) -> None:
        """Spread the gradient over the pixels."""
        if self.node in run.tapes:
            super().backward(run)
            return
        shape = run.values[self._x].shape
        means = run.gradient(self.node).reshape(shape[:2]).float().contiguous()

        def emit(add: Tensor | None, mask: Tensor | None) -> Tensor:
            out = run.memory.take(shape)
            _OPS.spread_pixel_means_(out, means, add, mask)
            return out

        run.arrive(self._x, emit)


class LinearStep(ProgramStep):
    """A linear layer in float32: any of a float32 copy, and one too small for bfloat16 to pay, as classifiers."""

    is_known_to_win = True

    def __init__(self, node: fx.Node, part: CopiedLinear, x: fx.Node) -> None:
        super().__init__(node, [x])
        self._part, self._x = part, x

    def forward(self, run: Pass) -> None:
        """One matrix product."""
        run.values[self.node] = self._part(run.values[self._x])

    def backward(self, run: Pass) -> None:
        """One matrix product of the gradient."""
        weight = self._part.weight
        run.arrive_tensor(self._x, run.gradient(self.node).to(weight.dtype) @ weight)
