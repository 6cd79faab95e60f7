"""The help of every command: plain words, defaults as one would type them, lines of a terminal's width."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
from test_command_line import RUN, fails, prints

from fastadv.cli import main, program
from fastadv.cli.help_format import as_typed
from fastadv.cli.parsing import Parser, schedule_classes
from fastadv.cli.train import training_parser
from fastadv.trainers import Cosine, MultiStep, find_method, method_names

OTHERS = ["eval", "transfer", "analyse", "reproduce", "report", "data", "info", "demo"]
COMMANDS = [*OTHERS, "sweep pgd_at", *(f"train {name}" for name in method_names())]
# Python's types and names, jsonargparse's words for a class, and its word for None.
FOREIGN = [
    "Union[",
    "Optional[",
    "Literal[",
    "Sequence[",
    "tuple[",
    "list[",
    "<class",
    "class_path",
    "init_args",
]
FOREIGN += [
    "type:",
    "fastadv.trainers",
    "jsonargparse",
    "CLASS_PATH",
    "[ITEM",
    "Args:",
    "Returns:",
    "Raises:",
    "Attributes:",
    " null",
    "None",
]


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_has_plain_words_in_80_columns(
    command: str, capfd: pytest.CaptureFixture[str]
) -> None:
    text = prints([*command.split(), "--help"], capfd)
    in_one_line = " ".join(text.split())
    assert [word for word in FOREIGN if word in in_one_line] == []
    explained = text.partition("\n\n")[
        2
    ]  # after the usage, in which a long choice cannot be wrapped
    assert [line for line in explained.splitlines() if len(line) > 80] == []


@pytest.mark.parametrize("words", ["", "train", "train pgd_at --schedule.help"])
def test_lists_fit_80_columns(words: str, capfd: pytest.CaptureFixture[str]) -> None:
    text = prints([*words.split(), "--help"] if words in ("", "train") else words.split(), capfd)
    assert [line for line in text.splitlines() if len(line) > 80] == []


@pytest.mark.parametrize("schedule", schedule_classes())
def test_the_help_of_a_schedule_has_plain_words(
    schedule: str, capfd: pytest.CaptureFixture[str]
) -> None:
    text = " ".join(prints(["train", "pgd_at", "--schedule.help", schedule], capfd).split())
    assert [word for word in FOREIGN if word in text] == []
    assert f"The options of --schedule {schedule}." in text


def test_all_schedules_are_listed(capfd: pytest.CaptureFixture[str]) -> None:
    listed = prints(["train", "pgd_at", "--schedule.help"], capfd)
    assert {"EpochCosine", "EpochOneCycle", "Step", "Constant"} < set(listed.split())


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ("train pgd_at", "units of the 0..1 image. (a number; default: 8/255)"),
        (
            "train pgd_at",
            "--pad_mode {constant,reflect} content of the padding. (default: constant)",
        ),
        ("train pgd_at", "--clip_grad_norm CLIP_GRAD_NORM largest L2 norm"),
        ("train pgd_at", "ones are scaled down. (a number; not set by default)"),
        ("train pgd_at", "default: MultiStep --schedule.milestones [75,90] --schedule.gamma 0.1)"),
        ("train pgd_at", "(2 numbers in brackets; default: [0.9,0.999])"),
        ("train pgd_at", "directory for everything the run leaves. (required)"),
        ("train las_at", "(a number; default: 1/3)"),
        ("eval", "--eps EPS [EPS ...] radius of the ball"),
        ("eval", "--norm {linf,l2,l1} norm of the ball."),
        ("eval", "--bounds LOW HIGH Smallest and largest value"),
        ("eval", "(2 numbers; default: 0 1)"),
        ("eval", "(default: clean fgsm pgd-20 autoattack)"),
        ("analyse", "--step_counts STEP_COUNTS [STEP_COUNTS ...] numbers of steps"),
        ("analyse", "(one or more whole numbers)"),
    ],
)
def test_values_and_defaults_are_shown_as_one_types_them(
    words: str, shown: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert shown in " ".join(prints([*words.split(), "--help"], capfd).split())


def test_text_for_values() -> None:
    assert [as_typed(value) for value in (8 / 255, 0.5, 1.0, 1 / 3, 1e-5, 3, True, None, "a")] == [
        *("8/255", "0.5", "1", "1/3", "1e-05", "3", "true", "null", "a")
    ]
    assert as_typed((75, 90)) == "[75,90]"
    assert as_typed(math.pi / 1000) == str(math.pi / 1000)
    assert [as_typed(math.inf), as_typed(math.nan)] == ["inf", "nan"]


def defaults(parser: Parser) -> Iterator[tuple[str, Any]]:
    """The options with their defaults, without those that the parser needs and those that only print."""
    values = parser.get_defaults()
    for action in parser._actions:
        name = action.dest
        if f"--{name}" in action.option_strings and name in values and values[name] is not None:
            yield name, values[name]


@pytest.mark.parametrize("method", ["pgd_at", "las_at", "afs", "free"])
def test_a_default_that_is_typed_changes_nothing(method: str) -> None:
    parser = training_parser(find_method(method))
    typed = [
        word for name, value in defaults(parser) for word in f"--{name} {as_typed(value)}".split()
    ]
    assert len(typed) > 80
    assert parser.parse_args([*RUN, *typed]) == parser.parse_args(RUN)


def test_a_schedule_of_ones_own_is_none_of_the_packages(capfd: pytest.CaptureFixture[str]) -> None:
    class Mine(Cosine):
        pass

    assert "Mine" not in schedule_classes()
    assert schedule_classes()["MultiStep"] is MultiStep
    assert "Mine" not in prints(["train", "pgd_at", "--schedule.help"], capfd)


def test_a_wrong_value_of_a_list_is_told_once(capfd: pytest.CaptureFixture[str]) -> None:
    line = fails(["eval", "r", "--eps", "[a]"], capfd)
    assert "must be a number or a fraction such as 8/255, got" in line


def test_every_command_is_looked_at() -> None:
    assert {command.split()[0] for command in COMMANDS} == set(program._COMMANDS)
    assert main(["--help"]) == 0
