"""Running a sweep on this machine, one run after another or several at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

import torch

from fastadv.interruption import Interrupted, StopRequest
from fastadv.sweeps.plan import Plan, SweepRun
from fastadv.sweeps.processes import Failure, reason_of, start

_PAUSE = 0.05  # seconds between two looks at the processes
STOPPED = "stopped; the same command goes on"


def run_locally(plan: Plan, runs: Sequence[SweepRun], jobs: int, quiet: bool) -> list[Failure]:
    """Train and judge runs, each in a process of its own.

    Args:
        plan: the sweep.
        runs: the unfinished runs.
        jobs: how many at once.
        quiet: say nothing meanwhile.

    Returns:
        The runs that failed; they did not keep the others from going on.

    Raises:
        Interrupted: after SIGTERM or Ctrl-C, when all processes have stopped, each after a last checkpoint.
    """
    waiting = list(runs)
    going: dict[int, tuple[SweepRun, subprocess.Popen[bytes]]] = {}  # by slot
    failures: list[Failure] = []
    told = False
    with StopRequest("waiting for the runs to save their checkpoints") as request:
        try:
            while going or (waiting and request.signal is None):
                for slot in range(jobs):
                    if slot not in going and waiting and request.signal is None:
                        run = waiting.pop(0)
                        variables = _environment(slot, jobs)
                        process = start(plan.folder, run.name, run.log, environment=variables)
                        going[slot] = run, process
                        say(quiet, f"{run.name}: started")
                if request.signal is not None and not told:
                    told = True
                    for _, process in going.values():
                        process.send_signal(signal.SIGTERM)
                for slot, (run, process) in list(going.items()):
                    status = process.poll()
                    if status is None:
                        continue
                    del going[slot]
                    if status and not told:
                        failures.append(Failure(run.name, reason_of(status), run.log))
                    say(quiet, f"{run.name}: {reason_of(status) if status else 'done'}")
                time.sleep(_PAUSE)
        finally:
            for _, process in going.values():
                process.kill()
                process.wait()
    if request.signal is not None:
        raise Interrupted(STOPPED, request.signal)
    return failures


def say(quiet: bool, text: str) -> None:
    """Write a line on standard error, unless silence is asked for."""
    if not quiet:
        print(text, file=sys.stderr, flush=True)


def _environment(slot: int, jobs: int) -> dict[str, str]:
    """Share the processors and the GPUs among the runs that go on at once."""
    if jobs == 1:
        return {}
    variables = {}
    if "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0))
        variables["OMP_NUM_THREADS"] = str(max(cores // jobs, 1))
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        devices = [part for part in named.split(",") if part]
    else:
        devices = [str(number) for number in range(torch.cuda.device_count())]
    if len(devices) > 1:
        variables["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
    return variables
