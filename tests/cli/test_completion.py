"""Tab completion: what the shell is offered, asked for as the shell asks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from processes import ran

from fastadv.trainers import method_names

pytest.importorskip("argcomplete")
pytestmark = [pytest.mark.slow, pytest.mark.processes]

# Each line of the argument is a command line with the cursor at its end. One process answers all of them.
PROGRAM = r"""
import json, os, sys
from fastadv.cli import main

answers = {}
for line in json.loads(sys.argv[1]):
    asked = {"COMP_LINE": line, "COMP_POINT": str(len(line.encode())), "COMP_TYPE": "9"}
    shell = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_STDOUT_FILENAME": "answer"}
    os.environ.update(asked | shell)
    open("answer", "w").close()
    try:
        status = main([])
    except SystemExit as end:
        status = end.code
    answers[line] = [status, [word.strip() for word in open("answer").read().split("\n") if word]]
print(json.dumps(answers))
"""

LINES = (
    "fastadv ",
    "fastadv re",
    "fastadv train ",
    "fastadv train arrest --no-",
    "fastadv train arrest --max_bad",
    "fastadv train arrest --quiet --ep",
    "fastadv train pgd_at --schedule.h",
    "fastadv train pgd_at --data ",
    "fastadv train pgd_at --model small",
    "fastadv train pgd_at --precision ",
    "fastadv train pgd_at --epochs ",
    "fastadv train hat --teacher ",
    "fastadv train nosuch --",
    "fastadv sweep pgd_at --grid lr=1 --",
    "fastadv eval run --attacks clean pg",
    "fastadv eval run --max-ex",
    "fastadv analyse run --what co",
    "fastadv reproduce afs/figure5",
    "fastadv reproduce afs/table1 --scale ",
    "fastadv data ",
)


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    folder = tmp_path_factory.mktemp("shell")
    (folder / "weights.pt").write_text("")
    done = ran(["-c", PROGRAM, json.dumps(LINES)], cwd=folder)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {line: status for line, (status, _) in found.items() if status} == {
        "fastadv train nosuch --": 2
    }
    return {line: words for line, (_, words) in found.items()}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("fastadv re", ["reproduce", "report"]),
        ("fastadv train ", method_names()),
        ("fastadv train arrest --max_bad", ["--max_bad_steps"]),
        ("fastadv train arrest --quiet --ep", ["--epochs", "--eps"]),
        ("fastadv train pgd_at --schedule.h", ["--schedule.help"]),
        ("fastadv train pgd_at --model small", ["small_cnn"]),
        ("fastadv train nosuch --", []),
        ("fastadv eval run --attacks clean pg", ["pgd-20"]),
        ("fastadv eval run --max-ex", ["--max-examples"]),
        ("fastadv analyse run --what co", ["cosine"]),
        ("fastadv reproduce afs/figure5", ["afs/figure5a", "afs/figure5b"]),
    ],
)
def test_words_that_may_follow(
    answers: dict[str, list[str]], line: str, expected: list[str]
) -> None:
    assert answers[line] == expected


def test_values_stand_among_the_options(answers: dict[str, list[str]]) -> None:
    def values(line: str) -> list[str]:
        return [word for word in answers[line] if not word.startswith("--")]

    assert values("fastadv ")[:3] == ["train", "sweep", "eval"]
    assert {"digits", "cifar10", "cifar100"} <= set(values("fastadv train pgd_at --data "))
    assert values("fastadv train pgd_at --precision ") == ["auto", "fp32", "bf16"]
    assert values("fastadv train pgd_at --epochs ") == []
    assert "weights.pt" in values("fastadv train hat --teacher ")
    assert values("fastadv reproduce afs/table1 --scale ") == ["paper", "small", "tiny"]
    assert values("fastadv data ") == ["digits", "cifar10", "cifar100"]


def test_flags_and_the_options_of_a_sweep(answers: dict[str, list[str]]) -> None:
    assert {"--no-flip", "--no-replay"} <= set(answers["fastadv train arrest --no-"])
    offered = answers["fastadv sweep pgd_at --grid lr=1 --"]
    assert {"--grid", "--out", "--data", "--no_flip", "--attacks", "--eval_eps"} <= set(offered)
    assert len(offered) == len(set(offered)) and "--eval_attacks" not in offered


def test_argcomplete_finds_its_word() -> None:
    import fastadv.cli

    assert fastadv.cli.__file__ is not None
    assert "PYTHON_ARGCOMPLETE_OK" in Path(fastadv.cli.__file__).read_text()[:1024]
