"""Which shapes and layouts of an op a test takes, on a backend that is fast or slow."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from itertools import combinations

import torch
from covering import Facts, covering

from op_cases import CASES
from op_cases.case import DTYPES, LARGE_SHAPE, OpCase
from op_cases.draw import ALL_LAYOUTS, OVERLAPPING, Spec
from op_cases.running import emulated, interpreted, written_arguments

# So many elements are three parts of a sample, the last of them short, in C++ (kPart) and in CUDA C++. A larger
# sample only has more of them.
THREE_PARTS = (2, 3, 112, 113)


def _layouts(case: OpCase) -> tuple[str, ...]:
    """The layouts that the op takes: what is written to must not overlap itself."""
    writes = bool(written_arguments(case.registered))
    return tuple(name for name in ALL_LAYOUTS if not (writes and name in OVERLAPPING))


def specs(
    case: OpCase, device: str, name: str, dtype: torch.dtype, *, thorough: bool = False
) -> Iterator[Spec]:
    """The samples of a case on a backend in one dtype.

    The small shapes are a covering array of all samples of the op on the backend: `_facts` says what occurs.

    Args:
        case: of the op.
        device: a type of devices.
        name: the backend.
        dtype: of the float tensors.
        thorough: take every shape in every layout in float32, and a larger large shape, on kernels at full speed.
    """
    kind = kind_of(device, name)
    for place, layout in _small(case.op, kind, thorough)[case.name, dtype]:
        yield Spec(case.shapes[place], dtype, layout, seed=place, device=device)
    biggest = biggest_spec(case, device, name, thorough=thorough)
    if biggest.shape != case.shapes[0]:
        for layout in _large_layouts(case, device, name, dtype, thorough):
            yield replace(biggest, dtype=dtype, layout=layout)


# Most kernels have a path of their own for each of them.
LARGE_LAYOUTS = ("contiguous", "channels_last")
SLOW = ("emulator", "interpreter")


def kind_of(device: str, name: str) -> str:
    """Where a backend runs: "kernels" at full speed, "reference", or one of `SLOW`."""
    if name == "triton" and interpreted(device):
        return "interpreter"
    if name == "native" and emulated():
        return "emulator"
    return "reference" if name == "reference" else "kernels"


@cache  # which `_facts` asks of every combination
def leads(case: OpCase) -> bool:
    """Whether the case is its op's first one with the first word of its variant, which chooses a kernel.

    Such as "l2" of pgd_step, which "l2-masked" follows.
    """
    word = case.variant.partition("-")[0]
    words = [other.variant.partition("-")[0] for other in CASES.values() if other.op == case.op]
    return words.index(word) == _number(case)


@cache
def _number(case: OpCase) -> int:
    """The case's place among those of its op."""
    return [other.name for other in CASES.values() if other.op == case.op].index(case.name)


@cache
def _small(
    op: str, kind: str, thorough: bool
) -> Mapping[tuple[str, torch.dtype], list[tuple[int, str]]]:
    """The places of small shapes and their layouts, by the name of the case and by dtype."""
    product = [
        (case, dtype, place, layout)
        for case in CASES.values()
        if case.op == op
        for dtype in case.dtypes
        for place in range(len(case.shapes))
        for layout in _layouts(case)
    ]
    found = defaultdict(list)
    for chosen in covering([_facts(*sample, kind, thorough) for sample in product]):
        case, dtype, place, layout = product[chosen]
        found[case.name, dtype].append((place, layout))
    return found


def _facts(
    case: OpCase, dtype: torch.dtype, place: int, layout: str, kind: str, thorough: bool
) -> Facts:
    """What a sample of a small shape shows, each of which occurs in an op's samples on a backend.

    Every two values of dtype, shape, layout and case meet, and a case that leads has each dtype contiguous and in
    channels last. On kernels that run at full speed each case has pairs of its own, and a case that leads has
    every shape in every layout in float32. In Triton's interpreter no sample is in float16. In float32 an op's
    first case has every shape, each other case that leads every number of axes, and the rest their first shape.
    """
    shape, plain = case.shapes[place], dtype == torch.float32
    if kind == "interpreter":
        met: set[Hashable] = {(dtype, shape), (dtype, layout), (case.name, dtype)}
        if plain and leads(case):
            met.add((case.name, len(shape) if _number(case) else shape))
        elif plain and not place:  # which is not empty
            met.add((case.name, shape))
        return set() if dtype == torch.float16 else met
    found: set[Hashable] = set(combinations((dtype, shape, layout, case.name), 2))
    if leads(case) and layout in LARGE_LAYOUTS:
        found.add((case.name, dtype, layout))
    if kind == "kernels":
        found |= {(case.name, dtype, shape), (case.name, dtype, layout)}
        if plain and (thorough or leads(case)):
            found.add((case.name, shape, layout))
    return found


def _large_layouts(
    case: OpCase, device: str, name: str, dtype: torch.dtype, thorough: bool
) -> tuple[str, ...]:
    """The layouts of the large shape."""
    place, both = DTYPES.index(dtype), LARGE_LAYOUTS
    if name == "reference" and (place or not leads(case)):  # which leaves threads to torch
        return ()
    slow = kind_of(device, name) in SLOW
    if slow and dtype == torch.float16:
        return ()
    turn = place + _number(case)
    if (thorough or device != "cpu") and not slow:
        return (both[turn % 2],) if place else both
    if leads(case):
        return (both[turn % 2],) if place else both
    return (both[turn // 2 % 2],) if not place or turn % 2 else ()


def biggest_spec(case: OpCase, device: str, name: str, *, thorough: bool = False) -> Spec:
    """The large shape, or a smaller one on a CPU, and a small one where even that takes long."""
    small = case.large is None or (name == "triton" and interpreted(device))
    shape = case.shapes[0] if small else case.large
    whole = name != "reference" and not emulated() and (device != "cpu" or thorough)
    if shape == LARGE_SHAPE and not whole:
        shape = THREE_PARTS
    return Spec(shape, device=device)
