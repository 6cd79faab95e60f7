"""Steps of a program on rows of channels: linear layers, LayerNorm, activations, sums, and views.

Such steps are for bfloat16 on processors with AVX512-BF16. All but linear layers are for float32 on any processor,
too. Where an input is not of the kind that a step serves, it runs as a `PlainStep` does.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from fastadv.engine.buffer_pool import Memory
from fastadv.engine.copy import AttackCopy
from fastadv.engine.cpu_pass import Pass, laid_out_like
from fastadv.engine.cpu_steps import PlainStep, ProgramStep
from fastadv.engine.layers import CopiedLinear
from fastadv.engine.operator_calls import unrecorded

_OPS = torch.ops.fastadv


def is_narrow(value: object) -> bool:
    """Whether a value is a tensor of bfloat16."""
    return isinstance(value, Tensor) and value.dtype == torch.bfloat16


def is_rounded(value: object) -> bool:
    """Whether a value is a tensor of bfloat16, or of float32, which a linear layer would round to it."""
    return isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float32)


def is_dense(t: Tensor) -> bool:
    """Whether a tensor's elements fill its memory, in the order of its axes or channels-last."""
    last = torch.channels_last
    return t.is_contiguous() or (t.dim() == 4 and t.is_contiguous(memory_format=last))


def take_like(memory: Memory, t: Tensor) -> Tensor:
    """A buffer with the shape and strides of a dense tensor."""
    if t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last):
        taken = memory.take(t.shape)
    elif t.dim() == 4:
        taken = memory.take((t.shape[0], t.shape[3], *t.shape[1:3])).permute(0, 2, 3, 1)
    elif t.dim() == 3:
        taken = memory.take((t.shape[0], t.shape[2], t.shape[1], 1)).permute(0, 2, 3, 1)[:, :, 0]
    else:
        return torch.empty_like(t)
    # An axis of one element may have any stride.
    return taken if taken.stride() == t.stride() else taken.as_strided(t.shape, t.stride())


class ActivationStep(PlainStep):
    """An activation in one pass forward and one backward; only its input is kept.

    Args:
        kind: its place in `fastadv.engine.cpu_channels.ACTIVATIONS`.
    """

    def __init__(self, node: fx.Node, copy: AttackCopy, kind: int) -> None:
        super().__init__(node, copy)
        (self._x,), self._kind = self.inputs, kind

    def forward(self, run: Pass) -> None:
        """One pass."""
        x = run.values[self._x]
        if not (isinstance(x, Tensor) and x.dtype == run.memory.dtype and is_dense(x)):
            super().forward(run)
            return
        out = take_like(run.memory, x)
        _OPS.activation_(out, x, self._kind)
        run.values[self.node] = out

    def backward(self, run: Pass) -> None:
        """Multiply by the slope."""
        if self.node in run.tapes:
            super().backward(run)
            return
        x = run.values[self._x]
        out = take_like(run.memory, x)
        gradient = laid_out_like(run.gradient(self.node), x)
        _OPS.activation_backward_(out, gradient, x, self._kind)
        run.arrive_tensor(self._x, out)


class LayerNormStep(PlainStep):
    """LayerNorm over the last axis.

    Args:
        x: the input.
        channels: the length of the last axis.
        weight: name of the weight's buffer in the copied layer, or None.
        bias: name of the bias's buffer in the copied layer, or None.
        eps: number that is added to the variance.
    """

    def __init__(
        self,
        node: fx.Node,
        copy: AttackCopy,
        x: fx.Node,
        channels: int,
        weight: str | None,
        bias: str | None,
        eps: float,
    ) -> None:
        super().__init__(node, copy)
        self._x, self._channels, self._eps = x, channels, eps
        part = None if weight is None and bias is None else self.part()
        self._weight = None if part is None or weight is None else part.get_buffer(weight)
        self._bias = None if part is None or bias is None else part.get_buffer(bias)

    def forward(self, run: Pass) -> None:
        """One pass; each row's mean and deviation are kept."""
        x, dtype = run.values[self._x], run.memory.dtype
        fits = is_rounded(x) and (dtype == torch.bfloat16 or x.dtype == dtype)
        if not fits or x.shape[-1] != self._channels:
            super().forward(run)
            return
        x = x.to(dtype).contiguous()
        out = take_like(run.memory, x)
        statistics = torch.empty(x.shape[:-1].numel(), 2, dtype=torch.float32, device=x.device)
        _OPS.rows_norm_(out, statistics, x, self._weight, self._bias, self._eps)
        run.values[self.node] = out
        run.kept[self.node] = x, statistics

    def backward(self, run: Pass) -> None:
        """One pass, which also adds the gradients from other users."""
        if self.node in run.tapes:
            super().backward(run)
            return
        x, statistics = run.kept[self.node]
        gradient = laid_out_like(run.gradient(self.node), x)

        def emit(add: Tensor | None) -> Tensor:
            out = take_like(run.memory, x)
            add = None if add is None else laid_out_like(add, x)
            _OPS.rows_norm_backward_(out, gradient, x, statistics, self._weight, add)
            return out

        run.arrive_sum(self._x, emit)


class RowsLinearStep(ProgramStep):
    """A linear layer with packed bfloat16 weights in both directions, and no weight gradient.

    Layers with few weights keep them in float32, too, for batches of single rows, such as classifiers'.

    Args:
        part: the layer.
        x: its input.
        scale: a constant by which each result is multiplied afterwards, or None.
    """

    is_known_to_win = True

    def __init__(
        self, node: fx.Node, part: CopiedLinear, x: fx.Node, scale: fx.Node | None = None
    ) -> None:
        super().__init__(node, [x])
        self._part, self._x, self._scale = part, x, scale
        self._generation = -1
        self._weights: tuple[Tensor, Tensor]
        self._bias: Tensor | None = None

    def forward(self, run: Pass) -> None:
        """One matrix product of the input."""
        x = run.values[self._x]
        if self._in_float32(x):
            run.values[self.node] = self._part(x)
            return
        if self._generation != self._part.generation:
            scale = None if self._scale is None else run.values[self._scale]
            with unrecorded():  # or each replay of this pass would pack the same weights again
                self._pack(scale)
            self._generation = self._part.generation
        run.values[self.node] = _product(x, self._weights[0], self._bias)

    def backward(self, run: Pass) -> None:
        """One matrix product of the gradient."""
        gradient, weight = run.gradient(self.node), self._part.weight
        if self._in_float32(run.values[self._x]):
            run.arrive_tensor(self._x, gradient.to(weight.dtype) @ weight)
            return
        run.arrive_tensor(self._x, _product(gradient, self._weights[1], None))

    def _in_float32(self, x: Tensor) -> bool:
        return self._part.small and self._scale is None and x.dim() == 2

    def _pack(self, scale: Tensor | None) -> None:
        weight, bias = self._part.weight, self._part.bias
        if scale is not None:
            wide = scale.reshape(-1).float()
            weight = weight * wide[:, None]
            bias = None if bias is None else bias * wide
        self._weights = _packed(weight), _packed(weight.t())
        self._bias = None if bias is None else bias.bfloat16()


def _packed(weight: Tensor) -> Tensor:
    narrow = weight.bfloat16().contiguous()
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(narrow)
    return packed


def _product(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    rows = x.to(torch.bfloat16).contiguous()
    product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "")
    return product


class SumStep(PlainStep):
    """``x + y`` of two maps or rows of one shape, in one pass, in the program's dtype if one of them is."""

    is_known_to_win = True

    def forward(self, run: Pass) -> None:
        """One pass."""
        x, y = (run.values[source] for source in self.inputs)
        dtype = run.memory.dtype
        fit = is_rounded(x) and is_rounded(y) and dtype in (x.dtype, y.dtype)
        if not (fit and x.dim() > 1 and x.shape == y.shape and is_dense(x)):
            super().forward(run)
            return
        x = x.to(dtype)
        out = take_like(run.memory, x)
        _OPS.merge_gradients_(out, x, laid_out_like(y, x), None)
        run.values[self.node] = out

    def backward(self, run: Pass) -> None:
        """The gradient itself, into both."""
        if self.node in run.tapes:
            super().backward(run)
            return
        for source in reversed(self.inputs):
            run.arrive_tensor(source, run.gradient(self.node))


class PermuteStep(PlainStep):
    """Another order of axes of the same memory.

    Args:
        x: the input.
        inverse: the order of the result's axes that gives the input's.
    """

    is_known_to_win = True

    def __init__(
        self, node: fx.Node, copy: AttackCopy, x: fx.Node, inverse: tuple[int, ...]
    ) -> None:
        super().__init__(node, copy)
        self._x, self._inverse = x, inverse

    def forward(self, run: Pass) -> None:
        """A view."""
        run.values[self.node] = self._call(run.values)

    def backward(self, run: Pass) -> None:
        """A view."""
        run.arrive_tensor(self._x, run.gradient(self.node).permute(self._inverse))


class ReshapeStep(PlainStep):
    """Another shape of the same elements.

    Args:
        x: the input, the first argument; others are numbers.
    """

    is_known_to_win = True

    def __init__(self, node: fx.Node, copy: AttackCopy, x: fx.Node) -> None:
        super().__init__(node, copy)
        self._x = x

    def forward(self, run: Pass) -> None:
        """A view, where one is possible."""
        run.values[self.node] = self._call(run.values)

    def backward(self, run: Pass) -> None:
        """The gradient in the input's shape."""
        for source in reversed(self.inputs):
            if source is self._x:
                shape = run.values[self._x].shape
                run.arrive_tensor(source, run.gradient(self.node).reshape(shape))
            else:
                run.arrive_nothing(source)


class AliasStep(ProgramStep):
    """A result that another step has computed already."""

    is_known_to_win = True

    def __init__(self, node: fx.Node, source: fx.Node) -> None:
        super().__init__(node, [source])

    def forward(self, run: Pass) -> None:
        """Take the other step's result."""
        run.values[self.node] = run.values[self.inputs[0]]

    def backward(self, run: Pass) -> None:
        """Pass the gradient on to the other step."""
        run.arrive_tensor(self.inputs[0], run.gradient(self.node))


class GateStep(PlainStep):
    """A map times one number per image and channel, as squeeze-excite has it."""

    def forward(self, run: Pass) -> None:
        """One pass, without the gate being spread over the pixels."""
        found = self._map_and_gate(run)
        if found is None:
            super().forward(run)
            return
        x, gate = (run.values[source] for source in found)
        out = run.memory.take(x.shape)
        _OPS.channel_gate_(out, x, gate.reshape(x.shape[:2]).contiguous())
        run.values[self.node] = out
        run.kept[self.node] = found

    def backward(self, run: Pass) -> None:
        """Both gradients in one pass."""
        if self.node in run.tapes:
            super().backward(run)
            return
        place, gates = run.kept[self.node]
        x, gate = run.values[place], run.values[gates]
        gradient, out = laid_out_like(run.gradient(self.node), x), run.memory.take(x.shape)
        sums = torch.empty(x.shape[:2], dtype=torch.float32, device=x.device)
        narrow = gate.reshape(x.shape[:2]).contiguous()
        _OPS.channel_gate_backward_(out, sums, gradient, x, narrow)
        found = {place: out, gates: sums.view(gate.shape)}
        for source in reversed(self.inputs):
            run.arrive_tensor(source, found[source])

    def _map_and_gate(self, run: Pass) -> tuple[fx.Node, fx.Node] | None:
        for x, gate in (self.inputs, reversed(self.inputs)):
            wide, narrow = run.values[x], run.values[gate]
            if not all(isinstance(t, Tensor) and t.dim() == 4 for t in (wide, narrow)):
                continue
            if wide.dtype != run.memory.dtype or narrow.dtype != run.memory.dtype:
                continue
            several = wide.shape[2] * wide.shape[3] > 1
            fits = narrow.shape == (*wide.shape[:2], 1, 1)
            if several and fits and wide.is_contiguous(memory_format=torch.channels_last):
                return x, gate
        return None
