"""What the op benchmark measures: rows (an op's sample in a shape, dtype and layout) and candidates for each."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from op_cases import CASES
from op_cases.case import Arguments, OpCase
from op_cases.draw import Spec
from op_cases.running import run as results_of

from fastadv.ops import REGISTRY
from fastadv.ops.registry import BACKENDS, Op

COMPILED = "compiled"  # the reference under torch.compile
COPY = "copy"  # moves as many bytes as the op has to
EAGER = "reference"
Run = Callable[[], object]


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        device: "cpu" or "cuda".
        quick: one shape, dtype and layout per sample, few rounds, nothing that compiles.
        ops: names of the ops; all others are left out.
        backends: which to measure beside the eager reference; empty = all there are.
    """

    device: str = "cpu"
    quick: bool = False
    ops: tuple[str, ...] = tuple(REGISTRY)
    backends: tuple[str, ...] = ()

    def backends_of(self, op: Op) -> list[str]:
        """The backends to measure for an op, the eager reference always among them."""
        found = [name for name in BACKENDS if self._has(op, name)]
        if missing := set(self.backends) - set(found):
            where = f"{op.name} on {self.device}"
            raise ValueError(
                f"--backend must be one of {', '.join(found)} for {where}, got {missing}"
            )
        return [name for name in found if not self.backends or name in (*self.backends, EAGER)]

    def _has(self, op: Op, name: str) -> bool:
        if name == "native":
            return op.has_native(self.device)
        return name == EAGER or (self.device == "cuda" and op.triton is not None)

    def candidates_of(self, op: Op) -> list[str]:
        """The names of all that is timed in turn for an op."""
        return [*self.backends_of(op), *([] if self.quick else [COMPILED]), COPY]


OPTIONS = pytest.StashKey[Options]()  # where pytest's configuration holds them


@dataclass(frozen=True)
class Row:
    """One sample of one op."""

    case: OpCase
    spec: Spec

    @property
    def name(self) -> str:
        shape = "x".join(map(str, self.spec.shape))
        dtype = str(self.spec.dtype).removeprefix("torch.")
        return f"{self.case.name}-{shape}-{dtype}-{self.spec.layout}"

    @property
    def direction(self) -> str:
        return "backward" if self.case.registered.backward_of else "forward"


def rows(options: Options) -> Iterator[Row]:
    """Every shape in float32 contiguous; unless quick, also in the other layouts and in bfloat16."""
    for case in CASES.values():
        if case.op not in options.ops:
            continue
        for shape in case.bench_shapes[:1] if options.quick else case.bench_shapes:
            kinds = [(torch.float32, case.bench_layouts[0])]
            if not options.quick:
                kinds += [(torch.float32, layout) for layout in case.bench_layouts[1:]]
                kinds += [(torch.bfloat16, case.bench_layouts[0])]
            for dtype, layout in kinds:
                yield Row(case, Spec(shape, dtype, layout, device=options.device))


class Workload:
    """A row's arguments, allocated once, and what a call of its op costs at least."""

    def __init__(self, row: Row) -> None:
        self.row = row
        self._arguments: Arguments = row.case.arguments(row.spec)
        results = results_of(row.case, self._arguments)
        self.bytes = row.case.bytes_moved(self._arguments, results)
        self.operations = row.case.operations * _elements(self._arguments, results)

    def candidate(self, name: str) -> Run:
        """The call to time.

        The owner of the device goes through the dispatcher, as in use; the other backends are called
        directly, because forcing one in a `backend` block costs time of its own.
        """
        op, values = self.row.case.registered, tuple(self._arguments.values())
        device = self.row.spec.device
        if name == COPY:
            return _copy(self.bytes, device)
        if name == COMPILED:
            torch._dynamo.reset()
            function: Callable[..., Any] = torch.compile(op.reference, dynamic=False)
        elif name == op.owner(device):
            function = op.overload
        else:
            function = op.reference if name == EAGER else op.triton_function()
        return lambda: function(*values)


def _elements(arguments: Arguments, results: tuple[torch.Tensor, ...]) -> int:
    """Elements of the largest result, or of the largest argument where results are one number per sample."""
    float_arguments = (
        a for a in arguments.values() if isinstance(a, torch.Tensor) and a.is_floating_point()
    )
    return max(t.numel() for t in (*float_arguments, *results))


def _copy(size: int, device: str) -> Run:
    source = torch.zeros(size // 2, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)
