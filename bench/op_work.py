"""The timed part of a row of the op benchmark: the calls, on arguments that are allocated once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from op_cases.case import Arguments, OpCase, as_tuple
from op_cases.running import run as results_of
from op_rows import BOTH, COMPILED, COPY, EAGER, USUAL, USUAL_COMPILED, Row
from torch import Tensor

Run = Callable[[], object]
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 5e-2}  # of a rival, relative to typical values
ODD_SHARE = 0.1  # of a gradient: where a norm is zero, say, definitions differ
_SAMPLED = 100_000  # elements of a tensor that are compared


class Disagreement(ValueError):
    """A rival has another result than the op."""


def workload(row: Row) -> RawWork | PublicWork:
    """The row's calls.

    Raises:
        Disagreement: op and rival differ by more than a loose tolerance.
    """
    return PublicWork(row) if row.direction == BOTH else RawWork(row)


class RawWork:
    """A raw op, forward or backward.

    Attributes:
        bytes: the least that a call must move.
        operations: its arithmetic operations, about.
    """

    def __init__(self, row: Row) -> None:
        self._case, self._device = row.case, row.spec.device
        self._arguments: Arguments = row.case.arguments(row.spec)
        results = results_of(row.case, self._arguments)
        self.bytes = row.case.bytes_moved(self._arguments, results)
        count = row.case.operations
        self.operations: float | None = (
            count(self._arguments)
            if callable(count)
            else count * _elements(self._arguments, results)
        )
        if row.has_usual and row.case.rival is not None:
            found = as_tuple(_rival(row.case, self._arguments)())
            _check_agreement(row, results, found, "result", odd=0.0)

    def candidate(self, name: str) -> Run:
        """The call to time.

        The owner of the device goes through the dispatcher, as in use; the other backends are called
        directly, because forcing one in a `backend` block costs time of its own.
        """
        op, values = self._case.registered, tuple(self._arguments.values())
        if name == COPY:
            return _copy(self.bytes, self._device)
        if name in (USUAL, USUAL_COMPILED):
            return _rival(self._case, self._arguments, compiled=name == USUAL_COMPILED)
        return _called(self._function(name, op.owner(self._device)), values)

    def _function(self, name: str, owner: str) -> Callable[..., Any]:
        op = self._case.registered
        if name == COMPILED:
            return _compiled(op.reference)
        if name == owner:
            return op.overload
        return op.reference if name == EAGER else op.triton_function()


class PublicWork:
    """A public function and its backward pass to all differentiable arguments, against the rival's.

    Attributes:
        bytes: the least that both passes must move: the forward pass's bytes, the incoming gradient and the
            gradients of the arguments.
        operations: None, because only the forward pass's are known.
    """

    operations: float | None = None

    def __init__(self, row: Row) -> None:
        self._case, self._device = row.case, row.spec.device
        self._arguments = _requiring_grad(row.case, row.case.arguments(row.spec))
        self._leaves = [
            t for name in row.case.differentiable for t in _tensors(self._arguments[name])
        ]
        results = as_tuple(self._public()())
        generator = torch.Generator(self._device).manual_seed(0)
        self._incoming = [
            0.5 + torch.rand(r.shape, generator=generator, dtype=r.dtype, device=r.device)
            if r.requires_grad
            else None
            for r in results
        ]
        self._incoming_of: dict[tuple[int, torch.dtype], Tensor] = {}
        gradients = self._pulled_back(results)
        with torch.no_grad():
            forward = results_of(row.case, self._arguments)
        passed = (*(g for g in self._incoming if g is not None), *self._leaves)
        self.bytes = row.case.bytes_moved(self._arguments, forward)
        self.bytes += sum(t.numel() * t.element_size() for t in passed)
        found = as_tuple(_rival(row.case, self._arguments)())
        _check_agreement(row, results, found, "result", odd=0.0)
        _check_agreement(row, gradients, self._pulled_back(found), "gradient", odd=ODD_SHARE)
        self._incoming = [g if g is None or g.dim() else torch.ones_like(g) for g in self._incoming]
        self._incoming_of.clear()

    def candidate(self, name: str) -> Run:
        """The two passes to time; the backward pass of a scalar begins with 1, as `loss.backward()` does."""
        if name == COPY:
            return _copy(self.bytes, self._device)
        if name in (USUAL, USUAL_COMPILED):
            forward = _rival(self._case, self._arguments, compiled=name == USUAL_COMPILED)
        else:
            forward = self._public()
        return lambda: self._pulled_back(as_tuple(forward()))

    def _public(self) -> Run:
        function, keywords = self._case.function, self._case.keywords(self._arguments)
        assert function is not None
        return lambda: function(**keywords)

    def _pulled_back(self, results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The gradients of the leaves; the incoming ones are the same for all candidates."""
        pairs = [
            (result, self._incoming_for(i, result.dtype))
            for i, result in enumerate(results[: len(self._incoming)])
            if self._incoming[i] is not None
        ]
        outputs, incoming = zip(*pairs, strict=True)
        return torch.autograd.grad(outputs, self._leaves, incoming)

    def _incoming_for(self, index: int, dtype: torch.dtype) -> Tensor:
        """The incoming gradient in the dtype of a candidate's result, converted once."""
        key = (index, dtype)
        if key not in self._incoming_of:
            gradient = self._incoming[index]
            assert gradient is not None
            self._incoming_of[key] = gradient.to(dtype)
        return self._incoming_of[key]


def _rival(case: OpCase, arguments: Arguments, compiled: bool = False) -> Run:
    """The commonly written code on these arguments."""
    function, keywords = case.rival or case.formula, case.rival_keywords(arguments)
    if compiled:
        function = _compiled(function)
    return lambda: function(**keywords)


def _called(function: Callable[..., Any], values: tuple[Any, ...]) -> Run:
    return lambda: function(*values)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False, fullgraph=True)


def _copy(size: int, device: str) -> Run:
    source = torch.zeros(size // 2, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


def _tensors(value: Any) -> Iterator[Tensor]:
    """The float tensors in an argument, which may be a list of tensors."""
    for item in value if isinstance(value, (list, tuple)) else (value,):
        if isinstance(item, Tensor) and item.is_floating_point():
            yield item


def _requiring_grad(case: OpCase, arguments: Arguments) -> Arguments:
    for name in case.differentiable:
        for tensor in _tensors(arguments[name]):
            tensor.requires_grad_()
    return arguments


def _elements(arguments: Arguments, results: tuple[Tensor, ...]) -> int:
    """Elements of the largest result, or of the largest argument where results are one number per sample."""
    inputs = (t for value in arguments.values() for t in _tensors(value))
    return max(t.numel() for t in (*inputs, *results))


def _check_agreement(
    row: Row, own: tuple[Tensor, ...], rival: tuple[Tensor, ...], what: str, odd: float
) -> None:
    """Require that at most a share `odd` of elements differs by more than the tolerance."""
    for index, (ours, theirs) in enumerate(zip(own, rival, strict=False)):
        share = _differing(ours.detach(), theirs.detach(), TOLERANCES[row.spec.dtype])
        if share > odd:
            raise Disagreement(
                f"{what} {index} of the rival differs from the op's in {share:.1%} of its elements: {row.name}"
            )


def _differing(ours: Tensor, theirs: Tensor, tolerance: float) -> float:
    if ours.shape != theirs.shape:
        return 1.0
    step = ours.numel() // _SAMPLED | 1  # odd, so that it runs through all columns
    a, b = (t.reshape(-1)[::step].double() for t in (ours, theirs))
    typical = a.abs().quantile(0.9)
    allowed = tolerance * (typical if typical > 0 else a.abs().max())
    return float(((a - b).abs() <= allowed).logical_not().double().mean())
