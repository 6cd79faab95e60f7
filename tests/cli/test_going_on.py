"""Going on with a run on the command line, with the options that it has saved."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import yaml
from run_helpers import fingerprint
from test_command_line import QUICK, fails
from training_helpers import small_recipe

from fastadv.cli import main
from fastadv.models import create_model
from fastadv.trainers import train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.slow
def test_going_on_takes_the_saved_options(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "r"
    options = [
        "--schedule",
        "Piecewise",
        "--schedule.starts",
        "[0,1]",
        "--schedule.factors",
        "[1,1/2]",
    ]
    options += ["--lr", "1/20", "--keep", "5", "--model", "wrn_10_1", "--checkpoint_minutes", "7"]
    first = ["train", "standard", "--data", "digits", "--run", str(run), *QUICK, *options]
    assert main(first) == 0
    before = fingerprint(run / "checkpoints")
    monkeypatch.chdir(tmp_path)
    assert main(["train", "standard", "--run", "r", "--resume", "--quiet"]) == 0
    assert fingerprint(run / "checkpoints") == before
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["keep"] == 5 and config["checkpoint_minutes"] == 7
    capfd.readouterr()
    go_on = ["train", "standard", "--run", "r", "--resume"]
    assert "epochs: 1 -> 2" in fails([*go_on, "--epochs", "2", "--quiet"], capfd)
    assert main([*go_on, "--epochs", "2", "--allow_changes", "--quiet", "--keep", "4"]) == 0
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["epochs"] == 2 and config["keep"] == 4
    capfd.readouterr()
    line = fails(["train", "pgd_at", "--run", "r", "--resume"], capfd)
    assert "was trained by standard" in line and "fastadv train standard --run r --resume" in line
    assert "did you mean 'latest'" in fails([*go_on, "--from_checkpoint", "lastest"], capfd)


def test_a_run_goes_on_without_its_config_and_without_its_teacher(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for method, more in (("standard", []), ("arrest", ["--teacher", "standard"])):
        words = ["--data", "digits", "--run", str(tmp_path / method), *QUICK, *more]
        assert main(["train", method, *words]) == 0
    capfd.readouterr()
    config = tmp_path / "arrest" / "config.yaml"
    # A config that is used in another folder names the same teacher there.
    assert yaml.safe_load(config.read_text())["teacher"] == [str(tmp_path / "standard")]
    (tmp_path / "standard").rename(tmp_path / "gone")
    go_on = ["train", "arrest", "--run", str(tmp_path / "arrest"), "--resume", "--quiet"]
    assert main(go_on) == 0
    assert yaml.safe_load(config.read_text())["teacher"] == [str(tmp_path / "standard")]
    config.unlink()
    assert main(go_on) == 0
    capfd.readouterr()
    config.write_text("keep: [")
    assert "config.yaml: not a config" in fails(go_on, capfd)


@pytest.mark.slow
def test_a_run_goes_on_with_the_networks_of_its_teachers(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    torch.save(create_model("small_cnn", 10, 1).state_dict(), tmp_path / "teacher.pt")
    run = tmp_path / "r"
    words = ["--data", "digits", "--run", str(run), "--model", "stack:2*small_cnn", *QUICK]
    words += ["--teacher", *[str(tmp_path / "teacher.pt")] * 2, "--teacher_model", "small_cnn"]
    assert main(["train", "kd_at", *words]) == 0
    (tmp_path / "teacher.pt").unlink()
    go_on = ["train", "kd_at", "--run", str(run), "--resume", "--quiet"]
    assert main(go_on) == 0
    config = run / "config.yaml"
    content = yaml.safe_load(config.read_text())
    assert content["teacher_model"] == ["small_cnn"]
    config.write_text(yaml.safe_dump({**content, "teacher_model": ["their_network:make"]}))
    capfd.readouterr()
    assert (
        main(go_on) == 2
    )  # the name is not taken from there, and the weights do not fit the model
    assert "state has no entry that fits Stack" in capfd.readouterr().err
    assert "their_network" not in sys.modules


@pytest.mark.parametrize("name", ["010", "1e3", "null"])
def test_a_run_may_be_called_what_yaml_takes_for_something_else(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "standard", "--data", "digits", "--run", name, *QUICK]) == 0
    assert main(["train", "standard", "--run", name, "--resume", "--quiet"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_going_on_imports_nothing_that_the_run_names(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "ran"
    own = "from fastadv.models import small_cnn\ndef make(num_classes, in_channels):\n"
    own += "    return small_cnn(num_classes, in_channels)\n"
    (tmp_path / "their_network.py").write_text(own)
    monkeypatch.syspath_prepend(str(tmp_path))
    run = tmp_path / "r"
    recipe = small_recipe("standard", epochs=1, train_images=64)
    options = {"data": "digits", "run_dir": run, "device": "cpu", "progress": False}
    train("standard", recipe, model="their_network:make", **options)  # type: ignore[arg-type]
    del sys.modules["their_network"]
    (tmp_path / "their_network.py").write_text(f"open({str(marker)!r}, 'w')\n{own}")
    (run / "config.yaml").write_text(
        "model: their_network:make\nschedule: {class_path: their_network.Schedule}\nkeep: 3\n"
    )
    go_on = ["train", "standard", "--run", str(run), "--resume", "--quiet"]
    line = fails(go_on, capfd)
    assert "code runs only when you name it" in line and "--model their_network:make" in line
    assert not marker.exists() and "their_network" not in sys.modules
    assert main([*go_on, "--model", "their_network:make"]) == 0
    assert marker.exists()


def test_a_run_from_python_that_the_command_line_has_no_options_for(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from fastadv.data import load_dataset
    from fastadv.models import small_cnn

    recipe = small_recipe("standard", epochs=1, train_images=64)
    digits = load_dataset("digits")
    for name, options in (
        ("data", {"data": digits, "model": "small_cnn"}),
        ("model", {"data": "digits", "model": small_cnn(10, 1)}),
    ):
        run = tmp_path / name
        train("standard", recipe, run_dir=run, device="cpu", progress=False, **options)  # type: ignore[arg-type]
        line = fails(["train", "standard", "--run", str(run), "--resume"], capfd)
        assert "begun in Python" in line and "resume it there" in line


@pytest.mark.parametrize("schedule", ["EpochCosine", "EpochOneCycle"])
def test_a_run_goes_on_with_a_schedule_that_changes_with_each_epoch(
    schedule: str, tmp_path: Path
) -> None:
    run = ["--run", str(tmp_path / "r")]
    options = ["--data", "digits", *QUICK, "--schedule", schedule]
    assert main(["train", "standard", *run, *options]) == 0
    assert main(["train", "standard", *run, "--resume", "--quiet"]) == 0


def test_a_run_that_is_not_there_does_not_go_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = str(tmp_path / "nothing")
    line = fails(["train", "pgd_at", "--run", run, "--resume"], capfd)
    assert f"resume: there is no run in {run} that could go on; a new run needs --data" in line
