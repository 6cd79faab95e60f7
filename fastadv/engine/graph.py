"""From a tape to a graph of layers: weights absorbed, BatchNorm folded, nothing written in place."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fastadv.engine.convolution_kernels import ConvShape
from fastadv.engine.errors import Unrecordable
from fastadv.engine.graph_functions import (
    Applied,
    OutOfPlace,
    WithoutGradient,
    has_out_of_place_form,
    is_method,
)
from fastadv.engine.layers import (
    CopiedConv2d,
    CopiedFunction,
    CopiedLinear,
    CopiedScaleShift,
    NormTensors,
    instance_norm,
)
from fastadv.engine.recording import ArrayArgument, RecordedOp, Recording, Ref, refs
from fastadv.engine.tape import BatchNumber, Tape


@dataclass(frozen=True)
class Part:
    """A layer of the copy, its name, and a function that finds its live weights in a recording."""

    name: str
    module: nn.Module
    values: Callable[[Recording], tuple[Any, ...]]


@dataclass
class Constants:
    """The inputs of the graph besides its layers: tensors by name, and their places in a recording."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    places: dict[str, int] = field(default_factory=dict)
    batch_node: fx.Node | None = None  # the number of images, if an operation needs it
    # For each place, the node that computes the tensor.
    nodes: dict[int, fx.Node] = field(default_factory=dict)


def graph_of(
    tape: Tape, recording: Recording, dtype: torch.dtype
) -> tuple[fx.Graph, list[Part], Constants]:
    """The graph of a copy in ``dtype``.

    Raises:
        Unrecordable: an operation has no form that leaves its arguments alone.
    """
    builder = _Builder(tape, recording, dtype)
    for op in tape.ops:
        if tape.dynamic[op.place]:
            builder.add(op)
    builder.graph.output(builder.nodes[tape.output])
    builder.graph.lint()
    builder.constants.nodes = {
        place: node for place, node in builder.nodes.items() if place not in builder.folded
    }
    return builder.graph, builder.parts, builder.constants


# Positional parameters of functions whose signatures Python cannot tell.
_CONV2D = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_LINEAR = ("input", "weight", "bias")
_TORCH_NORM = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum",
               "eps", "cudnn_enabled")  # fmt: skip
_ARITHMETIC = frozenset(
    ("add", "sub", "mul", "div", "true_divide", "rsub", "matmul", "pow", "cat", "stack", "where")
)


class _Builder:
    """Emits one node, or layer, after the other."""

    def __init__(self, tape: Tape, recording: Recording, dtype: torch.dtype) -> None:
        self._tape, self._recording, self._dtype = tape, recording, dtype
        self.graph = fx.Graph()
        self.parts: list[Part] = []
        self.constants = Constants()
        self.nodes: dict[int, fx.Node] = {0: self.graph.placeholder("x")}
        self._uses: dict[int, int] = {}
        self._last_user: dict[int, RecordedOp] = {}
        for op in tape.ops:
            for ref in refs((op.args, op.kwargs)):
                self._uses[ref.place] = self._uses.get(ref.place, 0) + 1
                self._last_user[ref.place] = op
        self._uses[tape.output] = self._uses.get(tape.output, 0) + 1
        self._convolutions: dict[int, tuple[Part, Ref, Ref | None]] = {}  # by place of the result
        self.folded: set[int] = set()  # places of results into whose node a norm was folded

    def add(self, op: RecordedOp) -> None:
        """Emit one op."""
        if not op.with_gradient or not (
            self._add_convolution(op) or self._add_norm(op) or self._add_linear(op)
        ):
            self._add_generic(op)

    def _add_convolution(self, op: RecordedOp) -> bool:
        if op.function is not torch.conv2d:
            return False
        call = _bound(op, _CONV2D)
        weight, bias = call["weight"], call.get("bias")
        shape = self._conv_shape(call) if self._is_constant(weight, bias) else None
        if shape is None or op.result_dim != 4 or not isinstance(call["input"], Ref):
            return False
        live = self._recording.values[weight.place]
        folds = self._norm_behind(op.place) is not None
        module = CopiedConv2d(live, bias is not None or folds, shape, self._dtype)
        part = self._part(module, op, call["input"], lambda r: (*_values(r, weight, bias), None))
        self._convolutions[op.place] = (part, weight, bias)
        return True

    def _conv_shape(self, call: dict[str, Any]) -> ConvShape | None:
        padding = call.get("padding", 0)
        if isinstance(padding, str) and padding != "valid":
            return None
        weight = self._recording.values[call["weight"].place]
        groups = call.get("groups", 1)
        return ConvShape(
            in_channels=weight.shape[1] * groups,
            out_channels=weight.shape[0],
            kernel_size=(weight.shape[2], weight.shape[3]),
            stride=_pair(call.get("stride", 1)),
            padding=(0, 0) if isinstance(padding, str) else _pair(padding),
            dilation=_pair(call.get("dilation", 1)),
            groups=groups,
        )

    def _norm_behind(self, place: int) -> RecordedOp | None:
        """The BatchNorm that alone uses a convolution's result."""
        if self._uses.get(place, 0) != 1 or place == self._tape.output:
            return None
        user = self._last_user[place]
        call = self._norm_call(user)
        return user if call is not None and call["input"] == Ref(place) else None

    def _norm_call(self, op: RecordedOp) -> dict[str, Any] | None:
        """The arguments of a BatchNorm of eval mode whose tensors are the model's; None for other ops."""
        if op.function is F.batch_norm:
            call = _bound(op, tuple(inspect.signature(F.batch_norm).parameters))
        elif op.function is torch.batch_norm:
            call = _bound(op, _TORCH_NORM)
        else:
            return None
        mean, var = call.get("running_mean"), call.get("running_var")
        tensors = (mean, var, call.get("weight"), call.get("bias"))
        plain = mean is not None and var is not None and self._is_constant(*tensors)
        return call if plain and not call.get("training", False) and op.with_gradient else None

    def _add_norm(self, op: RecordedOp) -> bool:
        call = self._norm_call(op)
        if call is None or op.result_dim != 4:
            return False
        names = ("running_mean", "running_var", "weight", "bias")
        tensors = [call.get(name) for name in names]
        eps = float(call.get("eps", 1e-5))

        def norm(recording: Recording) -> NormTensors:
            mean, var, weight, bias = _values(recording, *tensors)
            return NormTensors(mean, var, weight, bias, eps)

        source = call["input"].place
        if source in self._convolutions and self._norm_behind(source) is op:
            part, weight, bias = self._convolutions[source]
            folded = Part(part.name, part.module, lambda r: (*_values(r, weight, bias), norm(r)))
            self.parts[self.parts.index(part)] = folded
            self.folded.add(source)
            self.nodes[op.place] = self.nodes[source]
            return True
        mean = self._recording.values[tensors[0].place]  # type: ignore[union-attr]
        module = CopiedScaleShift(mean.shape[0], mean.device, self._dtype)
        self._part(module, op, call["input"], lambda r: (norm(r),))
        return True

    def _add_linear(self, op: RecordedOp) -> bool:
        if op.function is not F.linear:
            return False
        call = _bound(op, _LINEAR)
        weight, bias = call["weight"], call.get("bias")
        if not self._is_constant(weight, bias) or not isinstance(call["input"], Ref):
            return False
        live = self._recording.values[weight.place]
        if live.dim() != 2:
            return False
        module = CopiedLinear(live, bias is not None, self._dtype)
        self._part(module, op, call["input"], lambda r: _values(r, weight, bias))
        return True

    def _part(
        self,
        module: nn.Module,
        op: RecordedOp,
        source: Ref,
        values: Callable[[Recording], tuple[Any, ...]],
    ) -> Part:
        part = Part(f"part{len(self.parts)}", module, values)
        self.parts.append(part)
        self.nodes[op.place] = self.graph.call_module(part.name, (self._node(source),))
        return part

    def _add_generic(self, op: RecordedOp) -> None:
        """Any other function; layers of torch.nn.functional keep their weights in the copy's dtype."""
        function: Any = instance_norm if op.function is F.instance_norm else op.function
        name = getattr(function, "__name__", "")
        if op.writes:
            self._add_written(op, name)
            return
        weights = self._weights_of_layer(op, name)
        if weights and op.with_gradient:
            self._add_layer(op, function, weights)
            return
        args, kwargs = self._argument(_indexed(op.args, name)), self._argument(op.kwargs)
        if name == "apply":
            function = Applied(function)
        if not op.with_gradient:
            function = WithoutGradient(function)
            self.nodes[op.place] = self.graph.call_function(function, args, kwargs)
        elif name == "__get__":
            property_of = (args[0], function.__self__.__name__)
            self.nodes[op.place] = self.graph.call_function(getattr, property_of)
        elif is_method(function):
            reshapes = name == "view" and not isinstance(op.args[1], torch.dtype)
            # The copy's maps are channels-last, where a view may be impossible.
            method = "reshape" if reshapes else name
            self.nodes[op.place] = self.graph.call_method(method, args, kwargs)
        else:
            if kwargs.get("inplace"):
                kwargs = {**kwargs, "inplace": False}
            self.nodes[op.place] = self.graph.call_function(function, args, kwargs)

    def _weights_of_layer(self, op: RecordedOp, name: str) -> list[tuple[int | str, Ref]]:
        """The weights of a call that is a layer rather than arithmetic, with their places in the call."""
        if is_method(op.function) or name in _ARITHMETIC or name in ("__get__", "item", "apply"):
            return []
        found: list[tuple[int | str, Ref]] = []
        places: list[tuple[int | str, Any]] = [*enumerate(op.args), *op.kwargs.items()]
        for where, value in places:
            if isinstance(value, Ref) and not self._tape.dynamic[value.place]:
                found.append((where, value))
        return found

    def _add_layer(
        self, op: RecordedOp, function: Any, weights: list[tuple[int | str, Ref]]
    ) -> None:
        live = [self._recording.values[ref.place] for _, ref in weights]
        own = [where for where, _ in weights]
        references = [ref for _, ref in weights]
        module = CopiedFunction(function, own, live, self._dtype)
        part = Part(f"part{len(self.parts)}", module, lambda r: _values(r, *references))
        self.parts.append(part)
        args = tuple(None if i in own else self._argument(a) for i, a in enumerate(op.args))
        kwargs = {k: self._argument(v) for k, v in op.kwargs.items() if k not in own}
        self.nodes[op.place] = self.graph.call_module(part.name, args, kwargs)

    def _add_written(self, op: RecordedOp, name: str) -> None:
        """An op that writes in place, as one that returns the written values."""
        args, kwargs = self._argument(op.args), self._argument(op.kwargs)
        if kwargs.get("inplace") or (name in _INPLACE_ARGUMENT and len(args) > 1):
            full = inspect.signature(op.function).bind(*args, **kwargs)
            full.arguments["inplace"] = False
            node = self.graph.call_function(op.function, full.args, full.kwargs)
        elif has_out_of_place_form(op.function, name):
            plain = name[:-1]
            if is_method(op.function):
                node = self.graph.call_method(plain, args, kwargs)
            else:
                function = getattr(torch, plain, None) or getattr(F, plain)
                node = self.graph.call_function(function, args, kwargs)
        else:
            node = self.graph.call_function(OutOfPlace(op.function), args, kwargs)
        self.nodes[op.place] = node

    def _is_constant(self, *values: Any) -> bool:
        """Whether each argument is None or a tensor that comes from a recording."""
        return all(
            v is None or (isinstance(v, Ref) and not self._tape.dynamic[v.place]) for v in values
        )

    def _argument(self, value: Any) -> Any:
        """A recorded argument as one of the graph."""
        if isinstance(value, Ref):
            return self._node(value)
        if isinstance(value, BatchNumber):
            return self._batch_number(value)
        if isinstance(value, ArrayArgument):
            raise Unrecordable("its forward computes with an array of numpy's and the images")
        if isinstance(value, (tuple, list)):
            items = [self._argument(v) for v in value]
            return items if isinstance(value, list) else tuple(items)
        if isinstance(value, dict):
            return {k: self._argument(v) for k, v in value.items()}
        if isinstance(value, slice):
            return slice(*(self._argument(v) for v in (value.start, value.stop, value.step)))
        return value

    def _node(self, ref: Ref) -> fx.Node:
        node = self.nodes.get(ref.place)
        if node is not None:
            return node
        name = f"constant{len(self.constants.tensors)}"
        live = self._recording.values[ref.place]
        self.constants.tensors[name] = live.detach().clone()
        self.constants.places[name] = ref.place
        self.nodes[ref.place] = node = self.graph.get_attr(name, type_expr=None)
        return node

    def _batch_number(self, number: BatchNumber) -> Any:
        if self.constants.batch_node is None:
            with self.graph.inserting_after(self.nodes[0]):
                batch = self.graph.call_method("size", (self.nodes[0], 0))
            self.constants.batch_node = batch
        value = self.constants.batch_node
        if number.per_image != 1:
            value = self.graph.call_function(operator.mul, (value, number.per_image))
        if number.constant != 0:
            value = self.graph.call_function(operator.add, (value, number.constant))
        return value


_INPLACE_ARGUMENT = frozenset(
    ("relu", "relu6", "elu", "celu", "selu", "silu", "mish", "hardtanh", "hardswish",
     "hardsigmoid", "leaky_relu", "threshold", "dropout")
)  # fmt: skip


def _bound(op: RecordedOp, names: tuple[str, ...]) -> dict[str, Any]:
    """The arguments of a call by name."""
    return {**dict(zip(names, op.args, strict=False)), **op.kwargs}


def _values(recording: Recording, *references: Ref | None) -> tuple[Any, ...]:
    return tuple(None if ref is None else recording.values[ref.place] for ref in references)


def _indexed(args: tuple[Any, ...], name: str) -> tuple[Any, ...]:
    """Arguments in which arrays that serve as an index are lists, which mean the same there."""
    if name != "__getitem__":
        return args
    x, index = args
    several = isinstance(index, tuple) and not isinstance(index, Ref)
    return x, tuple(map(_entries, index)) if several else _entries(index)


def _entries(value: Any) -> Any:
    return value.entries() if isinstance(value, ArrayArgument) else value


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    first, *rest = value
    if not all(isinstance(v, int) for v in value):
        raise Unrecordable("a convolution's shape depends on the batch size")
    return first, rest[0] if rest else first
