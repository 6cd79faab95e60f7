"""Running a sweep on a Ray cluster: an actor for each run. A run whose node is lost is started on another node."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastadv.interruption import Interrupted, StopRequest
from fastadv.sweeps.local import STOPPED, say
from fastadv.sweeps.plan import Plan, SweepRun
from fastadv.sweeps.processes import Failure, reason_of, start

_POLL_SECONDS = 0.2  # seconds between two checks for a signal
_MAX_LOST_NODES = 10  # nodes that one run may lose; more losses have another cause


class RunWorker:
    """The work of an actor: it trains and judges one run in a process of its own."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def work(self, folder: str, name: str, log: str, directory: str) -> int:
        """Train and judge a run of the sweep, and return the exit status of its process."""
        self._process = start(Path(folder), name, Path(log), directory=directory)
        return self._process.wait()


def run_on_ray(
    plan: Plan,
    runs: Sequence[SweepRun],
    *,
    address: str | None = None,
    jobs: int | None = None,
    gpus: float | None = None,
    cpus: int | None = None,
    quiet: bool = False,
) -> list[Failure]:
    """Train and judge runs on a cluster whose nodes all have the sweep's directory and the data.

    Args:
        plan: the sweep.
        runs: the unfinished runs.
        address: address of the cluster; by default the cluster that this machine belongs to, else this machine
            alone.
        jobs: the number of runs at once; None for as many as the cluster has room for.
        gpus: the number of GPUs for each run; by default 1 where the cluster has GPUs.
        cpus: the number of CPUs for each run; by default 1.
        quiet: write no messages.

    Returns:
        The runs that failed.

    Raises:
        ImportError: when Ray is not installed.
        ValueError: when the cluster could never give a run its processors.
        Interrupted: after SIGTERM or Ctrl-C; the runs have been told to stop.
    """
    ray = _ray()
    connected = ray.is_initialized()
    if not connected:
        ray.init(address=address, log_to_driver=False, configure_logging=False)
    try:
        resources = ray.cluster_resources()
        gpus = gpus if gpus is not None else float(min(resources.get("GPU", 0), 1))
        needs = {"num_cpus": cpus or 1, "num_gpus": gpus}
        for option, kind, needed in (
            ("cpus_per_run", "CPU", cpus or 1),
            ("gpus_per_run", "GPU", gpus),
        ):
            if needed > resources.get(kind, 0):
                raise ValueError(
                    f"{option} must be at most the cluster's number, {resources.get(kind, 0):g}, got {needed:g}"
                )
        # A run on a lost node is started again by the driver. Ray must not restart it as well.
        actor = ray.remote(RunWorker).options(max_restarts=0, max_task_retries=0, **needs)
        return _Driver(ray, actor, plan, quiet).drive(list(runs), jobs or len(runs))
    finally:
        if not connected:
            ray.shutdown()


class _Driver:
    """Hands runs to actors and collects their results.

    Args:
        ray: the module ray.
        actor: the actor class.
        plan: the sweep.
        quiet: write no messages.
    """

    def __init__(self, ray: Any, actor: Any, plan: Plan, quiet: bool) -> None:
        self._ray, self._actor, self._plan, self._quiet = ray, actor, plan, quiet
        self._going: dict[Any, tuple[SweepRun, Any]] = {}  # by the reference to the result
        self._losses: dict[str, int] = {}

    def drive(self, waiting: list[SweepRun], jobs: int) -> list[Failure]:
        failures: list[Failure] = []
        with StopRequest("the runs are told to save their checkpoints") as request:
            try:
                while (waiting or self._going) and request.signal is None:
                    while waiting and len(self._going) < jobs:
                        self._start(waiting.pop(0))
                    ready, _ = self._ray.wait(list(self._going), timeout=_POLL_SECONDS)
                    for reference in ready:
                        self._collect(reference, waiting, failures)
            finally:
                for _, worker in self._going.values():
                    self._ray.kill(worker)
        if request.signal is not None:
            raise Interrupted(STOPPED, request.signal)
        return failures

    def _collect(self, reference: Any, waiting: list[SweepRun], failures: list[Failure]) -> None:
        """Record a run that has ended. A run whose node is lost waits again, `_MAX_LOST_NODES` times at most."""
        run, worker = self._going.pop(reference)
        reason = self._end_of(reference)
        self._ray.kill(worker)
        if reason is not None:
            say(self._quiet, f"{run.name}: {reason or 'done'}")
            if reason:
                failures.append(Failure(run.name, reason, run.log))
            return
        say(self._quiet, f"{run.name}: its node is lost; it goes on elsewhere")
        self._losses[run.name] = self._losses.get(run.name, 0) + 1
        if self._losses[run.name] > _MAX_LOST_NODES:
            failures.append(Failure(run.name, f"lost its node {_MAX_LOST_NODES} times", run.log))
        else:
            waiting.insert(0, run)

    def _start(self, run: SweepRun) -> None:
        worker = self._actor.remote()
        places = (str(self._plan.folder.resolve()), run.name, str(run.log.resolve()), os.getcwd())
        self._going[worker.work.remote(*places)] = run, worker
        say(self._quiet, f"{run.name}: handed to Ray")

    def _end_of(self, reference: Any) -> str | None:
        """How a run ended: empty without an error, None where its node is lost, else the reason of the failure."""
        errors = self._ray.exceptions
        try:
            status = self._ray.get(reference)
        except (errors.RayActorError, errors.NodeDiedError, errors.WorkerCrashedError):
            return None
        except errors.RayTaskError as error:
            return f"could not be started: {' '.join(str(error.cause).split())}"
        return reason_of(status) if status else ""


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise ImportError(
            "launcher ray needs Ray; install it by `pip install fastadv[ray]`, here and on every node"
        ) from error
    return ray
