"""The record of an op that the op tests and the op benchmark are driven by."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from covering import Facts
from torch import Tensor

from fastadv.ops import REGISTRY
from fastadv.ops.registry import Op
from op_cases.draw import Spec

Arguments = dict[str, Any]
Shape = tuple[int, ...]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Batch 0, single pixels, sizes that are no multiple of a SIMD width, features of 0, 1, 2 and 5 axes.
SMALL_SHAPES: tuple[Shape, ...] = (
    (3, 3, 7, 9),
    (0, 3, 7, 9),
    (1, 1, 1, 1),
    (2, 33, 5, 4),
    (1, 3, 32, 32),
    (5, 130),
    (6,),
    (3, 0),
    (2, 3, 4, 5, 2),
)
LARGE_SHAPE: Shape = (2, 3, 224, 224)  # several tasks, threads and partial sums per sample
IMAGE_BENCH_SHAPES: tuple[Shape, ...] = ((128, 3, 32, 32), (32, 3, 224, 224))
FEATURE_BENCH_SHAPES: tuple[Shape, ...] = ((128, 512, 4, 4), (128, 640, 8, 8))


@dataclass(frozen=True)
class Bad:
    """A call that must fail.

    Attributes:
        argument: the argument that the message must name.
        error: the exception's type.
        change: from the keywords of a good public call to those that are to be replaced.
    """

    argument: str
    error: type[Exception]
    change: Callable[[Arguments], Arguments]


def itself(arguments: Arguments) -> Arguments:
    """The public function takes the raw op's arguments."""
    return arguments


@dataclass(frozen=True)
class OpCase:
    """One way to call one op, with everything a test or a benchmark has to know about it.

    "Results" are what the raw op returns, followed by the arguments that it writes to.

    Attributes:
        op: the op's name in the registry.
        variant: which way of calling it, e.g. ``"l2"``; unique within the op.
        arguments: the raw op's arguments by their names in the schema, for what a `Spec` asks.
        formula: the op's definition in plain torch or numpy, written independently of the op's own reference.
            It takes the arguments as keywords and returns all results. The tests call it with the float
            tensors in float64 (the truth) and in the dtype of computation (torch's own error).
        function: the public function; None for a backward op.
        keywords: from the raw op's arguments to the public function's keywords.
        differentiable: the arguments that the public function has a gradient for.
        bit_equal: the dtypes in which every backend, layout and thread count gives the same bits; in the
            others the results keep to the error budget of `op_cases.budget`.
        scale: the magnitude of the largest number that a rounding error can come from, per result.
        layout_of: per result, its memory format or the argument whose layout it has.
        shared: arguments without a batch axis.
        per_sample: row i of every result depends on row i of the batched arguments alone.
        dtypes: what `Spec.dtype` may be.
        shapes: the small shapes to test.
        large: the shape that needs several tasks and threads; None where there is none.
        gradient_shape: the shape on which gradients are compared with differences.
        rival: what a skilled user would write instead of the public function, in plain torch; the benchmark
            times it. It returns what the public function returns, the rest is ignored; None takes `formula`.
        rival_keywords: from the raw op's arguments to the rival's keywords; what it prepares is not timed.
        bench_shapes: the shapes to measure; none = not measured. The first one is measured in every layout.
        bench_layouts: the memory layouts to measure.
        bench_compiled: whether the reference is measured under torch.compile as well; not where that takes
            minutes, as it does for random numbers in plain torch.
        bench_elements: elements that a call handles at a shape, about, from which its time is estimated.
        traffic: bytes that must be moved at least, from arguments and results; None counts every tensor
            argument and every result once.
        operations: arithmetic operations, about: per element of the largest tensor, or in all from the
            arguments.
        bad: calls of the public function that must fail.
    """

    op: str
    variant: str
    arguments: Callable[[Spec], Arguments]
    formula: Callable[..., tuple[Tensor, ...]]
    scale: Callable[..., tuple[float, ...]]
    layout_of: tuple[str | torch.memory_format, ...]
    function: Callable[..., Any] | None = None
    keywords: Callable[[Arguments], Arguments] = itself
    differentiable: tuple[str, ...] = ()
    bit_equal: tuple[torch.dtype, ...] = ()
    shared: frozenset[str] = frozenset()
    per_sample: bool = True
    dtypes: tuple[torch.dtype, ...] = DTYPES
    shapes: tuple[Shape, ...] = SMALL_SHAPES
    large: Shape | None = LARGE_SHAPE
    gradient_shape: Shape = (2, 3, 2, 3)
    rival: Callable[..., Any] | None = None
    rival_keywords: Callable[[Arguments], Arguments] = itself
    bench_shapes: tuple[Shape, ...] = ()
    bench_layouts: tuple[str, ...] = ("contiguous", "channels_last")
    bench_compiled: bool = True
    bench_elements: Callable[[Shape], int] = math.prod
    traffic: Callable[[Arguments, tuple[Tensor, ...]], int] | None = None
    operations: float | Callable[[Arguments], float] = 1.0
    bad: tuple[Bad, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.op}/{self.variant}"

    @property
    def family(self) -> str:
        """The file that defines the op; its own tests are in tests/ops/test_<family>.py."""
        return self.registered.reference.__module__.rpartition(".")[2]

    def signatures(self) -> Facts:
        """What torch sees of a call: the function, each word, and which arguments are tensors of which dtype."""
        found = self.arguments(Spec(self.shapes[0]))
        dtypes = tuple((name, tuple(t.dtype for t in tensors_of(found, [name]))) for name in found)
        words = [(name, value) for name, value in found.items() if isinstance(value, str)]
        return {(self.op, fact) for fact in (self.function, *words, dtypes)}

    @property
    def has_gradient(self) -> bool:
        """Whether the op, in any variant, has a backward op."""
        return any(op.backward_of == self.op for op in REGISTRY.values())

    @property
    def registered(self) -> Op:
        return REGISTRY[self.op]

    def call_public(self, arguments: Arguments) -> tuple[Any, ...]:
        """The public function's results."""
        assert self.function is not None
        return as_tuple(self.function(**self.keywords(arguments)))

    def bytes_moved(self, arguments: Arguments, results: tuple[Tensor, ...]) -> int:
        """The floor of memory traffic: each input read once, each output written once."""
        if self.traffic is not None:
            return self.traffic(arguments, results)
        return sum(t.numel() * t.element_size() for t in (*tensors_of(arguments), *results))


def as_tuple(results: Any) -> tuple[Any, ...]:
    """What an op or function returned, as a tuple."""
    if results is None:
        return ()
    return tuple(results) if isinstance(results, (tuple, list)) else (results,)


def tensors_of(arguments: Arguments, names: Iterable[str] | None = None) -> list[Tensor]:
    """The tensors among the arguments (those of the names given, if any), those in lists one by one."""
    chosen = arguments if names is None else names
    return [t for name in chosen for t in _listed(arguments[name]) if isinstance(t, Tensor)]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def mapped(
    arguments: Arguments, change: Callable[[Tensor], Tensor], names: Iterable[str] | None = None
) -> Arguments:
    """The arguments with every tensor (of the names given, if any) changed, also those in lists."""
    chosen = arguments.keys() if names is None else set(names)

    def changed(value: Any) -> Any:
        if isinstance(value, list):
            return [changed(entry) for entry in value]
        return change(value) if isinstance(value, Tensor) else value

    return {n: changed(value) if n in chosen else value for n, value in arguments.items()}


def replaced(arguments: Arguments, names: Iterable[str], tensors: Iterable[Tensor]) -> Arguments:
    """The arguments with the tensors of some names replaced in the order of `tensors_of`."""
    rest = iter(tensors)
    return arguments | {n: mapped({n: arguments[n]}, lambda _: next(rest))[n] for n in names}


def requiring_grad(case: OpCase, arguments: Arguments) -> Arguments:
    """A copy whose differentiable arguments are leaves that require grad."""
    copies = mapped(arguments, lambda t: t.detach().clone())
    for leaf in tensors_of(copies, case.differentiable):
        leaf.requires_grad_()
    return copies


def in_dtype(arguments: Arguments, dtype: torch.dtype) -> Arguments:
    """The arguments with every float tensor in one dtype."""
    return mapped(arguments, lambda t: t.to(dtype) if t.is_floating_point() else t)
