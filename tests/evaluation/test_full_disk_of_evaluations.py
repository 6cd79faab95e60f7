"""Finished work that cannot be kept: the evaluation goes on and says so, and what was kept before is of use."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from linear_model import linear_problem

from fastadv import files
from fastadv.evaluation import autoattack, evaluate
from fastadv.files import write_atomically

pytestmark = pytest.mark.usefixtures("one_thread")
EPS = 0.02
WARNED = "keeps no more of its finished work, .* cannot be written: No space left on device"


@contextmanager
def full_after(writes: int, suffix: str, patch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """Let files of this suffix fill the disk after so many of them; yields the files that were tried."""
    write, tried = files.write_through, []

    def full(path: Path, content: bytes, final: Path) -> None:
        if final.suffix == suffix and final.name != "manifest.json":
            tried.append(final)
            if len(tried) > writes:
                with files.naming(final):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, content, final)

    with patch.context() as inside:
        inside.setattr(files, "write_through", full)
        yield tried


def test_an_evaluation_goes_on_with_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x, y = linear_problem(classes=4, n=24, wrong=2)
    settings: dict[str, Any] = {"attacks": ("pgd-3",), "eps": EPS, "batch_size": 4}
    settings |= {"progress": False, "keep_images": 3}
    wanted = evaluate(model, (x, y), **settings)["pgd-3"].correct
    with (
        full_after(1, ".npz", monkeypatch) as tried,
        pytest.warns(UserWarning, match=WARNED) as warned,
    ):
        found = evaluate(model, (x, y), state_dir=tmp_path, **settings)
    assert found["pgd-3"].correct == wanted and len(tried) == 2
    assert len([one for one in warned if "finished work" in str(one.message)]) == 1
    # A batch whose worst images are missing must be missing itself; all later ones are too.
    kept = {path.stem for path in (tmp_path / "batches").glob("pgd*.json")}
    assert tried[0].stem in kept and tried[1].stem not in kept
    again = evaluate(model, (x, y), state_dir=tmp_path, **settings)["pgd-3"]
    assert again.correct == wanted
    assert again.worst is not None and found["pgd-3"].worst is not None
    assert again.worst.indices.tolist() == found["pgd-3"].worst.indices.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["auto", "fp32"])
def test_autoattack_goes_on_with_a_full_disk(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastadv.evaluation.autoattack_run._MOST_ROWS", 8)
    model, x, y = linear_problem(classes=4, n=20, wrong=2)
    settings: dict[str, Any] = {"eps": EPS, "version": ("apgd-ce",), "batch_size": 4}
    settings["engine"] = engine
    wanted = autoattack(model, (x, y), **settings)
    with full_after(2, ".pt", monkeypatch), pytest.warns(UserWarning, match=WARNED):
        found = autoattack(model, (x, y), state_dir=tmp_path, **settings)
    assert found.robust.tolist() == wanted.robust.tolist()
    assert len(list(tmp_path.glob("*.pt"))) == 2
    again = autoattack(model, (x, y), state_dir=tmp_path, **settings)
    assert again.robust.tolist() == wanted.robust.tolist()


def test_only_a_run_of_training_is_told_to_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        full_after(0, ".html", monkeypatch),
        pytest.raises(OSError, match="free some space there and try again") as told,
    ):
        write_atomically(tmp_path / "report.html", "a report")
    assert "resume" not in str(told.value)
