"""Every public op under torch.func: vmap against a loop over slices, grad against autograd, clear refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from op_cases import CASES
from op_cases.budget import check_same_bits
from op_cases.case import Arguments, OpCase, as_tuple, replaced, requiring_grad, tensors_of
from op_cases.draw import Spec
from op_cases.running import written_arguments
from torch import Tensor
from torch.func import functionalize, grad, hessian, jacrev, jvp, vmap

from fastadv.ops import (
    REGISTRY,
    angular_distance,
    crop_flip,
    linear_merger,
    pgd_step_,
    random_start,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")

SLICES = 3
Dims = tuple[int | None, ...]


def _named(cases: list[OpCase]) -> list[Any]:
    return [pytest.param(case, id=case.name) for case in cases]


PUBLIC = [case for case in CASES.values() if case.function is not None]
FUNCTIONAL = [case for case in PUBLIC if not written_arguments(case.registered)]
DIFFERENTIABLE = [case for case in FUNCTIONAL if case.differentiable]


def _samples(case: OpCase, dtype: torch.dtype = torch.float32) -> list[Arguments]:
    return [case.arguments(Spec(case.shapes[0], dtype, seed=i)) for i in range(SLICES)]


def _with_rows(case: OpCase) -> list[str]:
    """The arguments to vmap over, differentiable ones first: those with a row per sample, else all tensors."""
    arguments = _samples(case)[0]
    names = case.registered.batched
    names = tuple(arguments) if names is None else names
    ordered = sorted(names, key=lambda name: name not in case.differentiable)
    return [name for name in ordered if tensors_of(arguments, [name])]


def _float_arguments(case: OpCase) -> list[str]:
    arguments = _samples(case)[0]
    return [n for n in arguments if any(t.is_floating_point() for t in tensors_of(arguments, [n]))]


def _of_tensors(
    case: OpCase, arguments: Arguments, names: list[str]
) -> Callable[..., tuple[Tensor, ...]]:
    """The public function of the tensors of some arguments alone."""
    return lambda *tensors: case.call_public(replaced(arguments, names, tensors))


def _stacked(samples: list[Arguments], names: list[str], dims: Dims) -> list[Tensor]:
    """The tensors of all slices along the axes given; where an axis is None, those of the first."""
    slices = zip(*(tensors_of(sample, names) for sample in samples), strict=True)
    return [
        tensors[0] if dim is None else torch.stack(tensors, dim)
        for tensors, dim in zip(slices, dims, strict=True)
    ]


def _at(tensors: list[Tensor], dims: Dims, i: int) -> list[Tensor]:
    """The tensors of one slice."""
    return [t if d is None else t.select(d, i) for t, d in zip(tensors, dims, strict=True)]


def _check_against_loop(
    case: OpCase, function: Callable[..., Any], tensors: list[Tensor], dims: Dims
) -> None:
    found = vmap(function, in_dims=dims)(*tensors)
    alone = [function(*_at(tensors, dims, i)) for i in range(SLICES)]
    for result, *wanted in zip(found, *alone, strict=True):
        expected = torch.stack(wanted)
        if torch.float32 in case.bit_equal:
            check_same_bits(result, expected, f"{case.name}, {dims}")
        else:  # torch's own ops around it, and BLAS, may sum in another order
            torch.testing.assert_close(result, expected)


def _dims(case: OpCase, kind: str) -> Dims:
    tensors = tensors_of(_samples(case)[0], _with_rows(case))
    if kind == "first axis":
        return (0,) * len(tensors)
    if kind == "other axes":
        return tuple(t.dim() - i % 2 for i, t in enumerate(tensors))
    chosen = {"only the first": 0, "only the last": len(tensors) - 1}[kind]
    return tuple(0 if i == chosen else None for i in range(len(tensors)))


KINDS = ("first axis", "other axes", "only the first", "only the last")
every_case_and_kind = pytest.mark.covering(
    facts=lambda given: {
        given["case"].name,
        *((fact, given["kind"]) for fact in given["case"].signatures()),
    }
)


@every_case_and_kind
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", _named(FUNCTIONAL))
def test_vmap_is_a_loop_over_the_slices(case: OpCase, kind: str) -> None:
    samples, names, dims = _samples(case), _with_rows(case), _dims(case, kind)
    function = _of_tensors(case, samples[0], names)
    _check_against_loop(case, function, _stacked(samples, names, dims), dims)


@pytest.mark.parametrize(
    "name",
    [
        "angular_distance_backward/u",
        "euclidean_distance_backward/squared-bfloat16-v",
        "vanilla_feature_distillation_backward/clean",
    ],
)
def test_a_result_that_was_not_asked_for_is_empty_in_every_slice(name: str) -> None:
    case = CASES[name]
    samples, names = _samples(case), _with_rows(case)

    def op(*tensors: Tensor) -> tuple[Tensor, ...]:
        return as_tuple(case.registered.overload(*replaced(samples[0], names, tensors).values()))

    assert any(result.shape == (0,) for result in op(*tensors_of(samples[0], names)))
    dims = (0,) * len(tensors_of(samples[0], names))
    _check_against_loop(case, op, _stacked(samples, names, dims), dims)


@every_case_and_kind
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", _named(DIFFERENTIABLE))
def test_vmap_over_grad(case: OpCase, kind: str) -> None:
    """Also the gradient in what all slices share: one per slice."""
    samples, names, dims = _samples(case), _with_rows(case), _dims(case, kind)
    shared = [name for name in case.differentiable if name not in names]
    tensors = _stacked(samples, names, dims) + tensors_of(samples[0], shared)
    dims += (None,) * len(tensors_of(samples[0], shared))
    owners = [n for n in names + shared for _ in tensors_of(samples[0], [n])]
    wanted = tuple(i for i, owner in enumerate(owners) if owner in case.differentiable)
    function = _of_tensors(case, samples[0], names + shared)
    gradient = grad(lambda *values: function(*values)[0].square().sum(), wanted)
    _check_against_loop(case, gradient, tensors, dims)


@pytest.mark.parametrize("case", _named(DIFFERENTIABLE))
def test_grad_is_that_of_autograd(case: OpCase) -> None:
    arguments = requiring_grad(case, _samples(case)[0])
    names = list(case.differentiable)
    leaves = tensors_of(arguments, names)
    function = _of_tensors(case, arguments, names)
    expected = torch.autograd.grad(function(*leaves)[0].square().sum(), leaves)
    plain = [leaf.detach() for leaf in leaves]
    every = tuple(range(len(leaves)))
    found = grad(lambda *values: function(*values)[0].square().sum(), every)(*plain)
    for result, wanted in zip(found, expected, strict=True):
        check_same_bits(result, wanted, case.name)


@pytest.mark.parametrize("case", _named(DIFFERENTIABLE))
def test_gradients_flow_through_vmap(case: OpCase) -> None:
    """Autograd outside, vmap inside; and grad of a vmap, and jacrev, which is a vmap of its own."""
    samples, names = _samples(case, torch.float64), _with_rows(case)
    dims = (0,) * len(tensors_of(samples[0], names))
    tensors = _stacked(samples, names, dims)
    function = _of_tensors(case, samples[0], names)

    def loss(first: Tensor) -> Tensor:
        return vmap(function)(first, *tensors[1:])[0].square().sum()

    def loop(first: Tensor) -> Tensor:
        alone = (function(*_at([first, *tensors[1:]], dims, i))[0] for i in range(SLICES))
        return torch.stack([result.square().sum() for result in alone]).sum()

    leaf = tensors[0].clone().requires_grad_()
    (expected,) = torch.autograd.grad(loop(leaf), leaf)
    torch.testing.assert_close(torch.autograd.grad(loss(leaf), leaf)[0], expected)
    torch.testing.assert_close(grad(loss)(tensors[0]), expected)
    first, *others = _at(tensors, dims, 0)
    jacobian = jacrev(lambda t: function(t, *others)[0].square().sum())(first)
    torch.testing.assert_close(jacobian, expected[0])


@pytest.mark.parametrize("case", _named(DIFFERENTIABLE))
def test_what_has_no_formula_is_refused(case: OpCase) -> None:
    """Plain torch leaves the tangent of such an op out without a word."""
    arguments, names = _samples(case)[0], list(case.differentiable)
    first, *others = tensors_of(arguments, names)
    function = _of_tensors(case, arguments, names)

    def squares(t: Tensor) -> Tensor:
        return function(t, *others)[0].square().sum()

    with pytest.raises(RuntimeError, match=f"{case.op} has no forward-mode derivative"):
        jvp(squares, (first,), (torch.ones_like(first),))
    with pytest.raises(RuntimeError, match=r"has no (second|forward-mode) derivative"):
        hessian(squares)(first)
    with pytest.raises(RuntimeError, match=f"{case.op} has no second derivative"):
        grad(lambda t: grad(squares)(t).sum())(first)


@pytest.mark.parametrize(
    "case", _named([c for c in FUNCTIONAL if not c.has_gradient and _float_arguments(c)])
)
def test_results_without_a_gradient_have_none_in_grad_and_jvp(case: OpCase) -> None:
    arguments, names = _samples(case)[0], _float_arguments(case)
    first, *others = tensors_of(arguments, names)
    function = _of_tensors(case, arguments, names)

    def loss(t: Tensor) -> Tensor:
        return function(t, *others)[0].sum() + t.sum()

    ones = torch.ones_like(first)
    assert torch.equal(grad(loss)(first), ones)
    assert float(jvp(loss, (first,), (ones,))[1]) == ones.numel()


@pytest.mark.parametrize("case", _named(FUNCTIONAL))
def test_functionalize_changes_nothing(case: OpCase) -> None:
    arguments, names = _samples(case)[0], _with_rows(case)
    function, tensors = _of_tensors(case, arguments, names), tensors_of(arguments, names)
    for result, wanted in zip(functionalize(function)(*tensors), function(*tensors), strict=True):
        check_same_bits(result, wanted, case.name)


@pytest.mark.compiles
@pytest.mark.parametrize(
    "case", _named([CASES["angular_distance/same-dtype"], CASES["linear_merger/bias"]])
)
def test_compiled_vmap_over_grad(case: OpCase) -> None:
    samples, names = _samples(case), _with_rows(case)
    dims = (0,) * len(tensors_of(samples[0], names))
    function, tensors = _of_tensors(case, samples[0], names), _stacked(samples, names, dims)
    per_slice = vmap(grad(lambda *values: function(*values)[0].square().sum()))
    torch._dynamo.reset()
    compiled = torch.compile(per_slice, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), per_slice(*tensors), rtol=0, atol=0)


def test_nested_vmap() -> None:
    u, v = torch.randn(2, 2, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    found = vmap(vmap(angular_distance, 1), 0)(u, v)
    for i in range(2):
        for j in range(3):
            check_same_bits(found[i, j], angular_distance(u[i, :, j], v[i, :, j]), (i, j))


def test_every_op_says_which_arguments_have_rows() -> None:
    for op in REGISTRY.values():
        names = [argument.name for argument in op.overload._schema.arguments]
        assert set(op.batched or ()) <= set(names), op.name
    for case in CASES.values():
        assert not case.shared & set(case.registered.batched or ()), case.name


@pytest.mark.parametrize("case", _named([c for c in FUNCTIONAL if c.registered.batched]))
def test_what_the_rows_share_cannot_be_vmapped(case: OpCase) -> None:
    arguments = _samples(case)[0]
    for name in sorted(case.shared & set(arguments)):
        tensors = [t.expand(SLICES, *t.shape) for t in tensors_of(arguments, [name])]
        if tensors:
            function = _of_tensors(case, arguments, [name])
            message = rf"{case.op} cannot be vmapped over {name}.*Python loop"
            with pytest.raises(RuntimeError, match=message):
                vmap(function)(*tensors)


def test_a_gradient_that_sums_over_the_batch_is_one_per_slice() -> None:
    """The merger's weight, shared by two slices of two rows each: no slice sees the other's rows."""
    features = torch.tensor([[[1.0], [2.0]], [[10.0], [20.0]]])
    weight = torch.ones(1, 1)
    per_slice = vmap(grad(lambda w, x: linear_merger([x], w).sum()), (None, 0))(weight, features)
    assert per_slice.flatten().tolist() == [3.0, 30.0]


def test_writing_in_place_cannot_be_vmapped() -> None:
    images = torch.rand(SLICES, 2, 3)
    with pytest.raises(RuntimeError, match=r"pgd_step_ writes to its arguments.*outside vmap"):
        vmap(lambda x: pgd_step_(x.clone(), x, x, 0.1, 0.1))(images)


def test_all_slices_draw_the_numbers_of_the_seed() -> None:
    images = torch.full((SLICES, 2, 9), 0.5)
    drawn = vmap(lambda x: random_start(x, 0.1, seed=7))(images)
    for result in drawn:
        check_same_bits(result, random_start(images[0], 0.1, seed=7), "seed 7")
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(lambda x: random_start(x, 0.1))(images)  # a seed would have to be drawn
    same = vmap(lambda x: random_start(x, 0.1), randomness="same")(images)
    assert torch.equal(same[0], same[1]) and not torch.equal(same[0], images[0])


def test_a_vmapped_index_out_of_range_is_refused() -> None:
    images = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(IndexError, match=r"indices must be in 0 .. 3, got 4"):
        vmap(lambda i: crop_flip(images, i, seed=0))(torch.tensor([[0, 1], [4, 0]]))
