"""The rows of the op benchmark, and the calls that are timed in each.

A row is a sample of an op (`tests/op_cases`) in a shape, dtype, layout and direction. Compilers take longer than
everything else here, so only the most telling rows are compiled: float32 in the first layout, of every shape where
the row is a call of users (a public function with its backward pass, or an op without gradient), of the first
shape where it is the raw half of such a pair. Other layouts and bfloat16 are measured in the first shape alone.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))

from op_cases import CASES
from op_cases.case import OpCase
from op_cases.draw import Spec

from fastadv.ops import REGISTRY
from fastadv.ops.registry import BACKENDS, Op

EAGER = "reference"  # the op's reference in plain torch
COMPILED = "compiled"  # the reference under torch.compile
USUAL = "usual"  # the case's rival: the code that is commonly written
USUAL_COMPILED = "usual compiled"  # the rival under torch.compile
COPY = "copy"  # moves as many bytes as the op has to
BOTH = "both"  # the direction of a public function's forward and backward pass in a row


@dataclass(frozen=True)
class Options:
    """The choice of measurements.

    Attributes:
        device: "cpu" or "cuda".
        quick: one shape, dtype and layout per sample, few rounds, nothing that compiles.
        ops: names of the ops; all others are left out.
        backends: which to measure beside the eager reference; empty = all there are.
        part: only rows whose name contains it.
        until: the time, by `time.perf_counter`, from which on no row begins.
    """

    device: str = "cpu"
    quick: bool = False
    ops: tuple[str, ...] = tuple(REGISTRY)
    backends: tuple[str, ...] = ()
    part: str = ""
    until: float = float("inf")

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


OPTIONS = pytest.StashKey[Options]()  # where pytest's configuration holds them


@dataclass(frozen=True)
class Row:
    """One sample of one op.

    Attributes:
        case: the sample.
        spec: shape, dtype and layout of its tensors.
        direction: "forward" or "backward", which time the raw op, or "both", which times the public function.
        compiled: whether torch.compile is among the candidates.
    """

    case: OpCase
    spec: Spec
    direction: str = "forward"
    compiled: bool = False

    @property
    def name(self) -> str:
        """The identity of the row, in which `Options.part` is looked for."""
        shape = "x".join(map(str, self.spec.shape))
        dtype = str(self.spec.dtype).removeprefix("torch.")
        return f"{self.case.name}-{self.direction}-{shape}-{dtype}-{self.spec.layout}"

    def candidates(self, options: Options) -> list[str]:
        """The names of all that is timed in turn.

        In both directions it is the public function, which the dispatcher gives to the op's owner.
        """
        op, found = self.case.registered, []
        if self.direction == BOTH:
            found.append(op.owner(options.device))
        else:
            found += options.backends_of(op)
            found += [COMPILED] if self.compiled and self.case.bench_compiled else []
        if self.has_usual:
            found += [USUAL, USUAL_COMPILED] if self.compiled else [USUAL]
        return [*found, COPY]

    @property
    def has_usual(self) -> bool:
        """Whether the code that is commonly written is a candidate."""
        raw = self.direction == "forward" and not self.case.differentiable
        return self.direction == BOTH or (raw and self.case.rival is not None)


def rows(options: Options) -> Iterator[Row]:
    """The rows of all ops, op by op."""
    for case in CASES.values():
        if case.op in options.ops:
            yield from (row for row in _rows_of(case, options) if options.part in row.name)


def _rows_of(case: OpCase, options: Options) -> Iterator[Row]:
    raw = "backward" if case.registered.backward_of else "forward"
    paired = bool(case.differentiable or case.registered.backward_of)
    first, *other_layouts = case.bench_layouts
    for turn, shape in enumerate(case.bench_shapes[:1] if options.quick else case.bench_shapes):
        full = turn == 0 and not options.quick
        plain = Spec(shape, torch.float32, first, device=options.device)
        yield Row(case, plain, raw, compiled=full or not (paired or options.quick))
        if case.differentiable:
            yield Row(case, plain, BOTH, compiled=not options.quick)
        if not full:
            continue
        if torch.bfloat16 in case.dtypes:
            half = Spec(shape, torch.bfloat16, first, device=options.device)
            yield Row(case, half, BOTH if case.differentiable else raw)
        for layout in other_layouts:
            yield Row(case, Spec(shape, torch.float32, layout, device=options.device), raw)
