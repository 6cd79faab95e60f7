"""The samples that the op tests take of each op: few of the product, in which every two values meet."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from itertools import combinations, product

import pytest
import torch
from covering import Facts
from op_cases import CASES, choice
from op_cases.case import OpCase
from op_cases.draw import Spec

BY_OP = {
    op: [case for case in CASES.values() if case.op == op]
    for op in dict.fromkeys(case.op for case in CASES.values())
}
# Backends by the names that `choice` is asked with, and where they run.
WHERE = {
    "kernels": "native",
    "reference": "reference",
    "emulator": "native",
    "interpreter": "triton",
}
INTERPRETED = (torch.float32, torch.float64, torch.bfloat16)


def _samples(cases: list[OpCase], kind: str, **options: bool) -> Iterator[tuple[OpCase, Spec]]:
    """Those of a small shape."""
    for case in cases:
        for dtype in case.dtypes:
            for spec in choice.specs(case, "cpu", WHERE[kind], dtype, **options):
                if spec.shape in case.shapes:
                    yield case, spec


def _met(case: OpCase, spec: Spec) -> Facts:
    return set(combinations((spec.dtype, spec.shape, spec.layout, case.name), 2))


@pytest.fixture(params=WHERE)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    kind: str = request.param
    monkeypatch.setattr(choice, "kind_of", lambda device, name: kind)
    return kind


@pytest.mark.parametrize("op", BY_OP)
def test_every_two_values_meet(op: str, kind: str) -> None:
    """Dtypes, shapes, layouts and cases of an op."""
    wanted: set[Hashable] = set()
    for case in BY_OP[op]:
        dtypes = [d for d in case.dtypes if kind != "interpreter" or d in INTERPRETED]
        for dtype, shape, layout in product(dtypes, case.shapes, choice._layouts(case)):
            if kind == "interpreter":
                wanted |= {(dtype, shape), (dtype, layout), (dtype, case.name)}
            else:
                wanted |= _met(case, Spec(shape, dtype, layout))
    found = set().union(*(_met(case, spec) for case, spec in _samples(BY_OP[op], kind)))
    assert wanted <= found


@pytest.mark.parametrize("op", BY_OP)
def test_the_first_case_of_a_kernel_has_more(op: str, kind: str) -> None:
    for case in BY_OP[op]:
        found = [spec for _, spec in _samples([case], kind)]
        plain = {spec.shape for spec in found if spec.dtype == torch.float32}
        if kind == "interpreter":
            assert plain == set(case.shapes) or case != BY_OP[op][0]
            assert set(map(len, plain)) == set(map(len, case.shapes)) or not choice.leads(case)
            assert case.shapes[0] in plain or choice.leads(case)
        elif choice.leads(case):
            wanted = set(product(case.dtypes, choice.LARGE_LAYOUTS))
            assert wanted <= {(spec.dtype, spec.layout) for spec in found}


@pytest.mark.parametrize("op", BY_OP)
def test_kernels_get_more(op: str) -> None:
    """Each case its own pairs with a dtype; a case that leads each shape in each layout in float32."""
    for case in BY_OP[op]:
        found = [spec for _, spec in _samples([case], "kernels")]
        layouts = choice._layouts(case)
        dtypes = {(spec.dtype, value) for spec in found for value in (spec.shape, spec.layout)}
        assert dtypes >= set(product(case.dtypes, (*case.shapes, *layouts)))
        plain = {(spec.shape, spec.layout) for spec in found if spec.dtype == torch.float32}
        if choice.leads(case):
            assert plain == set(product(case.shapes, layouts))


def test_all_combinations_are_there_on_demand() -> None:
    for case in CASES.values():
        found = {
            (spec.shape, spec.layout)
            for _, spec in _samples([case], "kernels", thorough=True)
            if spec.dtype == torch.float32
        }
        assert found == set(product(case.shapes, choice._layouts(case)))


@pytest.mark.parametrize("op", [op for op, cases in BY_OP.items() if cases[0].large])
def test_a_large_shape_comes_in_every_dtype_and_in_both_layouts(op: str) -> None:
    found = set()
    for case in BY_OP[op]:
        for dtype in case.dtypes:
            large = choice.biggest_spec(case, "cpu", "native").shape
            for spec in choice.specs(case, "cpu", "native", dtype):
                if spec.shape == large:
                    found |= {spec.dtype, spec.layout}
    assert found >= {*BY_OP[op][0].dtypes, "contiguous", "channels_last"}


def test_the_first_case_of_a_kernel_leads() -> None:
    leading = [case.variant for case in BY_OP["pgd_step"] if choice.leads(case)]
    assert leading == ["linf", "l2", "l1"]
