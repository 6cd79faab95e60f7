"""Every op in torch's own checks of operators and in torch.compile, from the samples in op_cases."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from op_cases import CASES
from op_cases.budget import check_same_bits
from op_cases.case import Arguments, OpCase, requiring_grad, tensors_of
from op_cases.choice import leads
from op_cases.draw import Spec
from op_cases.running import written_arguments
from torch import Tensor

pytestmark = [
    pytest.mark.compiles,
    pytest.mark.usefixtures("poisoned_memory", "one_thread"),
]
each_signature = pytest.mark.covering(facts=lambda given: given["case"].signatures())
PUBLIC = [case for case in CASES.values() if case.function is not None]


def named(cases: Iterable[OpCase]) -> list[Any]:
    return [pytest.param(case, id=case.name) for case in cases]


def first(case: OpCase, layout: str = "contiguous") -> Arguments:
    """The arguments of the case's first shape."""
    return case.arguments(Spec(case.shapes[0], layout=layout))


@each_signature
@pytest.mark.parametrize("case", named(CASES.values()))
def test_opcheck(case: OpCase) -> None:
    """All of torch's checks on one sample; in other shapes and layouts those of schema and fake."""
    names = [a.name for a in case.registered.overload._schema.arguments]
    sample = first(case)
    if case.differentiable:
        sample = requiring_grad(case, sample)
    torch.library.opcheck(case.registered.overload, tuple(sample[name] for name in names))
    others = [Spec(case.shapes[0], layout=layout) for layout in ("mixed", "channels_last")]
    for spec in (Spec(case.shapes[1]), *others):
        arguments = case.arguments(spec)
        torch.library.opcheck(
            case.registered.overload,
            tuple(arguments[name] for name in names),
            test_utils=("test_schema", "test_faketensor"),
        )


def pairs(a: Arguments, b: Arguments, names: tuple[str, ...]) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(tensors_of(a, names), tensors_of(b, names), strict=True)


def check_compiled(case: OpCase, compiler: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(case.call_public, fullgraph=True, backend=compiler)
    # Each layout is traced anew. A case that follows another one of its kernel has the harder layout alone.
    for layout in ("contiguous", "channels_last") if leads(case) else ("channels_last",):
        arguments = first(case, layout)
        eager, traced = (requiring_grad(case, arguments) for _ in range(2))
        expected, results = case.call_public(eager), compiled(traced)
        for result, wanted in zip(results, expected, strict=True):
            check_same_bits(result, wanted, case.name)
            assert result.stride() == wanted.stride()
        if case.differentiable:
            expected[0].sum().backward()
            results[0].sum().backward()
        for rival, wanted in pairs(traced, eager, case.differentiable):
            check_same_bits(rival.grad, wanted.grad, case.name)
        for argument in written_arguments(case.registered):
            if eager[argument] is not None:
                check_same_bits(traced[argument], eager[argument], case.name)


@each_signature
@pytest.mark.parametrize("case", named(PUBLIC))
def test_compiles_to_one_graph(case: OpCase) -> None:
    check_compiled(case, "aot_eager")


@pytest.mark.parametrize(
    "case", named([CASES["angular_distance/same-dtype"], CASES["pgd_step_/linf"]])
)
def test_inductor_runs_it(case: OpCase) -> None:
    check_compiled(case, "inductor")
