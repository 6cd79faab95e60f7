"""Replays of passes by any Python code: refused where no recording describes it; no tensor is kept."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest
import torch
from replay_helpers import Stub, images_of, is_replayed, pass_of
from torch import Tensor

from fastadv.engine import cpu_convolution as convolution
from fastadv.engine import replayed_program
from fastadv.engine.operator_calls import CallRecorder
from fastadv.engine.replayed_program import ReplayedProgram

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not convolution.available(), reason="programs need the compiled part"),
]


@pytest.fixture(autouse=True)
def _replay_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replay passes however little it saves."""
    monkeypatch.setattr(replayed_program, "_WORTH", 0.0)


@pytest.mark.parametrize("half", ["forward", "backward"])
def test_passes_whose_recording_fails_run_as_they_are(half: str, monkeypatch) -> None:
    own, forward = Stub(lambda x: x.flatten(1) * 2), [True]

    def dispatched(self: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if forward[0] == (half == "forward"):
            raise RuntimeError("this operator bears no watching")
        return func(*args, **(kwargs or {}))

    monkeypatch.setattr(CallRecorder, "__torch_dispatch__", dispatched)
    program = ReplayedProgram(own)  # type: ignore[arg-type]
    x = images_of((2, 3, 2, 2), 0)
    for turn in range(4):
        forward[0] = True
        logits, started = program.forward(x, True)
        forward[0] = False
        gradient = program.backward(started, torch.ones(2, 12))
        assert torch.equal(logits, x.flatten(1) * 2), turn
        assert gradient is not None and torch.equal(gradient, x * 24), turn


def through_numpy(x: Tensor) -> Tensor:
    return x.flatten(1) * torch.from_numpy(np.asarray(x.mean((1, 2, 3), keepdim=True)))[:, 0, 0]


def by_a_number(x: Tensor) -> Tensor:
    return x.flatten(1) * x.mean().item()


def by_a_choice(x: Tensor) -> Tensor:
    return x.flatten(1) if x.mean() > 0.5 else -x.flatten(1)


CONSTANT = torch.zeros(2, 12)


def written_outside(x: Tensor) -> Tensor:
    CONSTANT.copy_(x.flatten(1))
    return CONSTANT * 2


REFUSED = {
    "random": lambda x: x.flatten(1) + torch.rand_like(x.flatten(1)).mul(0).add(1),
    "by a number": by_a_number,
    "by a choice": by_a_choice,
    "written outside": written_outside,
    "in place": lambda x: x.flatten(1).clone().unsqueeze_(0)[0] * 2,
    "through NumPy": through_numpy,
}


@pytest.mark.parametrize("name", REFUSED)
def test_passes_that_no_recording_describes_are_not_replayed(name: str) -> None:
    stub = Stub(REFUSED[name])
    program = ReplayedProgram(stub)  # type: ignore[arg-type]
    for turn in range(6):
        x = images_of((2, 3, 2, 2), turn)
        logits, gradient = pass_of(program, x, True)
        assert torch.equal(logits, REFUSED[name](x)), turn
        assert gradient.shape == x.shape
    assert stub.passes == 6
    assert [kind.fault is not None for kind in program._kinds.values()] == [True]


def test_programs_with_code_of_others_are_not_replayed() -> None:
    stub = Stub(lambda x: x.flatten(1) * 2)
    programs = ReplayedProgram(stub, "code of others"), ReplayedProgram(stub)  # type: ignore
    x = images_of((2, 3, 2, 2), 0)
    for _ in range(4):
        for program in programs:
            pass_of(program, x, True)
    assert [is_replayed(program, x) for program in programs] == [False, True]


def test_numbers_that_are_no_numbers_do_not_hinder_replays() -> None:
    program = ReplayedProgram(Stub(lambda x: x.flatten(1) / 0))  # type: ignore[arg-type]
    x = torch.zeros(2, 3, 2, 2)
    for _ in range(4):
        assert pass_of(program, x, True)[0].isnan().all()
    assert is_replayed(program, x)


def test_replays_keep_no_tensor_longer_than_needed() -> None:
    def doubled_often(x: Tensor) -> Tensor:
        for _ in range(5):
            x = x * 2
        return x.flatten(1)

    program = ReplayedProgram(Stub(doubled_often))  # type: ignore[arg-type]
    x = images_of((2, 3, 2, 2), 0)
    for _ in range(3):
        pass_of(program, x, True)
    _, started = program.forward(x, True)
    assert started.values is not None
    assert sum(isinstance(value, Tensor) for value in started.values) == 2  # images and logits


def test_a_recorded_pass_keeps_no_tensor_longer_than_another() -> None:
    made: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def doubled_often(x: Tensor) -> Tensor:
        for _ in range(5):
            x = x * 2
            made.append(weakref.ref(x))
        alive.append(sum(tensor() is not None for tensor in made))
        made.clear()
        return x.flatten(1)

    program = ReplayedProgram(Stub(doubled_often))  # type: ignore[arg-type]
    x = images_of((2, 3, 2, 2), 0)
    for _ in range(4):
        pass_of(program, x, True)
    assert is_replayed(program, x)
    assert alive == [1, 1, 1]


def test_new_memory_at_the_place_of_freed_memory_is_another_tensor() -> None:
    def summed(x: Tensor) -> Tensor:
        total = x * 0
        for factor in range(20):
            total = total + (x * factor).exp()
        return total.flatten(1)

    program = ReplayedProgram(Stub(summed))  # type: ignore[arg-type]
    for turn in range(5):
        x = images_of((2, 3, 2, 2), turn)
        assert torch.equal(pass_of(program, x, True)[0], summed(x))
    assert is_replayed(program, x)


def test_a_saved_result_is_known_after_its_own_tensor_is_gone() -> None:
    """Autograd keeps the memory of an activation, in another tensor."""

    def squashed(x: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            value = (leaf * 3).sigmoid().exp().sum((2, 3))  # exp and sigmoid save their results
            (gradient,) = torch.autograd.grad(value.sum(), leaf)
        return gradient.flatten(1)

    program = ReplayedProgram(Stub(squashed))  # type: ignore[arg-type]
    for turn in range(5):
        x = images_of((2, 3, 2, 2), turn)
        assert torch.equal(pass_of(program, x, True)[0], squashed(x))
    assert is_replayed(program, x)


def test_a_view_that_nobody_has_made_is_noticed() -> None:
    recorder, x = CallRecorder(lambda tensor: False), torch.rand(4, 4)
    recorder.add(x)
    view = x[1:]
    with recorder:
        view.sum()
    assert recorder.fault is not None and "view" in recorder.fault
