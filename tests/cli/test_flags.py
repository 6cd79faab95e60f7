"""Flags on the command line, and words that are missing or mistyped, for every command."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from test_command_line import RUN, fails, prints

from fastadv.cli import main
from fastadv.cli.flags import is_flag, spellings
from fastadv.cli.train import check_training, training_parser
from fastadv.trainers import PGDAT, AdversarialRecipe, Cosine, find_method, method_names

NO_PARTS = ["--no-distill", "--no_replay", "--finetune=no"]


def configuration(words: list[str], capfd: pytest.CaptureFixture[str]) -> dict[str, object]:
    """The options that a command line of `fastadv train` comes to."""
    found = yaml.safe_load(prints(["train", *words, *RUN, "--print_config"], capfd))
    assert isinstance(found, dict)
    return found


def test_options_that_are_tuples_are_written_without_a_warning(
    capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    config = configuration(["trades"], capfd)
    assert config["betas"] == [0.9, 0.999]
    assert isinstance(config["schedule"]["init_args"]["milestones"], list)  # type: ignore[index]
    assert not [str(one.message) for one in recwarn]


def test_a_flag_that_is_on_can_be_turned_off_by_its_opposite(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = configuration(["arrest", "--no-flip", "--no_replay", "--teacher", "t"], capfd)
    assert (config["flip"], config["replay"], config["distill"]) == (False, False, True)
    # The last word counts, of a config, too.
    config = configuration(["pgd_at", "--no-flip", "--flip"], capfd)
    assert config["flip"] is True
    (tmp_path / "r.yaml").write_text("flip: false\nnesterov: true\n")
    with_file = ["pgd_at", "--config", str(tmp_path / "r.yaml")]
    config = configuration([*with_file, "--flip", "--no-nesterov"], capfd)
    assert (config["flip"], config["nesterov"]) == (True, False)


def test_an_opposite_takes_no_value_and_has_a_flag(capfd: pytest.CaptureFixture[str]) -> None:
    line = fails(["train", "pgd_at", *RUN, "--no-flip=true"], capfd)
    assert "option '--no_flip' takes no value, got 'true'" in line
    assert "--no_epochs" in fails(["train", "pgd_at", *RUN, "--no-epochs"], capfd)
    assert "did you mean '--no_flip'?" in fails(["train", "pgd_at", *RUN, "--no-flap"], capfd)


@pytest.mark.parametrize(
    ("command", "false", "true"),
    [
        ("train pgd_at", "quiet resume overwrite nesterov compile tensorboard", "flip"),
        ("sweep pgd_at", "dry_run", ""),
        ("eval", "quiet worst_case sanity", ""),
        ("transfer", "quiet", ""),
        ("analyse", "quiet anew", ""),
        ("reproduce", "quiet list plan", ""),
        ("report", "json", ""),
        ("info", "json ops", ""),
        ("demo", "quiet", ""),
    ],
)
def test_the_help_shows_flags_as_flags(
    command: str, false: str, true: str, capfd: pytest.CaptureFixture[str]
) -> None:
    text = prints([*command.split(), "--help"], capfd)
    assert "{true,false}" not in text and "type: bool" not in text
    for name in false.split():
        assert f"[--{name}]" in text or f"usage: fastadv {command} --grid" in text
        assert re.search(rf"^  --{name}( |$)", text, re.MULTILINE)
    for name in true.split():
        assert f"[--no_{name}]" in text
        assert re.search(rf"^  --{name}, --no_{name}( |$)", text, re.MULTILINE)


def test_every_flag_of_training_is_known_by_what_the_help_calls_it(
    capfd: pytest.CaptureFixture[str],
) -> None:
    parser = training_parser(find_method("arrest"))
    flags = [action for action in parser._actions if is_flag(action)]
    assert len(flags) > 10
    words = ["arrest", "--teacher", "t", *(spellings(action)[-1] for action in flags)]
    changed = configuration([word for word in words if word != "--quiet"], capfd)
    for action in flags:
        if action.dest != "quiet":
            assert changed[action.dest] is not action.default


def test_a_teacher_is_missed_before_anything_is_read(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--data", "cifar10", "--root", "nowhere", "--run", "r"]
    assert "needs --teacher; --teacher is a trained network" in fails(
        ["train", "arrest", *words], capfd
    )
    assert "trained networks" in fails(["train", "afs", *words], capfd)
    assert "no cifar10 at nowhere" in fails(["train", "arrest", *words, *NO_PARTS], capfd)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("eval", "run must be given, or model"),
        ("report", "needs RUNS; RUNS is one or more run directories"),
        ("analyse", "needs MODELS and --what; MODELS is one or more run directories"),
        ("analyse r", "needs --what; --what is one or more of cosine, "),
        ("transfer", "needs MODELS; MODELS is two or more run directories"),
        ("reproduce", "needs ITEM and --out; ITEM is a table or a figure such as arrest/table2"),
        ("reproduce arrest/table2", "needs --out; --out is a folder"),
        ("sweep", "sweep needs a method: standard, pgd_at"),
        ("sweep arrest", "needs --grid and --out; --grid is the options that differ"),
    ],
)
def test_every_command_alone_says_what_is_missing(
    words: str, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert message in fails(words.split(), capfd)


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["--versoin"], "'--version'"),
        (["sweep", "arest", "--grid", "lam=1"], "'arrest'"),
        (["sweep", "pgd_at", "--gird", "lr=1", "--out", "s"], "'--grid'"),
        (["sweep", "pgd_at", "--grid", "lrr=1", "--out", "s", "--data", "digits"], "'--lr'"),
        (["sweep", "pgd_at", "--grid", "lr=1", "--out", "s", "--no-flap"], "'--no_flip'"),
        (["train", "pgd_at", *RUN, "--model", "stack:2*smal_cnn"], "'small_cnn'"),
        (["train", "hat", *RUN, "--teacher", "t", "--teacher_model", "rsnet18"], "'resnet18'"),
        (["reproduce", "arrest/tabel2", "--out", "o"], "'arrest/table2'"),
        (["reproduce", "arrest/table2", "--out", "o", "--scale", "tinny"], "'tiny'"),
        (["reproduce", "arrest/table2", "--out", "o", "--data", "cifar1"], "'cifar10'"),
        (
            ["reproduce", "afs/table1", "--out=o", "--scale=tiny", "--network=smalcnn"],
            "'small_cnn'",
        ),
        (["analyse", "r", "--what", "cosin"], "'cosine'"),
        (["transfer", "a", "b", "--attack", "apgd-c", "--data", "digits"], "'apgd-ce'"),
        (["transfer", "a", "b", "--norm", "lnf"], "'linf'"),
    ],
)
def test_a_mistyped_word_of_any_command_gets_a_suggestion(
    words: list[str],
    meant: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    line = fails(words, capfd)
    assert f"did you mean {meant}?" in line and line.count("did you mean") == 1
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_suggested_where_no_word_is_near(capfd: pytest.CaptureFixture[str]) -> None:
    assert "did you mean" not in fails(["eval", "r", "--eval"], capfd)  # not --help


def test_the_schedules_are_listed_with_their_numbers(capfd: pytest.CaptureFixture[str]) -> None:
    for words in (["--schedule.help"], ["--schedule.help", "--quiet"]):
        text = prints(["train", "pgd_at", *words], capfd)
        for line in (
            "--schedule.milestones [75,90]",
            "--schedule.gamma 0.1",
            "--schedule.base_momentum null",
        ):
            assert f"    {line}\n" in text
    # They can be typed as they are listed.
    words = ["--schedule", "MultiStep", "--schedule.milestones", "[75,90]"]
    config = configuration(["pgd_at", *words, "--schedule.gamma", "0.1"], capfd)
    assert config["schedule"]["init_args"] == {"milestones": [75, 90], "gamma": 0.1}  # type: ignore[index]


@pytest.mark.parametrize("name", method_names())
def test_every_method_takes_every_schedule(name: str) -> None:
    words = ["--data", "digits", "--run", "x", "--schedule", "Cosine", "--schedule.floor", ".1"]
    assert check_training(find_method(name), words).schedule == Cosine(0.1)


class Mixin:
    """Beside the recipe's base class, and no dataclass."""


@dataclass(frozen=True, kw_only=True)
class MixedRecipe(Mixin, AdversarialRecipe):
    """A recipe that begins with a class that is no dataclass."""


class Mixed(PGDAT[MixedRecipe]):
    """A method with such a recipe."""

    name = "mixed"
    recipe_class = MixedRecipe


def test_options_of_an_own_recipe_with_a_mixin_have_types(
    capfd: pytest.CaptureFixture[str],
) -> None:
    words = ["--data", "digits", "--run", "x", "--schedule", "Cosine", "--schedule.floor", ".1"]
    assert check_training(Mixed, words).schedule == Cosine(0.1)
    with pytest.raises(SystemExit):
        check_training(Mixed, [*words, "--norm", "l3"])
    assert 'option "norm" must be one of linf, l2' in capfd.readouterr().err


@pytest.mark.parametrize(
    ("words", "module", "message"),
    [
        (["--tensorboard"], "torch.utils.tensorboard", "pip install 'fastadv[tensorboard]'"),
        (["--log", "wandb"], "wandb", "pip install 'fastadv[wandb]'"),
    ],
)
def test_a_tracker_that_is_not_installed_is_told_before_the_run_begins(
    words: list[str],
    module: str,
    message: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    assert message in fails(["train", "standard", *RUN, *words], capfd)
    assert list(tmp_path.iterdir()) == []


def test_the_next_command_can_be_pasted_for_any_name_of_a_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "a run"
    words = ["--data", "digits", "--run", str(run), "--epochs", "1", "--train_images", "32"]
    numbers = ["--batch_size", "32", "--monitor_images", "8", "--quiet"]
    assert main(["train", "standard", *words, *numbers]) == 0
    assert f"next: fastadv eval '{run}'" in capfd.readouterr().out
