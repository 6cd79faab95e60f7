"""Runs that were copied, by tools that keep no links too, damaged on the way, or mixed up with each other."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from run_helpers import OFTEN, Interruption, SharedRuns, assert_same_end, run
from test_checkpoint import save

import fastadv.files
from fastadv.files import point_link
from fastadv.trainers import CheckpointError, load_model, load_teacher
from fastadv.trainers.checkpoint import checkpoints_in, find_checkpoint, load_checkpoint
from fastadv.trainers.run_directory import RunDirectory
from fastadv.trainers.sealed import read_sealed, sealed_json

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def cut(tmp_path: Path) -> Path:
    """A run that was stopped in its second epoch, with checkpoints after steps 3 and 4."""
    with pytest.raises(Interruption):
        run("standard", tmp_path / "cut", 5)
    return tmp_path / "cut"


def follow_links(source: Path, target: Path) -> None:
    shutil.copytree(source, target, symlinks=False)


def links_as_files(source: Path, target: Path) -> None:
    shutil.copytree(source, target, symlinks=True)
    for path in (target / "checkpoints").iterdir():
        if path.is_symlink():
            name = os.readlink(path)
            path.unlink()
            path.write_text(f"{name}\n")


def leave_links_out(source: Path, target: Path) -> None:
    shutil.copytree(source, target, symlinks=True)
    for path in (target / "checkpoints").iterdir():
        if path.is_symlink():
            path.unlink()


COPIES = [follow_links, links_as_files, leave_links_out]


@pytest.mark.parametrize("copy", COPIES)
def test_a_copied_run_goes_on_where_it_was(
    copy: Any, cut: Path, shared_runs: SharedRuns, tmp_path: Path
) -> None:
    copy(cut, tmp_path / "copy")
    resumed = run("standard", tmp_path / "copy", resume=True)
    assert resumed.progress.step == 8
    assert resumed.checkpoint.name == "step_000008"
    assert_same_end(shared_runs.whole("standard"), tmp_path / "copy")
    folder = tmp_path / "copy" / "checkpoints"
    assert os.readlink(folder / "latest") == "step_000008"
    assert (folder / "best").is_symlink()
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("copy", COPIES[:2])
@pytest.mark.parametrize("which", ["latest", "best"])
def test_what_was_a_link_is_found_under_its_own_name(
    copy: Any, which: str, cut: Path, tmp_path: Path
) -> None:
    copy(cut, tmp_path / "copy")
    folder = tmp_path / "copy" / "checkpoints"
    for found in (find_checkpoint(tmp_path / "copy", which), find_checkpoint(folder / which)):
        assert found == folder / "step_000004"
    assert load_checkpoint(folder / which).path == folder / "step_000004"


def test_a_copy_of_a_link_whose_checkpoint_is_gone_is_read_itself(
    cut: Path, tmp_path: Path
) -> None:
    follow_links(cut, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "checkpoints" / "step_000004")
    assert load_checkpoint(find_checkpoint(tmp_path / "copy")).meta["step"] == 4


def test_where_there_are_no_links_a_file_has_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(fastadv.files.Path, "symlink_to", unknown)
    for step in (5, 10):
        newest = save(tmp_path / "checkpoints", step)
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_000010"
    assert find_checkpoint(tmp_path) == newest


def test_a_folder_gives_way_to_a_link(tmp_path: Path) -> None:
    (tmp_path / "link" / "inside").mkdir(parents=True)
    (tmp_path / "target").mkdir()
    point_link(tmp_path / "link", "target")
    assert os.readlink(tmp_path / "link") == "target"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "target"]


def put(checkpoint: Path, into: Path, how: str) -> Path:
    target = into / "checkpoints" / checkpoint.name
    if target.exists():
        shutil.rmtree(target)
    if how == "copy":
        shutil.copytree(checkpoint, target)
    else:
        target.symlink_to(checkpoint)
    return target


@pytest.mark.parametrize("how", ["copy", "link"])
def test_a_checkpoint_of_another_run_is_noticed(how: str, cut: Path, tmp_path: Path) -> None:
    run("standard", tmp_path / "other")
    put(find_checkpoint(tmp_path / "other", "step_000008"), cut, how)
    (cut / "checkpoints" / "latest").unlink()
    for use in (
        lambda: run("standard", cut, resume=True),
        lambda: run("standard", cut, resume="step_000008"),
        lambda: load_model(cut),
        lambda: load_model(cut, checkpoint="step_000008"),
        lambda: load_teacher(cut, load_model(tmp_path / "other")),
    ):
        with pytest.raises(CheckpointError, match=r"step_000008: is a checkpoint of another run"):
            use()
    with pytest.raises(CheckpointError, match=r"newest good .* is .*step_000004"):
        load_model(cut)
    assert run("standard", cut, resume="step_000004").progress.step == 8


def test_a_checkpoint_alone_can_be_read(cut: Path, tmp_path: Path) -> None:
    alone = shutil.copytree(find_checkpoint(cut), tmp_path / "elsewhere" / "kept")
    load_model(alone)


def test_a_checkpoint_under_another_name_is_noticed(cut: Path) -> None:
    folder = cut / "checkpoints"
    os.rename(folder / "step_000003", folder / "step_000007")
    (folder / "latest").unlink()
    with pytest.raises(CheckpointError, match="step_000007: is the checkpoint after step 3"):
        run("standard", cut, resume=True)


def test_a_run_begun_again_is_another_run_and_a_resumed_one_the_same(cut: Path) -> None:
    first = RunDirectory(cut).identity()
    run("standard", cut, resume=True)
    assert RunDirectory(cut).identity() == first
    run("standard", cut, overwrite=True)
    assert RunDirectory(cut).identity() not in (first, None)


def damaged(content: bytes, count: int) -> list[bytes]:
    """Copies of a file with one bit turned over in each."""
    random.seed(0)
    copies = []
    for _ in range(count):
        copy = bytearray(content)
        copy[random.randrange(len(copy))] ^= 1 << random.randrange(8)
        copies.append(bytes(copy))
    return copies


@pytest.mark.parametrize("name", ["meta.json", "run.json"])
def test_no_damage_to_what_a_run_says_of_itself_passes(name: str, cut: Path) -> None:
    file = find_checkpoint(cut) / name if name == "meta.json" else cut / name
    whole, passed = read_sealed(file), 0
    for copy in damaged(file.read_bytes(), 600):
        file.write_bytes(copy)
        try:
            passed += read_sealed(file) != whole
        except CheckpointError as error:
            assert str(file) in str(error)
    assert passed == 0
    file.write_bytes(damaged(file.read_bytes(), 1)[0][:-20])
    with pytest.raises(CheckpointError, match=str(file)):
        run("standard", cut, resume=True)


def test_a_file_that_was_only_formatted_anew_is_read(cut: Path) -> None:
    file = cut / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()), sort_keys=True))
    assert run("standard", cut, resume=True).progress.step == 8


def as_format_1(run_dir: Path) -> None:
    """Make of a run what fastadv wrote before files were sealed and runs had an identity."""
    folder = run_dir / "checkpoints"
    for file in (run_dir / "run.json", *(p / "meta.json" for p in checkpoints_in(folder))):
        content = json.loads(file.read_text())
        del content["sha256"], content["run"]
        file.write_text(json.dumps({**content, "format": 1}, indent=2) + "\n")


def test_a_run_of_the_older_format_is_read_with_a_note_and_goes_on(
    cut: Path, shared_runs: SharedRuns
) -> None:
    as_format_1(cut)
    with pytest.warns(UserWarning, match=r"meta\.json: written by an older fastadv in format 1"):
        load_model(cut)
    with pytest.warns(UserWarning, match="no hash of its own"):
        assert run("standard", cut, resume=True).progress.step == 8
    assert_same_end(shared_runs.whole("standard"), cut)
    identity = read_sealed(cut / "run.json")["run"]
    assert read_sealed(find_checkpoint(cut) / "meta.json")["run"] == identity


@pytest.mark.parametrize("version", [0, 3, "2", None])
def test_another_format_is_named_with_what_to_do(version: Any, cut: Path) -> None:
    file = cut / "run.json"
    content = {name: value for name, value in read_sealed(file).items() if name != "format"}
    versions = content["versions"] | {"fastadv": "9.9"}
    file.write_text(sealed_json({**content, "format": version, "versions": versions}))
    with pytest.raises(CheckpointError, match=str(file)) as caught:
        run("standard", cut, resume=True)
    assert f"got {version!r}" in str(caught.value)
    assert "written by fastadv 9.9. Open it with the version that wrote it" in str(caught.value)


def test_a_damaged_run_can_be_overwritten(cut: Path) -> None:
    (cut / "run.json").write_text("{")
    assert run("standard", cut, overwrite=True, settings=OFTEN).progress.step == 8


def test_a_file_is_no_run(cut: Path) -> None:
    with pytest.raises(
        CheckpointError, match="must be a run directory or a checkpoint, got a file"
    ):
        load_model(cut / "metrics.jsonl")
