"""Run every native CUDA kernel on shapes that reach its corners. gpu.sh puts it under compute-sanitizer.

    compute-sanitizer --tool memcheck --error-exitcode 9 python bench/native_kernels.py

Sizes are small, as the sanitizer slows kernels down a hundredfold, and tensors are made on the CPU, to keep other
kernels out of it. One sample is large enough to be reduced in parts. Results are compared with the CPU's, so
that a run without findings is one that did its work.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))

from op_cases import CASES
from op_cases.case import Arguments, OpCase, mapped
from op_cases.draw import LAYOUTS, OVERLAPPING, Spec
from op_cases.running import run, written_arguments

IMAGES = ((3, 3, 7, 9), (2, 3, 8, 8))  # rows that are no multiple of 16 bytes, and that are
IN_PARTS = (1, 3, 112, 112)  # more elements than one block reduces


def specs(case: OpCase) -> Iterator[Spec]:
    """Every dtype, every layout, and one sample in parts."""
    in_place = bool(written_arguments(case.registered))
    layouts = [name for name in LAYOUTS if not (in_place and name in OVERLAPPING)]
    for shape in IMAGES:
        for dtype in case.dtypes:
            yield Spec(shape, dtype)
        for turn, layout in enumerate(layouts):
            yield Spec(shape, case.dtypes[turn % len(case.dtypes)], layout)
    if case.large is not None:
        yield Spec(IN_PARTS, torch.float32)
        yield Spec(IN_PARTS, torch.float64, "channels_last")


def on_device(arguments: Arguments) -> Arguments:
    """The same values, strides and offsets in the GPU's memory, by copies of whole storages."""

    def moved(t: Tensor) -> Tensor:
        storage = t.untyped_storage().cuda()
        return t.new_empty(0, device="cuda").set_(storage, t.storage_offset(), t.size(), t.stride())

    return mapped(arguments, moved)


def main() -> int:
    native = [case for case in CASES.values() if case.registered.has_native("cuda")]
    if not native:
        print("this build has no native CUDA kernel")
        return 1
    calls = 0
    for case in native:
        for spec in specs(case):
            arguments = case.arguments(spec)
            results = run(case, on_device(arguments), "native")
            for result, expected in zip(results, run(case, arguments, "native"), strict=True):
                torch.testing.assert_close(
                    result.cpu(), expected, rtol=0.02, atol=0.02, equal_nan=True
                )
            calls += 1
    print(f"{calls} calls of {len({case.op for case in native})} native ops")
    return 0


if __name__ == "__main__":
    sys.exit(main())
