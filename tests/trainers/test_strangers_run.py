"""Opening a run that somebody else has made runs nothing of it, and deletes nothing outside of it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import ran
from training_helpers import make_model, small_data, small_recipe, states_equal

from fastadv.cli import main
from fastadv.cli.saved_options import saved_options
from fastadv.models import create_model, names_code
from fastadv.trainers import CheckpointError, find_method, load_model, load_teacher, train
from fastadv.trainers.checkpoint import find_checkpoint
from fastadv.trainers.run_directory import RunDirectory
from fastadv.trainers.sealed import sealed_json

pytestmark = pytest.mark.usefixtures("one_thread")
TRAP = """
open({mark!r}, "w").close()
from fastadv.models import small_cnn
def build(num_classes, in_channels):
    return small_cnn(num_classes, in_channels)
create_model = build
"""


def rewrite(file: Path, **entries: Any) -> None:
    """Change entries of a sealed file and give it the right hash, as somebody with bad intentions can."""
    content = json.loads(file.read_text())
    del content["sha256"]
    file.write_text(sealed_json({**content, **entries}))


def give_model_name(run: Path, name: Any) -> None:
    for file in (run / "run.json", find_checkpoint(run) / "meta.json"):
        rewrite(file, model={**json.loads(file.read_text())["model"], "name": name})


def go_on(folder: Path, **options: Any) -> None:
    """Train a small network in a folder."""
    arguments: dict[str, Any] = {"data": small_data(), "device": "cpu", "progress": False}
    recipe = small_recipe("standard", epochs=1)
    train("standard", recipe, model="small_cnn", run_dir=folder, **arguments, **options)


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    go_on(tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def trap(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that names code which lies beside it, where Python finds it; the file that the code would make."""
    mark = trained / "it ran"
    (trained / "trap_module.py").write_text(TRAP.format(mark=str(mark)))
    monkeypatch.chdir(trained)
    monkeypatch.syspath_prepend("")
    monkeypatch.delitem(sys.modules, "trap_module", raising=False)
    return mark


CODE = [
    "trap_module:build",
    "stack:small_cnn+trap_module:build",
    "stack:2*trap_module:build",
    "stack:stack:trap_module:build",
    "timm:hf-hub:somebody/net",
    "timm:local-dir:.",
]


@pytest.mark.parametrize("name", CODE)
def test_no_code_that_a_run_names_is_run(name: str, trained: Path, trap: Path) -> None:
    give_model_name(trained, name)
    assert names_code(name)
    with pytest.raises(ValueError, match=r"runs only when you name it yourself: give model="):
        load_model(trained)
    with pytest.raises(ValueError, match=r"--teacher_model .*, if you trust that code"):
        load_teacher(trained, make_model(1))
    with pytest.raises(ValueError, match="teacher_model"):
        train(
            "arrest",
            small_recipe("arrest"),
            data=small_data(),
            model="small_cnn",
            run_dir=trained / "new",
            teacher=trained,
            progress=False,
        )
    assert main(["eval", str(trained), "--data", "digits"]) == 2
    words = ["train", "afs", "--data", "digits", "--run", "new", "--teacher", str(trained)]
    assert main(words) == 2
    rewrite(trained / "run.json", source={"dataset": "digits", "root": None})
    assert main(["train", "standard", "--run", str(trained), "--resume"]) == 2
    assert not trap.exists()


def test_no_code_that_a_recipe_names_is_run(trained: Path, trap: Path) -> None:
    recipe = {**json.loads((trained / "run.json").read_text())["recipe"], "natural": CODE[0]}
    source = {"dataset": "digits", "root": None}
    rewrite(trained / "run.json", method="lbgat", recipe=recipe, source=source)
    assert "natural" not in saved_options(str(trained), find_method("lbgat"))
    assert main(["train", "lbgat", "--run", str(trained), "--resume"]) == 2
    assert not trap.exists()


def test_code_that_the_user_names_is_run(trained: Path, trap: Path) -> None:
    before = load_model(trained).state_dict()
    give_model_name(trained, "trap_module:build")
    assert states_equal(load_model(trained, "trap_module:build").state_dict(), before)
    assert trap.exists()
    like = create_model("trap_module:build", 4, 1)
    teacher = load_teacher(trained, like, "trap_module:build")
    assert states_equal(teacher.state_dict(), before)
    assert states_equal(load_model(trained, make_model(2)).state_dict(), before)


def test_a_user_s_name_counts_before_the_recorded_one(trained: Path) -> None:
    with pytest.raises(ValueError, match="does not fit ResNet") as caught:
        load_model(trained, "resnet18")
    assert re.search(
        r": \d+ missing: .*; \d+ unexpected: .*; \d+ mismatched: .*", str(caught.value)
    )
    assert len(str(caught.value)) < 1200  # torch's error has the names of all entries


@pytest.mark.parametrize("name", ["small_cnn", "ResNet18", "stack:2*small_cnn+resnet18"])
def test_names_of_our_own_networks_stand_for_no_foreign_code(name: str) -> None:
    assert not names_code(name)


@pytest.mark.slow
@pytest.mark.processes
def test_a_file_beside_the_run_is_not_taken_for_timm(trained: Path, tmp_path: Path) -> None:
    give_model_name(trained, "timm:resnet26")
    mark = tmp_path / "it ran"
    (trained / "timm.py").write_text(TRAP.format(mark=str(mark)))
    program = "import sys; sys.path.insert(0, ''); from fastadv.trainers import load_model; load_model('.')"
    done = ran(["-c", program], cwd=trained)
    assert "runs only when you name it yourself" in done.stderr
    assert not mark.exists()


@pytest.mark.parametrize(
    "model", [None, "text", ["small_cnn"], {}, {"name": 3}, {"name": "small_cnn"}]
)
def test_a_model_that_is_not_described_is_named(model: Any, trained: Path) -> None:
    rewrite(find_checkpoint(trained) / "meta.json", model=model)
    with pytest.raises((CheckpointError, ValueError), match="step_000004"):
        load_model(trained)


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("method", 3),
        ("recipe", None),
        ("model", "small_cnn"),
        ("teachers", ["teacher"]),
        ("source", "digits"),
        ("source", {"dataset": 1}),
    ],
)
def test_a_run_record_of_other_types_is_named(entry: str, value: Any, trained: Path) -> None:
    rewrite(trained / "run.json", **{entry: value})
    run = RunDirectory(trained)
    with pytest.raises(CheckpointError, match=rf"run\.json: its entry '{entry}'"):
        run.source() if entry == "source" else run.read()


def test_overwriting_a_run_deletes_nothing_outside_of_it(trained: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.safetensors"
    mine.write_text("not to be lost")
    rewrite(trained / "run.json", teachers={"../mine": "", "teacher": ""})
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").write_text("")
    os.rename(trained / "checkpoints", tmp_path / "moved")
    (trained / "checkpoints").symlink_to(tmp_path / "elsewhere")
    go_on(trained, overwrite=True)
    assert mine.read_text() == "not to be lost"
    assert (tmp_path / "elsewhere" / "kept").exists()


def test_the_state_of_another_version_is_named(trained: Path) -> None:
    path = find_checkpoint(trained)
    state = torch.load(path / "train_state.pt", weights_only=True)
    state["progress"]["moon_phase"] = 0.5
    torch.save(state, path / "train_state.pt")
    content = (path / "train_state.pt").read_bytes()
    meta = json.loads((path / "meta.json").read_text())
    files = meta["files"] | {
        "train_state.pt": {
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
    }
    rewrite(path / "meta.json", files=files, versions={"fastadv": "9.9"})
    with pytest.raises(CheckpointError, match=r"train_state\.pt: .*fastadv 9\.9.*moon_phase"):
        go_on(trained, resume=True)
