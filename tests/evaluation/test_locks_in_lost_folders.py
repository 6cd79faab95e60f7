"""Locks whose folder is lost or becomes read-only while they are held hide no error and keep no file open."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fastadv.locks import locked


def put_a_file_in_its_place(folder: Path, patch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(folder)
    folder.write_text("")


def make_it_read_only(folder: Path, patch: pytest.MonkeyPatch) -> None:
    def unlink(path: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    patch.setattr(Path, "unlink", unlink)


@pytest.mark.parametrize("lose", [put_a_file_in_its_place, make_it_read_only])
def test_the_error_of_the_work_is_seen(
    lose: Callable[[Path, pytest.MonkeyPatch], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with (
        monkeypatch.context() as patch,
        pytest.raises(RuntimeError, match="the work failed"),
        locked(folder / "eval.json"),
    ):
        lose(folder, patch)
        raise RuntimeError("the work failed")
    links = Path("/proc/self/fd").iterdir()
    assert not [link for link in links if ".eval.json.lock" in os.path.realpath(link)]


def test_success_stays_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, locked(tmp_path / "eval.json"):
        make_it_read_only(tmp_path, patch)
    with locked(tmp_path / "eval.json", wait=0):  # given back, though its file is there
        pass
