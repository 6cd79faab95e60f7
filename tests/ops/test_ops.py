"""Every op on every backend, from the samples in op_cases: what holds for all ops alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from itertools import takewhile
from typing import Any

import pytest
import torch
from op_cases import CASES
from op_cases.budget import check_budget, check_same_bits, truth_of
from op_cases.case import (
    Arguments,
    OpCase,
    as_tuple,
    mapped,
    replaced,
    requiring_grad,
    tensors_of,
)
from op_cases.choice import biggest_spec, specs
from op_cases.draw import Spec, arrange
from op_cases.remembered import Remembered
from op_cases.running import backends_of, interpreted, places, run, written_arguments
from torch import Tensor

from fastadv.ops import REGISTRY, backend

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")
other_dtype = pytest.mark.other_dtype
# Families whose Triton kernels handle half precision in a way of their own.
OWN_HALF = ("angular_distance", "linear_merger", "softmax_losses")


# Triton's interpreter is slow. It gets each kernel in float32 and float64. It gets bfloat16 where that is another
# path. It gets the bisection of an l1 step and arguments by sample only once.
def _bits_tell_most(given: Mapping[str, Any]) -> bool:
    case, dtype = given["case"], given["dtype"]
    if dtype != torch.bfloat16:
        return bool(dtype == torch.float32)
    apart = case.op not in (
        "pgd_step",
        "crop_flip",
    )  # pgd_step_ has its kernels; crop_flip moves bytes
    return apart and "per-sample" not in case.variant


def _budget_tells_most(given: Mapping[str, Any]) -> bool:
    case, dtype = given["case"], given["dtype"]
    if dtype == torch.float32 or dtype == torch.bfloat16:
        whole = dtype == torch.float32 or case.family in OWN_HALF
        return whole and dtype not in case.bit_equal
    apart = case.op not in ("pgd_step", "crop_flip") and "per-sample" not in case.variant
    return bool(dtype == torch.float64 and apart)


def _has_new_vectors(given: Mapping[str, Any]) -> bool:
    """Whether no earlier case of the op has them: its wrapper makes them dense for all kernels."""
    case = given["case"]
    earlier = takewhile(lambda other: other is not case, (c for c in ALL if c.op == case.op))
    return bool(_vectors(case).difference(*map(_vectors, earlier)))


def _vectors(case: OpCase) -> set[str]:
    arguments = _first(case)
    return {n for n in arguments if any(t.dim() == 1 for t in tensors_of(arguments, [n]))}


def _bits_say_it_all(case: OpCase, device: str, name: str, dtype: torch.dtype) -> bool:
    """Whether the backend must have the bits of the reference, whose own budget is checked, at the same shapes."""
    return name == "native" and dtype in case.bit_equal


def _parameters(cases: list[OpCase], *, dtypes: bool = False) -> list[Any]:
    """One parameter set per case, device and backend, and per dtype if asked; the op's name leads the id."""
    found = []
    for case in cases:
        for place in places(case.op):
            label = "-".join((case.name, *place.values))
            for dtype in case.dtypes if dtypes else ():
                suffix = str(dtype).removeprefix("torch.")
                values = (case, *place.values, dtype)
                marks = place.marks if dtype == torch.float32 else [*place.marks, other_dtype]
                found.append(pytest.param(*values, marks=marks, id=f"{label}-{suffix}"))
            if not dtypes:
                found.append(pytest.param(case, *place.values, marks=place.marks, id=label))
    return found


def _named(cases: list[OpCase]) -> list[Any]:
    return [pytest.param(case, id=case.name) for case in cases]


ALL = list(CASES.values())
PUBLIC = [case for case in ALL if case.function is not None]
DIFFERENTIABLE = [case for case in ALL if case.differentiable]


def _first(case: OpCase, device: str = "cpu", **changes: Any) -> Arguments:
    """The arguments of the case's first shape."""
    return case.arguments(Spec(case.shapes[0], device=device, **changes))


@pytest.mark.every_op
def test_every_op_has_cases() -> None:
    assert {case.op for case in ALL} == set(REGISTRY)
    for case in ALL:
        assert list(_first(case)) == [a.name for a in case.registered.overload._schema.arguments]


@pytest.mark.every_op
def test_uninitialised_memory_is_poisoned() -> None:
    assert torch.empty(3).isnan().all(), "the other tests rely on it"


@pytest.mark.interpreter(when=_budget_tells_most)
@pytest.mark.whole
@pytest.mark.parametrize(
    ("case", "device", "name", "dtype"),
    [p for p in _parameters(ALL, dtypes=True) if not _bits_say_it_all(*p.values)],
)
def test_within_budget_of_the_truth(
    case: OpCase, device: str, name: str, dtype: torch.dtype, pytestconfig: pytest.Config
) -> None:
    truth = Remembered(partial(truth_of, case))
    for spec in specs(case, device, name, dtype, thorough=pytestconfig.option.thorough):
        arguments = case.arguments(spec)
        results = run(case, arguments, name)
        check_budget(case, arguments, results, f"{name}, {spec}", truth)
        _check_layout(case, arguments, results, f"{name}, {spec}")


def _check_layout(
    case: OpCase, arguments: Arguments, results: tuple[Tensor, ...], where: str
) -> None:
    assert len(results) <= len(case.layout_of)
    for result, source in zip(results, case.layout_of, strict=False):
        if isinstance(source, str):
            like = arguments[source]
            expected = torch.empty_like(like) if source not in _written(case) else like
        else:
            expected = torch.empty(result.shape, memory_format=source, device="meta")
        assert result.stride() == expected.stride(), f"{case.name}: strides, {where}"


def _written(case: OpCase) -> tuple[str, ...]:
    return written_arguments(case.registered)


@pytest.mark.interpreter(when=_bits_tell_most)
@pytest.mark.parametrize(
    ("case", "device", "name", "dtype"),
    [p for p in _parameters(ALL, dtypes=True) if p.values[3] in p.values[0].bit_equal],
)
def test_same_bits_as_the_reference_in_every_layout(
    case: OpCase, device: str, name: str, dtype: torch.dtype, pytestconfig: pytest.Config
) -> None:
    reference = Remembered(lambda plain: run(case, plain, "reference"))
    for spec in specs(case, device, name, dtype, thorough=pytestconfig.option.thorough):
        arguments = case.arguments(spec)
        results = run(case, arguments, name)
        _check_layout(case, arguments, results, f"{name}, {spec}")
        for result, expected in zip(results, reference(arguments), strict=True):
            check_same_bits(result.cpu(), expected, f"{case.name}, {name}, {spec}")


@pytest.mark.other_order
@pytest.mark.parametrize(
    ("case", "device", "name"), [p for p in _parameters(ALL) if p.values[2] != "reference"]
)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_threads_and_repetition_do_not_change_a_bit(
    case: OpCase, device: str, name: str, layout: str, pytestconfig: pytest.Config
) -> None:
    arguments = case.arguments(replace(biggest_spec(case, device, name), layout=layout))
    threads = torch.get_num_threads()
    outcomes = []
    try:
        emulated = pytestconfig.pluginmanager.hasplugin("cuda_emulator.plugin")
        for count in (1, 1) if emulated else (1, 2, 5, 5):  # a CUDA kernel uses no threads of a CPU
            torch.set_num_threads(count)
            outcomes.append(run(case, arguments, name))
    finally:
        torch.set_num_threads(threads)
    for outcome in outcomes[1:]:
        for result, expected in zip(outcome, outcomes[0], strict=True):
            check_same_bits(result, expected, f"{case.name}, {name}")


@pytest.mark.parametrize(
    ("case", "device", "name"), _parameters([case for case in ALL if case.per_sample])
)
def test_the_place_in_the_batch_does_not_matter(case: OpCase, device: str, name: str) -> None:
    """Samples that move, or that are computed without the others, keep their results."""
    arguments = _with_ids(case, case.arguments(biggest_spec(case, device, name)))
    batch = tensors_of(arguments, _batched(case, arguments))[0].shape[0]
    results = run(case, arguments, name)
    bits = torch.float32 in case.bit_equal or name == "native"
    for chosen in (list(reversed(range(batch))), [batch - 1], [0] * batch):
        picked = mapped(arguments, lambda t, rows=chosen: t[rows], _batched(case, arguments))
        moved = run(case, picked, name)
        for index, (result, expected) in enumerate(zip(moved, results, strict=True)):
            if bits:
                where = f"{case.name} result {index}, {name}, samples {chosen}"
                check_same_bits(result, expected[chosen], where)
        if not bits:
            check_budget(case, picked, moved, f"{name}, samples {chosen}")


def _batched(case: OpCase, arguments: Arguments) -> list[str]:
    """The arguments that have a row per sample."""
    return [n for n in arguments if n not in case.shared and tensors_of(arguments, [n])]


def _with_ids(case: OpCase, arguments: Arguments) -> Arguments:
    """Where the samples' numbers follow their place in the batch, give them by name instead."""
    if "sample_ids" not in arguments or arguments["sample_ids"] is not None:
        return arguments
    first = tensors_of(arguments, _batched(case, arguments))[0]
    return {**arguments, "sample_ids": torch.arange(len(first), device=first.device)}


@pytest.mark.parametrize("case", _named(ALL))
def test_the_owner_is_what_runs_unforced(case: OpCase) -> None:
    owner = case.registered.owner("cpu")
    arguments = _first(case)
    for result, expected in zip(run(case, arguments), run(case, arguments, owner), strict=True):
        check_same_bits(result, expected, case.name)


@pytest.mark.parametrize(("case", "device", "name"), _parameters(PUBLIC))
def test_the_public_function_is_the_op(case: OpCase, device: str, name: str) -> None:
    arguments = _first(case, device)
    expected = run(case, arguments, name)
    with backend(name):
        results = case.call_public(mapped(arguments, torch.clone))
    assert results
    for result, wanted in zip(results, expected, strict=False):
        check_same_bits(result, wanted, case.name)


@pytest.mark.interpreter(when=_has_new_vectors)
@pytest.mark.parametrize(("case", "device", "name"), _parameters(PUBLIC))
def test_vectors_may_be_strided(case: OpCase, device: str, name: str) -> None:
    """Radii, labels, ids and other arguments of one axis, such as columns of a table."""
    arguments = _first(case, device)
    read = set(arguments) - set(_written(case))
    apart = mapped(arguments, lambda t: arrange(t, "slice") if t.dim() == 1 else t, read)
    expected = run(case, arguments, name)
    # The op itself, as a call of torch.ops reaches it, and the public function.
    for result, wanted in zip(run(case, apart, name), expected, strict=True):
        check_same_bits(result, wanted, case.name)
    with backend(name):
        results = case.call_public(apart)
    assert results
    for result, wanted in zip(results, expected, strict=False):
        check_same_bits(result, wanted, case.name)


@pytest.mark.parametrize(("case", "device", "name"), _parameters(PUBLIC))
def test_autocast_and_grad_mode_change_nothing(case: OpCase, device: str, name: str) -> None:
    arguments = _first(case, device)
    with backend(name):
        expected = case.call_public(mapped(arguments, torch.clone))
        with torch.autocast(device, torch.bfloat16):
            cast = case.call_public(mapped(arguments, torch.clone))
        with torch.no_grad():
            without = case.call_public(requiring_grad(case, arguments))
    for wanted, *rivals in zip(expected, cast, without, strict=True):
        for rival in rivals:
            check_same_bits(rival, wanted, case.name)
            assert not rival.requires_grad


@pytest.mark.parametrize(
    "case", _named([c for c in PUBLIC if not (c.has_gradient or written_arguments(c.registered))])
)
def test_results_without_a_gradient_require_none(case: OpCase) -> None:
    arguments = mapped(
        _first(case), lambda t: t.clone().requires_grad_() if t.is_floating_point() else t
    )
    assert not any(result.requires_grad for result in case.call_public(arguments))


@pytest.mark.interpreter
@pytest.mark.parametrize(("case", "device", "name"), _parameters(DIFFERENTIABLE))
def test_gradcheck(case: OpCase, device: str, name: str) -> None:
    # Along one random direction alone, and in one layout, where it is slow.
    slow = name == "triton" and interpreted(device)
    for layout in ("slice",) if slow else ("contiguous", "slice"):
        spec = Spec(case.gradient_shape, torch.float64, layout, device=device)
        arguments = requiring_grad(case, case.arguments(spec))

        def call(*values: Tensor, arguments: Arguments = arguments) -> Tensor:
            return case.call_public(replaced(arguments, case.differentiable, values))[0]

        with backend(name):
            leaves = tensors_of(arguments, case.differentiable)
            assert torch.autograd.gradcheck(call, leaves, fast_mode=slow)


@pytest.mark.parametrize(("case", "device", "name"), _parameters(DIFFERENTIABLE))
def test_only_the_gradients_asked_for_are_computed(case: OpCase, device: str, name: str) -> None:
    for wanted in case.differentiable:
        arguments = requiring_grad(case, _first(case, device))
        others = tensors_of(arguments, [n for n in case.differentiable if n != wanted])
        for leaf in others:
            leaf.requires_grad_(False)
        with backend(name):
            case.call_public(arguments)[0].sum().backward()
        assert all(leaf.grad is None for leaf in others)
        for leaf in tensors_of(arguments, [wanted]):
            assert leaf.grad.stride() == leaf.stride()
            assert not leaf.grad.isnan().any()


@pytest.mark.parametrize("case", _named(DIFFERENTIABLE))
def test_a_second_derivative_is_refused(case: OpCase) -> None:
    arguments = requiring_grad(case, _first(case))
    leaf = tensors_of(arguments, case.differentiable)[0]
    loss = case.call_public(arguments)[0].sum()
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{case.op} has no second derivative"):
        gradient.sum().backward()


@pytest.mark.refusals
@pytest.mark.parametrize(
    ("case", "index"),
    [
        pytest.param(case, i, id=f"{case.name}-{bad.argument}-{i}")
        for case in PUBLIC
        for i, bad in enumerate(case.bad)
    ],
)
def test_bad_arguments_are_refused_by_name(case: OpCase, index: int) -> None:
    bad = case.bad[index]
    good = case.keywords(_first(case))
    with pytest.raises(bad.error, match=rf"\b{bad.argument}\b"):
        case.function(**{**good, **bad.change(good)})


@pytest.mark.refusals
def test_every_public_function_has_bad_arguments() -> None:
    assert {c.function for c in PUBLIC if c.bad} == {c.function for c in PUBLIC}


@pytest.mark.parametrize("case", _named([c for c in ALL if _written(c)]))
def test_writing_in_place_leaves_the_neighbours_alone(case: OpCase) -> None:
    """Into every second element of a tensor: those between must stay."""
    for name in backends_of(case.registered, "cpu"):
        arguments = _first(case, layout="slice")
        target = arguments[_written(case)[0]]
        whole = target._base
        around = whole.clone()
        expected = run(case, arguments, name)[0]
        with backend(name):
            as_tuple(case.registered.overload(**arguments))
        check_same_bits(target, expected, name)
        target.zero_()
        changed = torch.as_strided(around, target.shape, target.stride(), target.storage_offset())
        changed.zero_()
        check_same_bits(whole, around, name)
