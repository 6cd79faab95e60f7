"""Numbers and words of configs that YAML 1.1 reads as something else."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_command_line import RUN, fails
from test_flags import configuration

from fastadv.cli.train import training_parser
from fastadv.cli.yaml_values import load_yaml
from fastadv.commands.threat import radii_of
from fastadv.trainers import find_method

QUOTED = "a config has text in quotes where it looks like a number, or like true or false"


def config(folder: Path, text: str) -> list[str]:
    (folder / "c.yaml").write_text(text, encoding="utf-8")
    return ["--config", str(folder / "c.yaml")]


@pytest.mark.parametrize(
    ("written", "value"),
    [
        *[("010", 10), ("+007", 7), ("-012", -12), ("1_000", 1000), ("0x1F", 31), ("0o10", 8)],
        *[("1e-3", 0.001), ("1E3", 1000.0), (".5e3", 500.0), ("1.", 1.0), ("010.5", 10.5)],
        *[("1:30", "1:30"), ("12:30:00", "12:30:00"), ("1:30.5", "1:30.5")],
        *[("2021-01-01", "2021-01-01"), ("8/255", "8/255"), ("no", False), ("~", None)],
        *[("[010, 1e-3, on]", [10, 0.001, True]), ("a:", "a:"), ("{a, b}", "{a, b}")],
    ],
)
def test_numbers_are_those_of_yaml_1_2(written: str, value: object) -> None:
    found = load_yaml(written)
    assert (found, type(found)) == (value, type(value))


def test_a_number_means_the_same_in_a_config_and_on_the_command_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["--seed=010", "--lr=1e-3", "--eps=010", "--epochs=012"]
    words += ["--schedule=MultiStep", "--schedule.milestones=[07,010]"]
    text = "seed: 010\nlr: 1e-3\neps: 010\nepochs: 012\nschedule:\n  class_path: MultiStep\n"
    text += "  init_args: {milestones: [07, 010]}\n"
    typed = configuration(["pgd_at", *words], capfd)
    assert (typed["seed"], typed["lr"], typed["eps"], typed["epochs"]) == (10, 0.001, 10, 12)
    assert typed["schedule"]["init_args"]["milestones"] == [7, 10]  # type: ignore[index]
    assert configuration(["pgd_at", *config(tmp_path, text)], capfd) == typed


def test_the_schedule_follows_the_epochs_that_are_trained(
    capfd: pytest.CaptureFixture[str],
) -> None:
    of = {e: configuration(["pgd_at", f"--epochs={e}"], capfd)["schedule"] for e in ("040", "40")}
    assert of["040"] == of["40"]


@pytest.mark.parametrize("value", ["1:30", "12:30:00", "-1:30"])
def test_a_number_to_the_base_60_is_refused(
    value: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for words in ([f"--seed={value}"], config(tmp_path, f"seed: {value}\n")):
        line = fails(["train", "pgd_at", *RUN, *words], capfd)
        assert f"option \"seed\" must be a whole number, got '{value}'" in line


@pytest.mark.parametrize("value", ["[1:30, 90]", "['1:30', 90]"])
def test_a_number_to_the_base_60_is_refused_in_a_list_and_in_a_schedule(
    value: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    schedule = f"schedule: {{class_path: MultiStep, init_args: {{milestones: {value}}}}}\n"
    typed = ["--schedule=MultiStep", f"--schedule.milestones={value}"]
    for words in (typed, config(tmp_path, schedule)):
        line = fails(["train", "pgd_at", *RUN, *words], capfd)
        assert 'option "schedule' in line and "must have whole numbers, got '1:30'" in line
    for words in ([f"--tau_epochs={value}"], config(tmp_path, f"tau_epochs: {value}\n")):
        line = fails(["train", "fat", *RUN, *words], capfd)
        assert "option \"tau_epochs\" must have whole numbers, got '1:30'" in line


@pytest.mark.parametrize(("value", "read"), [("on", "True"), ("007", "7"), ("1e3", "1000.0")])
def test_text_that_looks_like_something_else_belongs_in_quotes(
    value: str, read: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    line = fails(["train", "pgd_at", *RUN, *config(tmp_path, f"model: {value}\n")], capfd)
    assert f"option \"model\" must be text, got '{read}'; {QUOTED}" in line
    parser = training_parser(find_method("pgd_at"))
    for words in (config(tmp_path, f"model: '{value}'\n"), [f"--model={value}"]):
        assert parser.parse_args([*RUN, *words]).model == value


def test_an_empty_list_of_radii_is_refused() -> None:
    with pytest.raises(ValueError, match=r"eps must be a radius or several, got \[\]"):
        radii_of([])
