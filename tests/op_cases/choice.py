"""Which shapes and layouts of an op a test takes, on a backend that is fast or slow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from op_cases import CASES
from op_cases.case import DTYPES, LARGE_SHAPE, OpCase
from op_cases.draw import ALL_LAYOUTS, OVERLAPPING, Spec
from op_cases.running import emulated, interpreted, written_arguments

# So many elements are three parts of a sample, the last of them short; a larger sample only has more of them.
THREE_PARTS = (2, 3, 112, 113)


def _layouts(case: OpCase) -> tuple[str, ...]:
    """The layouts that the op takes: what is written to must not overlap itself."""
    writes = bool(written_arguments(case.registered))
    return tuple(name for name in ALL_LAYOUTS if not (writes and name in OVERLAPPING))


def specs(case: OpCase, device: str, name: str, dtype: torch.dtype) -> Iterator[Spec]:
    """Every shape in every layout in float32; in each other dtype the layouts take turns, another first.

    In float32 three layouts take turns in the reference, which leaves layouts and threads to torch and gets a
    large shape in float32 alone, and in the emulator, which is slow and gets no large shape in float16. In
    Triton's interpreter, which is slower, one layout does.

    Of an op's cases the first has all shapes in float32 in the interpreter, and every other case and dtype has
    every second one. In the emulator it has a large shape in two layouts and three dtypes, and the other cases
    have it in one layout and in every second dtype.
    """
    slow, first = name == "triton" and interpreted(device), dtype == torch.float32
    in_emulator = name == "native" and emulated()
    number = [other.name for other in CASES.values() if other.op == case.op].index(case.name)
    layouts, shift = _layouts(case), case.dtypes.index(dtype) + (number if slow else 0)
    at_once = 1 if slow or not first else 3 if in_emulator or name == "reference" else len(layouts)
    for turn, shape in enumerate(case.shapes):
        if slow and shift and (turn + shift) % 2:
            continue
        for more in range(at_once):
            # Five steps apart, so that a layout meets shapes of every kind.
            layout = layouts[(turn + shift + 5 * more) % len(layouts)]
            yield Spec(shape, dtype, layout, seed=turn, device=device)
    biggest = biggest_spec(case, device, name)
    if biggest.shape != case.shapes[0]:
        for layout in _large_layouts(name, dtype, number):
            yield replace(biggest, dtype=dtype, layout=layout)


def _large_layouts(name: str, dtype: torch.dtype, number: int) -> tuple[str, ...]:
    """The layouts of the large shape, for a case by its number in its op."""
    place = DTYPES.index(dtype)
    large = ("contiguous",) if place else ("contiguous", "channels_last")
    if name == "reference":
        return () if place else large
    if not (name == "native" and emulated()):
        return large
    if dtype == torch.float16:
        return ()
    if number == 0:
        return large
    if place:
        return () if (number + place) % 2 else large
    return (large[number % 2],)


def biggest_spec(case: OpCase, device: str, name: str) -> Spec:
    """The large shape, or a smaller one where it takes long, or where torch alone shares it out to threads."""
    small = case.large is None or (name == "triton" and interpreted(device))
    shape = case.shapes[0] if small else case.large
    if (emulated() or name == "reference") and shape == LARGE_SHAPE:
        shape = THREE_PARTS
    return Spec(shape, device=device)
