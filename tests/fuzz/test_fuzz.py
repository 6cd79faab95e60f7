"""The first cases of each part of tests/fuzz, and how its script reports a failure."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

_FOLDER = Path(__file__).resolve().parent

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(_FOLDER))


@pytest.mark.parametrize(
    ("part", "cases"), [("ops", 40), ("attacks", 6), ("engine", 4), ("sequences", 4)]
)
def test_the_first_cases(part: str, cases: int) -> None:
    import fuzz

    for case in range(cases):
        fuzz.run_case(part, 0, case)


def test_a_failure_is_told_with_the_line_that_repeats_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import fuzz

    def fails(rng: random.Random) -> None:
        raise AssertionError("what was wrong")

    monkeypatch.setitem(fuzz.PARTS, "ops", fails)
    monkeypatch.setattr(sys, "argv", ["fuzz.py", "--only", "ops", "--seed", "3", "--case", "7"])
    assert fuzz._work(fuzz._options(), tmp_path / "case") == 1
    told = capsys.readouterr().out
    assert "python tests/fuzz/fuzz.py --only ops --seed 3 --case 7" in told
    assert "what was wrong" in told


def test_a_sequence_that_fails_is_shortened(monkeypatch: pytest.MonkeyPatch) -> None:
    import sequence_fuzz
    from sequence_fuzz import Step

    def one(rng: random.Random, scene: object) -> None:
        done.append("one")

    def other(rng: random.Random, scene: object) -> None:
        done.append("other")

    def fails(rng: random.Random, scene: object) -> None:
        assert "one" not in done, "what was wrong"

    def fresh(start: int, plan: list[Step]) -> None:
        done.clear()
        for step in plan:
            step.operation(random.Random(step.seed), None)

    done: list[str] = []
    monkeypatch.setattr(sequence_fuzz, "play", fresh)
    steps = [Step(operation, 0) for operation in (other, one, other, one, fails, other)]
    assert [step.operation for step in sequence_fuzz.shortened(0, steps)] == [one, fails]


def test_one_seed_gives_one_network() -> None:
    import networks

    one, other = (networks.random_network(random.Random(5), (3, 6, 6), 3) for _ in range(2))
    assert str(one) == str(other)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert a.equal(b)
