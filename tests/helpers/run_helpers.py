"""Small runs of training: started, stopped, compared; and the content of a folder."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from training_helpers import make_model, small_data, small_recipe, states_equal

from fastadv.trainers import Settings, train
from fastadv.trainers.checkpoint import find_checkpoint, load_checkpoint

OFTEN = Settings(checkpoint_every=3, log_every=2, keep=3)


class Interruption(Exception):
    """What stops a run in these tests."""


def run(method: str, folder: Path, stop_after: int | None = None, **options: Any) -> Any:
    """Train on the small data; optionally stop after so many steps of the whole run."""

    def stop(progress: Any) -> None:
        if progress.step == stop_after:
            raise Interruption

    if method == "arrest" and not options.get("resume"):
        options.setdefault("teacher", make_model(1))
    arguments: dict[str, Any] = {
        "data": small_data(),
        "model": "small_cnn",
        "run_dir": folder,
        "settings": OFTEN,
        "progress": False,
        "device": "cpu",
        "on_step": stop,
    }
    recipe = small_recipe(method, **({"ema_decay": 0.8} | options.pop("changes", {})))
    return train(method, recipe, **(arguments | options))


class SharedRuns:
    """Runs by `run` with its own options, which are trained once for all tests of a process, and only read.

    Args:
        folder: where they are.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def whole(self, method: str) -> Path:
        """The folder of a run that nothing has stopped."""
        folder = self._folder / method
        if not folder.exists():
            run(method, folder)
        return folder

    def copy_of_cut(self, method: str, step: int, folder: Path) -> None:
        """Copy a run that was stopped after so many steps."""
        cut = self._folder / f"{method}-{step}"
        if not cut.exists():
            with pytest.raises(Interruption):
                run(method, cut, step)
        shutil.copytree(cut, folder, symlinks=True)


def assert_same_end(one: Path, other: Path) -> None:
    """Check that two runs ended with the same bits: weights, averages, momentum, counters."""
    a, b = (load_checkpoint(find_checkpoint(folder)) for folder in (one, other))
    assert a.path.name == b.path.name
    assert states_equal(a.weights, b.weights)
    states = [c.train_state["optimizers"]["model"]["state"] for c in (a, b)]
    for index, entry in states[0].items():
        assert torch.equal(entry["momentum_buffer"], states[1][index]["momentum_buffer"])
    assert a.train_state["progress"] == b.train_state["progress"]


def fingerprint(folder: Path) -> dict[str, str]:
    """Content of everything below a folder, links included."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"link to {os.readlink(path)}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = "folder"
    return found


def stop_at(step: int) -> Callable[[Any], None]:
    """A callback that interrupts a run after so many steps."""

    def stop(progress: Any) -> None:
        if progress.step == step:
            raise Interruption

    return stop
