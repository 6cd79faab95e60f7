"""Random calls of every op: native against the definition and the reference, whatever shape, layout and values."""

from __future__ import annotations

import math
import random
import warnings
from typing import Any

import numpy as np
import torch
from op_cases import CASES
from op_cases.budget import check_budget, check_same_bits
from op_cases.case import Arguments, OpCase, Shape, mapped, tensors_of
from op_cases.draw import Spec
from op_cases.running import run as call
from op_cases.running import written_arguments
from torch import Tensor

from fastadv.ops import backend

_ALL = list(CASES.values())
_PUBLIC = [case for case in _ALL if case.function is not None]
_SIZES = (0, 1, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 100, 129)
_MOST = 20000  # elements of a sample
_DOCUMENTED = (TypeError, ValueError, IndexError)


def run(rng: random.Random) -> None:
    """One op: good arguments in any layout, special values, wrong arguments."""
    case = rng.choice(_ALL)
    spec = Spec(random_shape(rng, case), rng.choice(case.dtypes), seed=rng.randrange(2**31))
    arguments = case.arguments(spec)
    where = f"{case.name}, {spec}"
    results = _check_good(rng, case, arguments, where)
    if case.per_sample and len(results[0].shape) and results[0].shape[0]:
        _check_special_values(rng, case, arguments, results, where)
    public = rng.choice(_PUBLIC)
    _check_wrong(rng, public, public.arguments(Spec(random_shape(rng, public, at_least=1))))


def random_shape(rng: random.Random, case: OpCase, at_least: int = 0) -> Shape:
    """Of the op's tensors, as its samples have it."""
    if "mean" in case.variant:  # that of an empty batch is NaN
        at_least = 1
    sizes = [size for size in _SIZES if size >= at_least]
    if case.family == "softmax_losses":
        return rng.choice(sizes), rng.choice([s for s in sizes if s >= 3] + [1000, 1001])
    if case.family == "linear_merger":
        widths = rng.choices(sizes, k=rng.randint(1, 6))
        return rng.choice(sizes), rng.choice([s for s in sizes if s]), *widths
    while True:
        axes = 4 if case.family == "crop_flip" else rng.choice((1, 2, 3, 4, 4, 4, 5, 6))
        shape = tuple(rng.choices(sizes, k=axes))
        if case.family == "crop_flip" and min(shape[1:]) == 0:
            continue
        if case.family in ("attention_map_distance", "pgd_step_per_channel") and axes == 1:
            continue
        if math.prod(shape) <= 3 * _MOST and math.prod(shape[1:]) <= _MOST:
            return shape


def random_layout(rng: random.Random, t: Tensor, writable: bool) -> Tensor:
    """The same values on other memory: axes in any order, steps, gaps, an offset, repeats where values repeat."""
    order = list(range(t.dim()))
    rng.shuffle(order)
    steps = [rng.choice((1, 1, 1, 2, 3)) if rng.random() < 0.4 else 1 for _ in order]
    gaps = [rng.choice((0, 0, 1)) if rng.random() < 0.3 else 0 for _ in order]
    sizes = [t.shape[axis] * steps[axis] + gaps[axis] for axis in order]
    offset = rng.choice((0, 0, 1, 3))
    memory = torch.zeros(offset + math.prod(sizes), dtype=t.dtype)
    memory.fill_(math.nan if t.is_floating_point() else 1)
    back = [order.index(axis) for axis in range(t.dim())]
    view = memory[offset:].view(sizes).permute(back)
    for axis in range(t.dim()):
        view = view.narrow(axis, gaps[axis], view.shape[axis] - gaps[axis])
        view = view[(slice(None),) * axis + (slice(None, None, steps[axis]),)]
    view.copy_(t)
    if not writable and t.dim() and t.shape[0] and rng.random() < 0.1:
        return view[:1].expand(t.shape) if torch.equal(t, t[:1].expand(t.shape)) else view
    return view


def _arranged(rng: random.Random, case: OpCase, arguments: Arguments) -> Arguments:
    written = written_arguments(case.registered)
    dense = {"counts", *(n for n in arguments if n.endswith("_per_sample"))}  # made by the package

    def arranged(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [arranged(name, part) for part in value]
        if not isinstance(value, Tensor) or name in dense:
            return value
        return random_layout(rng, value, name in written)

    return {name: arranged(name, value) for name, value in arguments.items()}


def _check_good(
    rng: random.Random, case: OpCase, arguments: Arguments, where: str
) -> tuple[Tensor, ...]:
    results = call(case, arguments, "native")
    check_budget(case, arguments, results, f"native, {where}")
    reference = call(case, arguments, "reference")
    arranged = _arranged(rng, case, arguments)
    torch.set_num_threads(rng.choice((2, 3, 5)))
    try:
        again = call(case, arranged, "native")
    finally:
        torch.set_num_threads(1)
    strides = [t.stride() for t in tensors_of(arranged)]
    same = any(t.dtype in case.bit_equal for t in tensors_of(arguments))
    for index, result in enumerate(results):
        label = f"result {index} of {where}"
        if same and torch.float64 not in {t.dtype for t in tensors_of(arguments)}:
            check_same_bits(result, reference[index], f"{label}, reference")
            check_same_bits(again[index], result, f"{label}, strides {strides}")
    check_budget(case, arguments, again, f"native, strides {strides}, {where}")
    return results


_SPECIAL = (math.nan, math.inf, -math.inf, -0.0, 1e-40, -1e-42, 1e-30, 0.0)


def _check_special_values(
    rng: random.Random,
    case: OpCase,
    arguments: Arguments,
    plain: tuple[Tensor, ...],
    where: str,
) -> None:
    """One sample has special values: the others keep their results, and the backends agree on it."""
    # What a forward op has kept for its backward op is not of the caller's choice.
    backward = case.registered.backward_of is not None
    names = [
        n for n in arguments
        if n not in case.shared and not n.endswith(("_per_sample", "limits")) and (n == "grad" or not backward)
        and any(t.is_floating_point() and t.numel() for t in tensors_of(arguments, [n]))
    ]  # fmt: skip
    if not names:
        return
    row = rng.randrange(plain[0].shape[0])
    chosen = rng.sample(names, rng.randint(1, len(names)))

    def planted(t: Tensor) -> Tensor:
        if not t.is_floating_point() or not t.numel() or row >= t.shape[0]:
            return t
        t = t.clone()
        flat = t[row].reshape(-1).clone()
        for _ in range(rng.choice((1, 1, 3, 50))):
            flat[rng.randrange(flat.numel())] = rng.choice(_SPECIAL)
        t[row] = flat.view(t[row].shape)
        return t

    special = mapped(arguments, planted, chosen)
    where = f"special values in {chosen} of sample {row}, {where}"
    native, reference = (call(case, special, name) for name in ("native", "reference"))
    for index, (result, other, before) in enumerate(zip(native, reference, plain, strict=True)):
        if not result.dim() or result.shape[0] != plain[0].shape[0]:
            continue
        rest = [i for i in range(result.shape[0]) if i != row]
        check_same_bits(result[rest], before[rest], f"other samples, result {index}, {where}")
        if (
            any(t.dtype in (torch.float32,) for t in tensors_of(special))
            and torch.float32 in case.bit_equal
        ):
            check_same_bits(result[row], other[row], f"result {index}, {where}, reference")
        elif result.is_floating_point():
            sound = [bool(r[row].isfinite().all()) for r in (result, other)]
            assert sound[0] == sound[1], (
                f"result {index}, {where}: finite in native and reference: {sound}"
            )


def _wrong_values(rng: random.Random, good: Any) -> Any:
    """Something that an argument is not made for."""
    found: list[Any] = [
        None, "text", "8/255", 1.5, -1, 2**70, -(2**63) - 1, math.nan, math.inf, -0.0, True, [], [1.0], {}, (),
        object(), 1j, b"x", np.float32(0.5), np.zeros(3), float, lambda: 0, slice(3), range(2),
        torch.tensor(1.0), torch.zeros(0), torch.zeros(3, dtype=torch.complex64), torch.zeros(3, 2, device="meta"),
        torch.zeros(2, 3).to_sparse(), torch.zeros(2, dtype=torch.int8), torch.zeros(3, dtype=torch.bool),
        torch.zeros(2, 3).to_mkldnn(), torch.zeros(3, 2).to_sparse_csr(),
    ]  # fmt: skip
    if isinstance(good, Tensor):
        found += [
            good[:0], good[None], good.reshape(-1), good.to_sparse() if good.dim() else good,
            good.to("meta"), good.to(torch.complex64), good.to(torch.int32), good.double(), good.half(),
            good.tolist(), good.numpy() if good.dtype != torch.bfloat16 else None, torch.cat((good, good)),
            good[..., :-1] if good.dim() else good, good.to(torch.uint8), good.bool(),
            torch.nn.Parameter(good) if good.is_floating_point() else good, good.expand(3, *good.shape),
        ]  # fmt: skip
    elif isinstance(good, list):
        found += [good * 2, good[:-1], [None], [*good, "x"], good[0], tuple(good), [torch.zeros(3)]]
    return rng.choice(found)


def _check_wrong(rng: random.Random, case: OpCase, arguments: Arguments) -> None:
    """A call with one wrong argument succeeds, or is refused in documented words."""
    good = case.keywords(arguments)
    good = {n: v.clone() if isinstance(v, Tensor) else v for n, v in good.items()}
    name = rng.choice(list(good))
    value = _wrong_values(rng, good[name])
    assert case.function is not None
    what = f"{case.function.__name__}({name}={_shown(value)})"
    try:
        with warnings.catch_warnings(), backend(rng.choice(("native", "native", "reference"))):
            warnings.simplefilter("ignore")
            case.function(**{**good, name: value})
    except _DOCUMENTED as error:
        others = [other for other in good if other in str(error)]
        assert others, f"{what} is refused without naming an argument: {error!r}"
    except RuntimeError as error:
        documented = "require grad" in str(error) or "has no kernel" in str(error)
        assert documented, f"{what} raises {str(error)[:300]!r}"


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)} {value.layout} on {value.device}"
    return repr(value)[:80]
