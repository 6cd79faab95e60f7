"""Two processes as torchrun starts them: a hanging one is noticed and named, and a signal stops both together."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from processes import Started, rank_environments
from run_helpers import assert_same_end

from fastadv.trainers.checkpoint import checkpoints_in

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
NOBODY = 2
CHILD = """
import os, signal, sys, torch
torch.set_num_threads(1)
folder, what, who, timeout = sys.argv[1:]
from fastadv import lost_ranks
lost_ranks._TIMEOUT = 2.0  # seconds, in place of ten, in which no mark of a lost rank appears
from run_helpers import run
from training_helpers import make_model
from fastadv.trainers import Settings

def act(progress):
    if progress.step == 3 and os.environ["RANK"] == who:
        os.kill(os.getpid(), getattr(signal, what))

try:
    settings = Settings(timeout=float(timeout))
    run("pgd_at", folder, model=make_model(0), settings=settings, on_step=act, resume=True)
except RuntimeError as error:
    print(type(error).__name__, error, flush=True)
    os._exit(1)
"""


@contextmanager
def two_ranks(folder: Path, what: str, who: int, timeout: float) -> Iterator[list[Started]]:
    """Start both, of which one sends itself a signal after its third step."""
    words = ["-c", CHILD, str(folder), what, str(who), str(timeout)]
    processes = [Started(words, variables, merged=True) for variables in rank_environments(2)]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.mark.processes
def test_a_hanging_rank_is_noticed_and_named(tmp_path: Path) -> None:
    with two_ranks(tmp_path, "SIGSTOP", who=1, timeout=2.0) as (first, second):
        out, _ = first.communicate(timeout=120)
        assert first.returncode == 1
        assert "LostRanksError rank 0 got no answer from rank 1 of 0 to 1" in out
        assert "waits 2 s" in out and "Resuming goes on from the last checkpoint" in out
        assert second.poll() is None  # it hangs still


@pytest.mark.processes
def test_a_rank_that_was_killed_is_named_without_waiting(tmp_path: Path) -> None:
    with two_ranks(tmp_path, "SIGKILL", who=1, timeout=600.0) as (first, _):
        out, _ = first.communicate(timeout=120)
        assert first.returncode == 1 and "got no answer from rank 1" in out


def finish(folder: Path) -> None:
    """Train, or go on, to the end."""
    with two_ranks(folder, "SIGTERM", who=NOBODY, timeout=60.0) as processes:
        outs = [process.communicate(timeout=120)[0] for process in processes]
        assert [process.returncode for process in processes] == [0, 0], outs


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    finish(folder)
    return folder


@pytest.mark.processes
@pytest.mark.parametrize("who", [0, 1])
def test_a_signal_to_one_rank_stops_both_after_the_same_step(
    who: int, whole: Path, tmp_path: Path
) -> None:
    with two_ranks(tmp_path, "SIGTERM", who=who, timeout=60.0) as processes:
        for process in processes:
            process.communicate(timeout=120)
            assert process.returncode == 128 + signal.SIGTERM
    assert [path.name for path in checkpoints_in(tmp_path / "checkpoints")] == ["step_000003"]
    if who == 1:  # what has stopped in the same place goes on in the same way
        finish(tmp_path)
        assert_same_end(whole, tmp_path)
