"""The process of one run of a sweep: `python -m fastadv.sweeps.work SWEEP RUN` trains it, then judges it.

Every launcher starts it, here or on another machine. Finished work is not done again, and a training that
was interrupted goes on from its last checkpoint.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import signal
import sys
import time
from pathlib import Path

from fastadv.cli import main
from fastadv.sweeps.plan import Plan, SweepRun
from fastadv.trainers import RunInUseError
from fastadv.trainers.run_lock import RunLock

_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)
_TIMEOUT = 600.0  # seconds to wait for a process of an earlier sweep to end


def work(folder: Path, name: str) -> int:
    """Train a run and judge it. Steps that are done already are skipped.

    Args:
        folder: the sweep's directory.
        name: the run's name.

    Returns:
        The exit status of the first command that failed, or 0.
    """
    plan = Plan.load(folder)
    run = plan.run_named(name)
    _wait_until_free(run)
    if not run.is_trained():
        words = ["train", plan.method, *plan.training_words(run), "--run", str(run.folder)]
        status = _command([*words, "--resume", "true"])
        if status:
            return status
        run.mark_trained()
    if not run.is_finished(plan.evaluation):
        status = _command(["eval", str(run.folder), *plan.evaluation, "--quiet", "true"])
        if status:
            return status
        run.mark_judged(plan.evaluation)
    return 0


def end_with(parent: int) -> None:
    """Let the kernel send SIGTERM to this process when its parent ends, even by SIGKILL.

    Args:
        parent: process id of the parent.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_SET_PARENT_DEATH_SIGNAL, int(signal.SIGTERM), 0, 0, 0)
    if os.getppid() != parent:  # it ended before
        os.kill(os.getpid(), signal.SIGTERM)


def _command(words: list[str]) -> int:
    print(f"\n$ {shlex.join(['fastadv', *words])}", flush=True)
    return main(words)


def _wait_until_free(run: SweepRun) -> None:
    """Wait for a process that still trains the run, such as one that was told to stop and saves its checkpoint."""
    deadline = time.monotonic() + _TIMEOUT
    while run.folder.is_dir():
        try:
            return RunLock(run.folder).check()
        except RunInUseError:
            if time.monotonic() > deadline:
                raise


def _main() -> int:
    folder, name, *parent = sys.argv[1:]
    if parent:
        end_with(int(parent[0]))
    return work(Path(folder), name)


if __name__ == "__main__":
    sys.exit(_main())
