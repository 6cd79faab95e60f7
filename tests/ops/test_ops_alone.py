"""The ops in a program of one's own, which imports torch and fastadv.ops and nothing else of the package."""

from __future__ import annotations

import subprocess
import sys

import pytest
from paths import ROOT, environment

# fastadv.seeding is where a seed comes from that the caller does not give; kernels are the ops' own.
BELONGING = (
    "fastadv",
    "fastadv.kernels",
    "fastadv.ops",
    "fastadv.seeding",
    "fastadv.losses",
)

EVERY_OP = """
import torch
import fastadv.ops
from op_cases import CASES
from op_cases.case import requiring_grad, tensors_of
from op_cases.draw import Spec

torch.set_num_threads(1)
for case in CASES.values():
    arguments = case.arguments(Spec(case.shapes[0]))
    if case.function is None:
        continue
    home = fastadv.losses if case.family == "softmax_losses" else fastadv.ops
    assert getattr(home, case.function.__name__) is case.function
    arguments = requiring_grad(case, arguments)
    first = case.call_public(arguments)[0]
    if case.differentiable:
        first.sum().backward()
        assert all(leaf.grad is not None for leaf in tensors_of(arguments, case.differentiable))
    print("ran", case.name)
torch.export.default_decompositions()  # torch.compile begins with it: it looks up native ops of every package
"""

LISTED = """
import sys
print("modules", *sorted(name for name in sys.modules if name.split(".")[0] == "fastadv"))
"""
FIRST_USE = "import fastadv; fastadv.pgd_fused; fastadv.losses.arrest; fastadv.evaluate"


@pytest.fixture(scope="module")
def lines() -> list[str]:
    """What a process of its own prints, with the modules that the ops have loaded, and a first use."""
    done = subprocess.run(
        [sys.executable, "-c", EVERY_OP + LISTED + FIRST_USE + LISTED],
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def _foreign(lines: list[str], place: int) -> list[str]:
    """The modules of the package in one of the lists that do not belong to the ops."""
    names = [line for line in lines if line.startswith("modules")][place].split()[1:]
    assert "fastadv.ops.registry" in names
    return [
        n
        for n in names
        if not (
            n in BELONGING or n.startswith(("fastadv.ops.", "fastadv.kernels.", "fastadv.losses."))
        )
    ]


@pytest.mark.slow
@pytest.mark.processes
def test_every_op_runs_without_the_rest_of_the_package(lines: list[str]) -> None:
    """Which the package itself, whose import the ops' begins with, must not load either."""
    from op_cases import CASES

    ran = {line.removeprefix("ran ") for line in lines if line.startswith("ran ")}
    assert ran == {case.name for case in CASES.values() if case.function is not None}
    assert _foreign(lines, 0) == []


@pytest.mark.slow
@pytest.mark.processes
def test_the_rest_is_there_on_first_use(lines: list[str]) -> None:
    found = _foreign(lines, 1)
    assert {"fastadv.attacks", "fastadv.evaluation"} <= set(found)
    assert "fastadv.trainers" not in found


def test_all_public_names() -> None:
    import fastadv

    for name in fastadv.__all__:
        assert getattr(fastadv, name) is not None
    assert set(fastadv.__all__) <= set(dir(fastadv))
    namespace: dict[str, object] = {}
    exec("from fastadv import *", namespace)
    assert set(fastadv.__all__) <= set(namespace)
    with pytest.raises(AttributeError, match="no attribute 'pgd_fussed'"):
        fastadv.pgd_fussed  # noqa: B018
