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

_STOPPING = "waiting for the runs to save their checkpoints"
_POLL_SECONDS = 0.05  # seconds between two looks at the processes
STOPPED = "stopped; the same command goes on"


def run_locally(plan: Plan, runs: Sequence[SweepRun], jobs: int, quiet: bool) -> list[Failure]:
    """Train and judge runs, each in a process of its own.

    Args:
        plan: the sweep.
        runs: the unfinished runs.
        jobs: the number of runs at once.
        quiet: write no messages.

    Returns:
        The runs that failed. The other runs are not affected by a failure.

    Raises:
        Interrupted: after SIGTERM or Ctrl-C, when all processes have stopped, each after a last checkpoint.
    """
    processes = _Processes(plan, runs, jobs, quiet)
    with StopRequest(_STOPPING) as request:
        try:
            while processes.going or (processes.waiting and request.signal is None):
                for slot in processes.free_slots():
                    if request.signal is None:
                        processes.start_next(slot)
                if request.signal is not None:
                    processes.stop()
                processes.collect_ended()
                time.sleep(_POLL_SECONDS)
        finally:
            processes.kill()
    if request.signal is not None:
        raise Interrupted(STOPPED, request.signal)
    return processes.failures


class _Processes:
    """The processes of a sweep's runs on this machine.

    Args:
        plan: the sweep.
        runs: the runs to start.
        jobs: the number of runs at once.
        quiet: write no messages.

    Attributes:
        waiting: the runs that are not started yet.
        going: the runs that go on, with their processes, by slot.
        failures: the runs that failed before they were told to stop.
    """

    def __init__(self, plan: Plan, runs: Sequence[SweepRun], jobs: int, quiet: bool) -> None:
        self._plan, self._jobs, self._quiet = plan, jobs, quiet
        self._stopping = False
        self.waiting = list(runs)
        self.going: dict[int, tuple[SweepRun, subprocess.Popen[bytes]]] = {}
        self.failures: list[Failure] = []

    def free_slots(self) -> list[int]:
        """Return the slots in which waiting runs can start now."""
        free = [slot for slot in range(self._jobs) if slot not in self.going]
        return free[: len(self.waiting)]

    def start_next(self, slot: int) -> None:
        """Start the next waiting run in a free slot."""
        run = self.waiting.pop(0)
        variables = _environment(slot, self._jobs)
        process = start(self._plan.folder, run.name, run.log, environment=variables)
        self.going[slot] = run, process
        say(self._quiet, f"{run.name}: started")

    def stop(self) -> None:
        """Tell all runs once to stop."""
        if not self._stopping:
            self._stopping = True
            for _, process in self.going.values():
                process.send_signal(signal.SIGTERM)

    def collect_ended(self) -> None:
        """Free the slots of runs that have ended, and note the failures."""
        for slot, (run, process) in list(self.going.items()):
            status = process.poll()
            if status is None:
                continue
            del self.going[slot]
            if status and not self._stopping:
                self.failures.append(Failure(run.name, reason_of(status), run.log))
            say(self._quiet, f"{run.name}: {reason_of(status) if status else 'done'}")

    def kill(self) -> None:
        """Kill the processes that are left."""
        for _, process in self.going.values():
            process.kill()
            process.wait()


def say(quiet: bool, text: str) -> None:
    """Write a line on standard error, unless ``quiet``."""
    if not quiet:
        print(text, file=sys.stderr, flush=True)


def _environment(slot: int, jobs: int) -> dict[str, str]:
    """The environment variables that give a slot its share of the processors and GPUs."""
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
