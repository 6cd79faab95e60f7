"""One process per run directory, and nothing left of those that were killed."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import Started
from run_helpers import Interruption, fingerprint, run

from fastadv.files import TEMPORARY, remove_leftovers, temporary_beside
from fastadv.trainers import RunInUseError, Settings
from fastadv.trainers import run_lock as lock_module
from fastadv.trainers.run_lock import RunLock
from fastadv.trainers.sealed import sealed_json

pytestmark = pytest.mark.usefixtures("one_thread")
HOLDER = """
import os, sys, time
from pathlib import Path
from fastadv.trainers.run_lock import RunLock
folder = Path(sys.argv[1])
os.setsid()
with RunLock(folder) as lock:
    lock.take()
    if os.fork() == 0:  # as a process that reads data ahead
        time.sleep(60)
        os._exit(0)
    print("taken", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[Started]:
    """A process that holds the lock of tmp_path, and has a child."""
    process = Started(["-c", HOLDER, str(tmp_path)])
    assert process.first_line() == "taken"
    yield process
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
@pytest.mark.processes
def test_a_second_process_is_told_who_is_there(
    tmp_path: Path, holder: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock_module, "_TIMEOUT", 0.1)
    words = rf"{tmp_path} is in use by process {holder.pid} on host {socket.gethostname()} since \d"
    for options in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(RunInUseError, match=words):
            run("standard", tmp_path, **options)
    with pytest.raises(RunInUseError, match=words):
        RunLock(tmp_path).take()
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.processes
def test_the_lock_ends_with_its_process_though_a_child_lives_on(
    tmp_path: Path, holder: Started
) -> None:
    holder.kill()
    holder.wait()
    assert run("standard", tmp_path, resume=True).progress.step == 8
    assert not (tmp_path / ".lock").exists()


def test_no_lock_outlives_a_run_that_fails(tmp_path: Path) -> None:
    with pytest.raises(Interruption):
        run("standard", tmp_path, 5)
    assert not (tmp_path / ".lock").exists()
    assert run("standard", tmp_path, resume=True).progress.step == 8


def test_one_run_per_directory_within_a_process_as_well(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)

    def begin_another(progress: Any) -> None:
        if progress.step == 1:
            run("standard", tmp_path / "link", resume=True)

    with pytest.raises(RunInUseError, match=f"process {os.getpid()} on"):
        run("standard", tmp_path, on_step=begin_another)


def test_of_many_threads_one_gets_the_lock(tmp_path: Path) -> None:
    taken, refused = [], []

    def take() -> None:
        lock = RunLock(tmp_path)
        try:
            lock.take()
            taken.append(lock)
        except RunInUseError:
            refused.append(lock)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(taken), len(refused)) == (1, 7)
    taken[0].release()
    with RunLock(tmp_path) as lock:
        lock.take()


@pytest.mark.processes
def test_a_lock_is_not_given_back_by_a_child(tmp_path: Path) -> None:
    with RunLock(tmp_path) as lock:
        lock.take()
        child = os.fork()
        if child == 0:
            lock.release()
            os._exit(0)
        os.waitpid(child, 0)
        assert (tmp_path / ".lock").exists()


def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)


def write_holder(folder: Path, **entries: Any) -> None:
    entries = {"pid": os.getppid(), "host": socket.gethostname(), "since": "noon"} | entries
    (folder / ".lock").write_text(json.dumps(entries))


def test_where_there_are_no_locks_the_file_is_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_locks(monkeypatch)
    write_holder(tmp_path)
    with pytest.raises(RunInUseError, match=f"process {os.getppid()} on"):
        RunLock(tmp_path).take()
    write_holder(tmp_path, pid=2**22 + 1)  # more than there can be
    with RunLock(tmp_path) as lock:
        lock.take()
    write_holder(tmp_path, host="elsewhere")
    with pytest.warns(
        UserWarning, match="has no locks; make sure that process .* on host elsewhere"
    ):
        RunLock(tmp_path).check()


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[]", b'{"pid": "x"}'])
def test_a_stale_lock_file_of_any_content_is_taken_over(content: bytes, tmp_path: Path) -> None:
    (tmp_path / ".lock").write_bytes(content)
    assert run("standard", tmp_path).progress.step == 8
    assert not (tmp_path / ".lock").exists()


@pytest.mark.processes
def test_a_process_that_is_about_to_end_is_waited_for(
    tmp_path: Path, holder: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock_module, "_TIMEOUT", 30.0)
    threading.Timer(0.5, holder.kill).start()
    began = time.monotonic()
    with RunLock(tmp_path) as lock:
        lock.take()
    assert time.monotonic() - began < 25


# Leftovers


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.processes
def test_what_killed_processes_left_is_deleted_at_the_next_start(tmp_path: Path) -> None:
    with pytest.raises(Interruption):
        run("standard", tmp_path, 5)
    pid, folder = dead_process(), tmp_path / "checkpoints"
    mine = temporary_beside(tmp_path / "run.json").name
    left = mine.replace(f"@{os.getpid()}@", f"@{pid}@")
    assert left != mine
    (tmp_path / left).write_text("half")
    (tmp_path / ".notes").write_text("mine")
    (folder / f"{TEMPORARY}step_000006").mkdir()
    (folder / f"{TEMPORARY}step_000006" / "model.safetensors").write_text("half")
    (folder / f"{TEMPORARY}latest@host@1@abcd").symlink_to("step_000004")
    (folder / f"{TEMPORARY}step_000003.old").write_text("")
    with pytest.raises(Interruption):
        run("standard", tmp_path, 5, resume=True)
    hidden = [path.name for path in tmp_path.rglob(".*")]
    assert hidden == [".notes"]


@pytest.mark.processes
def test_what_others_are_writing_is_left_alone(tmp_path: Path) -> None:
    host, pid = socket.gethostname(), os.getpid()
    kept = [
        f"{TEMPORARY}eval.json@{host}@{pid}@12345678",
        f"{TEMPORARY}eval.json@elsewhere@{dead_process()}@12345678",
        f"{TEMPORARY}something",
    ]
    old = f"{TEMPORARY}eval.json@elsewhere@1@87654321"
    for name in (*kept, old):
        (tmp_path / name).write_text("half")
    long_ago = time.time() - 2 * 24 * 60 * 60
    os.utime(tmp_path / old, (long_ago, long_ago))
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


def test_a_disk_that_is_full_leaves_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match="No space left"), RunLock(tmp_path) as lock:
            lock.take()
    assert list(tmp_path.iterdir()) == []
    held = os.listdir("/proc/self/fd")
    with RunLock(tmp_path) as lock:
        lock.take()
    assert os.listdir("/proc/self/fd") == held


def is_free(folder: Path) -> bool:
    """Whether another process could take the lock."""
    child = os.fork()
    if child == 0:
        with open(folder / ".lock", "rb+") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


@pytest.mark.processes
def test_a_lock_that_a_copy_of_the_directory_gave_back_is_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with RunLock(folder) as lock:
        lock.take()
        shutil.copytree(folder, tmp_path / "copy")
        assert is_free(folder)
        lock.keep()
        assert not is_free(folder)
        (folder / ".lock").unlink()  # by somebody who took it for a stale one
        lock.keep()
        assert not is_free(folder)
        without_locks(monkeypatch)
        lock.keep()
    assert list(folder.iterdir()) == []


@pytest.mark.processes
def test_of_two_that_lost_and_took_a_lock_the_first_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock_module, "_PATIENCE", 0.1)
    with RunLock(tmp_path) as lock:
        lock.take()
        (tmp_path / ".lock").unlink()
        process = Started(["-c", HOLDER, str(tmp_path)])
        try:
            assert process.first_line() == "taken"
            with pytest.raises(RunInUseError, match=f"is in use by process {process.pid} on"):
                lock.keep()
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.mark.parametrize("place", ["gone", "taken"])
def test_a_run_that_was_moved_writes_nothing_into_its_old_place(place: str, tmp_path: Path) -> None:
    old, new = tmp_path / "run", tmp_path / "moved"
    before: dict[str, str] = {}

    def move(progress: Any) -> None:
        if progress.step == 5:
            old.rename(new)
            if place == "taken":
                shutil.copytree(new, old, symlinks=True)
                record = json.loads((old / "run.json").read_text()) | {"run": "another"}
                del record["sha256"]
                (old / "run.json").write_text(sealed_json(record))
                before.update(fingerprint(old / "checkpoints"))

    found = "another run" if place == "taken" else "no run"
    with pytest.raises(RunInUseError, match=f"run holds {found} now: the run of this process was"):
        run("standard", old, on_step=move, settings=Settings(checkpoint_every=3, log_every=100))
    assert fingerprint(old / "checkpoints") == before if before else not old.exists()
    assert run("standard", new, resume=True).progress.step == 8
