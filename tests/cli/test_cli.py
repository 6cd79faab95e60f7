"""The command line: what it does, what it prints, how it fails."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from command_helpers import train_quickly
from run_helpers import fingerprint

import fastadv
from fastadv.cli import main
from fastadv.evaluation import Report
from fastadv.trainers import load_model, method_names

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def standard_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "standard"
    assert train_quickly("standard", run, "--quiet") == 0
    return run


def one_line(text: str) -> str:
    """The single line of an error."""
    (line,) = text.splitlines()
    return line


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_help_lists_the_commands(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    out = capsys.readouterr().out
    for command in ("train", "eval", "analyse", "report", "info", "demo"):
        assert re.search(rf"^  {command} ", out, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.processes
def test_python_m_is_the_same_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fastadv", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == f"fastadv {fastadv.__version__}"


def test_help_of_training_lists_the_methods(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    out = capsys.readouterr().out
    for name in method_names():
        assert re.search(rf"^  {name} ", out, re.MULTILINE)


@pytest.mark.parametrize("method", method_names())
def test_help_of_a_method_explains_every_option(
    method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["train", method, "--help"])
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    assert "Cost per batch" in out  # the method's docstring
    options = re.split(r"\n  (?=--)", out)[1:]
    for option in options:
        name, _, text = option.partition(" ")
        before_type = (
            text.partition("(type:")[0].partition("(default:")[0].partition("(required")[0]
        )
        assert len(before_type.split()) > 1, f"{name} has no help"


def test_training_says_what_it_does_and_leaves_its_config(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert train_quickly("pgd_at", tmp_path / "at", "--batch_size", "25") == 0
    out, err = capfd.readouterr()
    assert f"next: fastadv eval {tmp_path / 'at'}" in out
    assert "pgd_at on digits train (subset of 256, seed 0) (256 images) with small_cnn" in err
    assert "work: 1 epoch of 10 iterations of 25 images; per image up to 7 forward passes" in err
    assert "PGD-2 on 0.1 = 25.5/255" in err
    assert "schedule: MultiStep, 100 epochs scaled to 1: milestones 0.75, 0.9, gamma 0.1" in err
    assert re.search(r"epoch 1/1, lr 0\.001, loss \d", err)

    config = yaml.safe_load((tmp_path / "at" / "config.yaml").read_text())
    assert config["eps"] == 0.1 and config["epochs"] == 1 and config["data"] == "digits"
    assert not {"resume", "overwrite", "from_checkpoint"} & set(config)
    again = ["--config", str(tmp_path / "at" / "config.yaml"), "--run", str(tmp_path / "again")]
    assert main(["train", "pgd_at", *again, "--quiet"]) == 0
    models = [load_model(tmp_path / name).state_dict() for name in ("at", "again")]
    assert all((models[0][key] == models[1][key]).all() for key in models[0])


def test_config_file_command_line_and_fractions_work_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.yaml").write_text(
        "eps: 4/255\nlam: 7\nschedule:\n  class_path: Piecewise\n"
        "  init_args:\n    starts: [0, 5]\n    factors: [1, 1/2]\n"
    )
    words = [
        "--config",
        str(tmp_path / "r.yaml"),
        "--alpha",
        "1/255",
        "--lam=1/4",
        "--flip",
        "false",
    ]
    with pytest.raises(SystemExit) as exit_:
        main(["train", "arrest", *words, "--print-config"])
    assert exit_.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["eps"] == 4 / 255 and config["alpha"] == 1 / 255
    assert config["lam"] == 0.25 and config["flip"] is False and config["epochs"] == 20
    assert config["schedule"]["init_args"] == {"starts": [0, 5], "factors": [1.0, 0.5]}


@pytest.mark.slow
def test_a_run_is_evaluated_and_compared(
    standard_run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arrest = tmp_path / "arrest"
    assert train_quickly("arrest", arrest, "--teacher", str(standard_run), "--quiet") == 0
    capfd.readouterr()
    for run, eps in ((arrest, []), (standard_run, ["--eps", "0.1"])):
        words = ["--attacks", "clean", "pgd-2", "--max-examples", "40", "--device", "cpu"]
        assert main(["eval", str(run), *words, *eps]) == 0
        out = capfd.readouterr().out
        report = Report.load(run / "eval.json")
        assert [row.name for row in report.rows] == ["clean", "pgd-2"]
        assert report["clean"].n == 40
        assert report["pgd-2"].eps == (0.1 if eps else 8 / 255)  # whatever a run was trained with
        assert f"{100 * report['pgd-2'].accuracy:.2f}" in out
    assert main(["eval", str(arrest), *words, "--eps", "0.1", "--quiet"]) == 0
    capfd.readouterr()

    out_dir = tmp_path / "figures"
    assert main(["report", str(standard_run), str(arrest), "--out", str(out_dir)]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["run", "method", "model"]
    assert lines[1].split()[:2] == ["standard", "standard"]
    assert lines[2].split()[:2] == ["arrest", "arrest"]
    assert lines[2].split()[6:8] == ["linf", "8/255"] and lines[3].split()[6:8] == ["linf", "0.1"]
    assert (out_dir / "trade_off.png").read_bytes()[:4] == b"\x89PNG"
    assert "| arrest |" in (out_dir / "report.md").read_text()


def test_resuming_from_the_command_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert train_quickly("standard", tmp_path) == 0
    before = fingerprint(tmp_path / "checkpoints")
    capfd.readouterr()
    assert train_quickly("standard", tmp_path) == 2
    assert "already holds a run; resume it (--resume), overwrite it (--overwrite)" in one_line(
        capfd.readouterr().err
    )
    assert train_quickly("standard", tmp_path, "--resume", "--seed", "9") == 2
    assert "seed: 0 -> 9" in one_line(capfd.readouterr().err)
    assert fingerprint(tmp_path / "checkpoints") == before
    assert train_quickly("standard", tmp_path, "--resume") == 0
    assert "continued after epoch 1 iteration 0" in capfd.readouterr().err
    assert train_quickly("standard", tmp_path, "--overwrite", "--seed", "9") == 0
    assert json.loads((tmp_path / "run.json").read_text())["recipe"]["seed"] == 9


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fly"], "unknown command 'fly'"),
        (["train", "arest"], "did you mean 'arrest'"),
        (["train", "--data", "digits"], "train needs a method"),
        (["train", "standard", "--data", "digits"], "needs --run"),
        (["train", "standard", "--data", "digits", "--run", "r", "--epochs", "x"], '"epochs"'),
        (
            ["train", "standard", "--data", "digits", "--run", "r", "--epochs", "0"],
            "epochs must be",
        ),
        (["train", "pgd_at", "--data", "digits", "--run", "r", "--eps", "8/0"], "8/255, got '8/0'"),
        (["train", "standard", "--data", "digits", "--run", "r", "--speed", "9"], "--speed"),
        (["train", "standard", "--data", "letters", "--run", "r"], "letters"),
        (
            ["train", "standard", "--data", "cifar10", "--root", "no", "--run", "r"],
            "no cifar10 at no",
        ),
        (["train", "standard", "--data", "digits", "--run", "r", "--model", "vgg"], "'vgg'"),
        (["train", "arrest", "--data", "digits", "--run", "r"], "needs --teacher"),
        (
            ["train", "arrest", "--data", "digits", "--run", "r", "--teacher", "t"],
            "t: no such file",
        ),
        (
            ["train", "standard", "--data", "digits", "--run", "r", "--device", "cuda:99"],
            "'cuda:99'",
        ),
        (["train", "standard", "--data", "digits", "--run", "r", "--device", "gpu"], "'gpu'"),
        (
            ["eval", "nowhere"],
            "nowhere: no such file or directory; it must be a run directory or a checkpoint",
        ),
        (["train", "standard", "--data", "cifar", "--run", "r"], "or folder:PATH, got 'cifar'"),
        (["train", "standard", "--data", ".", "--run", "r"], "did you mean 'folder:.'?"),
        (
            ["train", "standard", "--data", "cifar10", "--run", "r"],
            "`fastadv data cifar10 --root DATA --download` fetches them",
        ),
        (["report", "nowhere"], "run `fastadv eval nowhere` first"),
        (["train", "standard", "--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_errors_of_the_user_are_one_line(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        status = main(words)
    except SystemExit as exit_:
        status = exit_.code  # type: ignore[assignment]
    out, err = capfd.readouterr()
    assert status == 2 and out == ""
    assert message in one_line(err)
    assert list(tmp_path.iterdir()) == []  # nothing is left behind


def test_an_unknown_option_in_a_config_is_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.yaml").write_text("speed: 9\n")
    with pytest.raises(SystemExit) as exit_:
        main(["train", "standard", "--config", str(tmp_path / "r.yaml")])
    assert exit_.value.code == 2
    assert "speed" in one_line(capfd.readouterr().err)


def test_debug_shows_where(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="letters"):
        main(["train", "standard", "--data", "letters", "--run", str(tmp_path), "--debug"])


def test_an_attack_that_is_not_known_is_named(
    standard_run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(standard_run), "--attacks", "clean", "magic"]) == 2
    assert "'magic'" in one_line(capfd.readouterr().err)


def test_info_says_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["fastadv"] == fastadv.__version__
    assert main(["info", "--ops"]) == 0
    out = capsys.readouterr().out
    assert all(op in out for op in ("pgd_step", "angular_distance", "crop_flip"))


def test_options_are_not_abbreviated(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "act", "--data", "digits", "--run", "r", "--pres", "official"])
    assert "--pres" in capsys.readouterr().err
