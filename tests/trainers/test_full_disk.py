"""Writes that fail: the file is named with what to do, and what was written before goes on being whole."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from processes import ran
from run_helpers import SharedRuns, assert_same_end, fingerprint, run

from fastadv.files import write_atomically
from fastadv.trainers.checkpoint import find_checkpoint, load_checkpoint
from fastadv.trainers.logs import MetricsLog

pytestmark = pytest.mark.usefixtures("one_thread")
FULL = "cannot be written: No space left on device; free some space"


def fail_at(monkeypatch: pytest.MonkeyPatch, name: str, code: int = errno.ENOSPC) -> None:
    """Let flushing to disk fail, once, for a file whose path has this part."""
    flush, failed = os.fsync, []

    def fsync(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if name in path and not failed:
            failed.append(path)
            raise OSError(code, os.strerror(code))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize(
    "name",
    [
        "step_000006/model.safetensors",
        "step_000006/train_state.pt",
        "step_000006/meta.json",
        "summary.csv",
    ],
)
def test_a_full_disk_is_named_and_the_run_goes_on_afterwards(
    name: str, shared_runs: SharedRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared_runs.copy_of_cut("standard", 5, tmp_path / "cut")
    before = fingerprint(find_checkpoint(tmp_path / "cut"))
    with monkeypatch.context() as patch:
        fail_at(patch, name)
        with pytest.raises(OSError, match=FULL) as caught:
            run("standard", tmp_path / "cut", resume=True)
    assert caught.value.errno == errno.ENOSPC
    assert Path(name).name in str(caught.value)
    assert str(caught.value).endswith("resume=True (--resume) goes on with the run")
    newest = find_checkpoint(tmp_path / "cut")
    load_checkpoint(newest)
    if newest.name == "step_000004":
        assert fingerprint(newest) == before
    assert not list((tmp_path / "cut").rglob(".writing-*"))
    assert run("standard", tmp_path / "cut", resume=True).progress.step == 8
    assert_same_end(shared_runs.whole("standard"), tmp_path / "cut")


def test_a_full_disk_at_the_very_start_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        fail_at(patch, "run.json")
        with pytest.raises(OSError, match=rf"run\.json {FULL}"):
            run("standard", tmp_path)
    assert run("standard", tmp_path).progress.step == 8


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_log_that_cannot_grow_is_named(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match=rf"metrics\.jsonl {FULL}"):
        log.step(step=1, loss=2.0)


LIMITED = """
import resource, sys
from pathlib import Path
from fastadv.data import load_dataset
from fastadv.trainers import Recipe, train
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
recipe = Recipe(epochs=1, batch_size=64, train_images=64, monitor_images=8, pad=0, flip=False)
train("standard", recipe, data="digits", model="small_cnn", run_dir=sys.argv[1], progress=False)
"""


@pytest.mark.slow
@pytest.mark.processes
def test_a_real_limit_of_the_system_is_named(tmp_path: Path) -> None:
    done = ran(["-c", LIMITED, str(tmp_path / "run")])
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1
    assert "model.safetensors cannot be written: File too large; the file system or a limit" in last


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (errno.EDQUOT, "free some space"),
        (errno.EROFS, "choose a folder that can be written"),
        (errno.EIO, "Input/output error$"),
    ],
)
def test_other_failures_are_named(
    code: int, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_atomically(tmp_path / "a.txt", "before")
    fail_at(monkeypatch, "a.txt", code)
    with pytest.raises(OSError, match=rf"a\.txt cannot be written: .*{advice}") as caught:
        write_atomically(tmp_path / "a.txt", "after")
    assert caught.value.errno == code
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "before"


def test_kinds_of_errors_stay_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="cannot be written"):
        write_atomically(tmp_path / "file" / "a.txt", "")
    with pytest.raises(IsADirectoryError, match="cannot be written"):
        (tmp_path / "folder").mkdir()
        write_atomically(tmp_path / "folder", "")


def test_new_files_have_the_permissions_of_the_process(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "a.txt", "")
    finally:
        os.umask(before)
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o640
