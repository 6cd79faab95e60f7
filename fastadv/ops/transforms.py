"""Every op under ``torch.func``: ``vmap``, ``grad``, ``vjp``, ``jacrev`` and their combinations.

The gradient formula that ``torch.library`` registers is for plain autograd: under ``torch.func.grad`` it raises,
and under ``torch.func.jvp`` it silently drops the tangent. Therefore each op gets one more kernel, for the
dispatch key that takes part only while a transform is active. This kernel runs the op as a
`torch.autograd.Function` that has everything that a transform needs: ``setup_context``, ``backward`` and the
batching rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastadv.ops.registry import Op

_FRONT = "FuncTorchDynamicLayerFrontMode"


@dataclass(frozen=True)
class Gradient:
    """A gradient formula, both parts as ``torch.library.register_autograd`` takes them."""

    backward: Callable[..., Any]
    setup_context: Callable[..., None] | None


GRADIENTS: dict[str, Gradient] = {}  # by op name


def install(op: Op, library: torch.library.Library) -> None:
    """Make a registered op work under ``torch.func``; an op in place raises there."""
    schema = op.overload._schema
    if schema.is_mutable:
        torch.library.register_vmap(op.qualified_name, _refusal(op), lib=library)
        return
    returns_list = len(schema.returns) == 1 and str(schema.returns[0].type).startswith("List")

    def kernel(*arguments: Any) -> Any:
        top = torch._C._functorch.peek_interpreter_stack()
        if top.key() == torch._C._functorch.TransformType.Functionalize:
            return _functionalized(op, arguments)
        call, leaves = _Call.of(op, arguments)
        results = _Transformed.apply(call, *leaves)
        return list(results) if returns_list else results

    library.impl(op.name, kernel, _FRONT)


def _refusal(op: Op) -> Callable[..., Any]:
    def refuse(*_: Any) -> Any:
        raise RuntimeError(
            f"{op.name} writes to its arguments, which torch.func.vmap cannot batch: use the op that returns "
            "its result, or call it outside vmap on a batch that holds the samples of all slices"
        )

    return refuse


def _functionalized(op: Op, arguments: tuple[Any, ...]) -> Any:
    """The op on functional tensors: it returns no views and writes to nothing, so it is called as it is."""
    from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
    from torch._subclasses.functional_tensor import FunctorchFunctionalizeAPI

    interpreter: Any = retrieve_current_functorch_interpreter()
    mode = FunctorchFunctionalizeAPI(interpreter)
    with interpreter.lower():
        results = op.overload(*mode.unwrap_tensors(arguments))
    return mode.wrap_tensors(results)


@dataclass(frozen=True)
class _Call:
    """An op, and the length of each argument that is a list: an autograd function takes no lists.

    Attributes:
        op: the op.
        lengths: for each argument its number of entries, None where it is not a list.
    """

    op: Op
    lengths: tuple[int | None, ...]

    @classmethod
    def of(cls, op: Op, arguments: Sequence[Any]) -> tuple[_Call, list[Any]]:
        lengths = tuple(len(a) if isinstance(a, (list, tuple)) else None for a in arguments)
        call = cls(op, lengths)
        return call, call.flat(arguments)

    def flat(self, arguments: Sequence[Any]) -> list[Any]:
        """The arguments, or what belongs to them, without lists; None stands for a list of None."""
        leaves: list[Any] = []
        for length, argument in zip(self.lengths, arguments, strict=True):
            if length is None:
                leaves.append(argument)
            else:
                leaves += [None] * length if argument is None else argument
        return leaves

    def structured(self, leaves: Sequence[Any]) -> tuple[Any, ...]:
        """The inverse of `flat`."""
        rest = iter(leaves)
        return tuple(
            next(rest) if length is None else [next(rest) for _ in range(length)]
            for length in self.lengths
        )


class _Transformed(torch.autograd.Function):
    """An op as an autograd function with all rules that ``torch.func`` needs."""

    @staticmethod
    def forward(call: _Call, *leaves: Any) -> Any:
        results = call.op.overload(*call.structured(leaves))
        return tuple(results) if isinstance(results, list) else results

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.call = inputs[0]
        gradient = GRADIENTS.get(ctx.call.op.name)
        if gradient is None:
            ctx.mark_non_differentiable(*_as_tuple(output))
        elif gradient.setup_context is not None:
            gradient.setup_context(ctx=ctx, inputs=ctx.call.structured(inputs[1:]), output=output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        needed = ctx.needs_input_grad
        ctx.needs_input_grad = ctx.call.structured(needed[1:])
        try:
            found = GRADIENTS[ctx.call.op.name].backward(ctx, *grads)
        finally:
            ctx.needs_input_grad = needed
        return (None, *ctx.call.flat(_as_tuple(found)))

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            f"{ctx.call.op.name} has no forward-mode derivative: use torch.func.grad, vjp or jacrev"
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], call: _Call, *leaves: Any) -> tuple[Any, Any]:
        rule = _slice_by_slice if call.op.batched is None else _merged
        results = rule(call, info.batch_size, in_dims[1:], leaves)
        return results, 0 if isinstance(results, Tensor) else (0,) * len(results)


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _merged(call: _Call, count: int, dims: tuple[int | None, ...], leaves: tuple[Any, ...]) -> Any:
    """One call on a batch of ``count * B`` rows: each row's numbers are what they are in its own slice."""
    op = call.op
    assert op.batched is not None
    names = [argument.name for argument in op.overload._schema.arguments]
    arguments = dict(zip(names, call.structured(leaves), strict=True))
    axes = dict(zip(names, call.structured(dims), strict=True))
    for name in names:
        if name not in op.batched and any(axis is not None for axis in _entries(axes[name])):
            raise RuntimeError(
                f"{op.name} cannot be vmapped over {name}, which all rows of the batch share: vmap over "
                f"{', '.join(op.batched)} alone, or call the op once for each {name} in a Python loop"
            )
    batch = _batch_size(op.batched, arguments, axes)
    for name in op.batched:
        entries = zip(_entries(arguments[name]), _entries(axes[name]), strict=True)
        merged = [
            t if t is None else _with_axis(t, axis, count).flatten(0, 1) for t, axis in entries
        ]
        arguments[name] = merged if isinstance(arguments[name], list) else merged[0]
    if "sample_ids" in arguments and arguments["sample_ids"] is None:
        device = next(t for t in leaves if isinstance(t, Tensor)).device
        arguments["sample_ids"] = torch.arange(batch, device=device).repeat(count)
    results = op.overload(*arguments.values())
    rows = [_split(result, count, batch) for result in _entries(results)]
    return rows[0] if isinstance(results, Tensor) else tuple(rows)


def _split(result: Tensor, count: int, batch: int) -> Tensor:
    """[V * B, ...] as [V, B, ...]; a result that was not asked for is empty, and so in every slice."""
    if result.shape[0] == count * batch:
        return result.unflatten(0, (count, batch))
    return result.expand(count, *result.shape)


def _batch_size(batched: tuple[str, ...], arguments: dict[str, Any], axes: dict[str, Any]) -> int:
    """B, the rows of one slice."""
    name = next(name for name in batched if arguments[name] is not None)
    tensor, axis = _entries(arguments[name])[0], _entries(axes[name])[0]
    return (tensor if axis is None else tensor.select(axis, 0)).shape[0]


def _entries(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else (value,)


def _with_axis(t: Tensor, axis: int | None, count: int) -> Tensor:
    """[V, B, ...]: the vmapped axis in front; a tensor without one is the same in every slice."""
    return t.expand(count, *t.shape) if axis is None else t.movedim(axis, 0)


def _slice_by_slice(
    call: _Call, count: int, dims: tuple[int | None, ...], leaves: tuple[Any, ...]
) -> Any:
    """One call per slice, for an op that sums over the batch: it must not see the rows of two slices at once."""

    def slices() -> Iterator[Any]:
        for i in range(count):
            at_i = [t if d is None else t.select(d, i) for t, d in zip(leaves, dims, strict=True)]
            yield _Transformed.forward(call, *at_i)

    found = list(slices())
    if isinstance(found[0], Tensor):
        return torch.stack(found)
    return tuple(torch.stack(results) for results in zip(*found, strict=True))
