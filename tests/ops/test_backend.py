"""Choosing a backend: what is forced runs, and what is not there is an error."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import pytest
import torch
from op_cases.running import has_triton

import fastadv
from fastadv.ops import REGISTRY, angular_distance, pgd_step, registry


def _step() -> torch.Tensor:
    x = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return pgd_step(x, x - 0.5, x, 0.1, 0.05)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the ops whose reference has been forced, in order."""
    seen: list[str] = []

    def spied(op: registry.Op) -> registry.Op:
        def reference(*args: Any, **kwargs: Any) -> Any:
            seen.append(op.name)
            return op.reference(*args, **kwargs)

        return dataclasses.replace(op, reference=reference)

    for name, op in list(REGISTRY.items()):
        monkeypatch.setitem(REGISTRY, name, spied(op))
    return seen


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match=r"backend must be one of native, triton.*got 'cuda'"):
        fastadv.backend("cuda").__enter__()


def test_the_reference_runs_where_it_is_forced(calls: list[str]) -> None:
    expected = _step()
    with fastadv.backend("native"):
        _step()
    assert calls == []
    with fastadv.backend("reference"):
        assert torch.equal(_step(), expected)
    assert calls == ["pgd_step"]
    _step()
    assert calls == ["pgd_step"]


def test_backward_is_forced_too(calls: list[str]) -> None:
    u, v = torch.randn(2, 3, 5).requires_grad_()
    with fastadv.backend("reference"):
        angular_distance(u, v).sum().backward()
    assert calls == ["angular_distance", "angular_distance_backward"]


def test_the_innermost_choice_counts(calls: list[str]) -> None:
    with fastadv.backend("reference"):
        with fastadv.backend("native"):
            _step()
        assert calls == []
        _step()
    assert calls == ["pgd_step"]


def test_an_exception_ends_the_choice(calls: list[str]) -> None:
    with pytest.raises(KeyError), fastadv.backend("reference"):
        raise KeyError("anything")
    _step()
    assert calls == []


def test_other_threads_are_not_affected(calls: list[str]) -> None:
    with fastadv.backend("reference"):
        thread = threading.Thread(target=_step)
        thread.start()
        thread.join()
    assert calls == []


def test_other_ops_are_left_alone() -> None:
    with fastadv.backend("reference"):
        assert torch.equal(torch.ones(3) + 1, torch.full((3,), 2.0))


ATTACKS: list[tuple[type[fastadv.attacks.Attack], dict[str, Any]]] = [
    (fastadv.PGD, {"steps": 1}),
    (fastadv.Square, {"queries": 4}),
    (fastadv.FAB, {"steps": 2}),
    (fastadv.APGD, {"steps": 3, "norm": "l1", "eps": 2.0}),
]


@pytest.mark.parametrize("name", ["native", "reference"])
@pytest.mark.parametrize(("kind", "settings"), ATTACKS, ids=lambda v: getattr(v, "__name__", ""))
def test_attacks_run_with_kernels_of_their_own(
    kind: Any, settings: dict[str, Any], name: str
) -> None:
    torch.manual_seed(0)
    x, y = torch.rand(3, 3, 6, 6), torch.arange(3)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(108, 3))
    attack = kind(model, seed=0, **settings)
    wanted = attack(x, y)
    engine = attack.last.engine
    with fastadv.backend(name):
        found = attack(x, y)
    assert torch.allclose(found, wanted, atol=1e-4) and attack.last.engine == engine


def test_native_where_there_is_none() -> None:
    x = torch.rand(2, 3, device="meta")
    with (
        fastadv.backend("native"),
        pytest.raises(RuntimeError, match=r"'native' has no kernel of pgd_step for meta tensors"),
    ):
        pgd_step(x, x, x, 0.1, 0.1)


@pytest.mark.skipif(has_triton(REGISTRY["pgd_step"], "cpu"), reason="the interpreter is on")
def test_triton_where_there_is_none() -> None:
    with fastadv.backend("triton"), pytest.raises(RuntimeError, match="triton backend needs"):
        _step()


def test_an_op_without_a_triton_kernel() -> None:
    op = dataclasses.replace(REGISTRY["pgd_step"], triton=None)
    with pytest.raises(RuntimeError, match="op pgd_step has no triton implementation"):
        op.triton_function()


def test_triton_that_cannot_be_imported() -> None:
    op = dataclasses.replace(REGISTRY["pgd_step"], triton="no_such_file:f")
    with pytest.raises(RuntimeError, match=r"pgd_step: the triton backend needs.*no_such_file"):
        op.triton_function()


@pytest.mark.parametrize("name", list(REGISTRY))
def test_owners(name: str) -> None:
    op = REGISTRY[name]
    assert op.owner("cpu") == "native"
    assert op.owner("xpu") == "reference"
    assert op.owner("cuda") in ("native", "triton")


def test_an_op_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match="op name must be new, got 'pgd_step' a second time"):
        registry.define(REGISTRY["pgd_step"])
