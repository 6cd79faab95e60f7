"""Submitting a sweep to Slurm, as a job array with one task per run."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import stat
import subprocess
from collections.abc import Sequence
from pathlib import Path

from fastadv.files import write_atomically
from fastadv.sweeps.plan import LOGS, Plan, SweepRun
from fastadv.sweeps.processes import command_of

SCRIPT_FILE = "sweep.sbatch"
_JOB_FILE = "slurm.json"
_NOTICE = 120  # seconds before the end of its time limit at which a job gets SIGTERM, to save its checkpoint


def write_script(
    plan: Plan,
    runs: Sequence[SweepRun],
    *,
    jobs: int | None = None,
    gpus: float | None = None,
    cpus: int | None = None,
    options: Sequence[str] = (),
) -> Path:
    """Write the script of a job array.

    Args:
        plan: the sweep.
        runs: the unfinished runs, at least one.
        jobs: the number of runs at once; None for as many as the cluster has room for.
        gpus: the number of GPUs for each run.
        cpus: the number of CPUs for each run.
        options: further options of `sbatch`, such as "partition=gpu" or "time=12:00:00".

    Raises:
        ValueError: when gpus is not a whole number, or an option is not of that form.
    """
    if gpus is not None and gpus != int(gpus):
        raise ValueError(f"gpus_per_run must be a whole number for Slurm, got {gpus:g}")
    for option in options:
        if not re.fullmatch(r"[a-z][a-z-]*(=[^\s#]+)?", option):
            raise ValueError(
                f"slurm must hold options of sbatch without dashes, such as partition=gpu, got {option!r}"
            )
    logs = plan.folder.resolve() / LOGS
    directives = [
        f"job-name=fastadv-{plan.method}",
        f"array=0-{len(runs) - 1}{f'%{jobs}' if jobs else ''}",
        f"output={_escaped(logs / 'slurm-%A_%a.log')}",
        "open-mode=append",
        f"signal=B:TERM@{_NOTICE}",
        "requeue",
        *([f"gpus={int(gpus)}"] if gpus else []),
        *([f"cpus-per-task={cpus}"] if cpus else []),
        *options,
    ]
    names = "\n".join(f"  {shlex.quote(run.name)}" for run in runs)
    command = shlex.join(command_of(plan.folder.resolve(), "RUN")[:-1])
    text = "\n".join(
        [
            "#!/bin/bash",
            *(f"#SBATCH --{directive}" for directive in directives),
            "",
            "# One run of the sweep for each task of the array.",
            f"runs=(\n{names}\n)",
            f"cd {shlex.quote(os.getcwd())} || exit 1",
            "# In place of the shell, so that the signals of Slurm reach it.",
            f'exec {command} "${{runs[$SLURM_ARRAY_TASK_ID]}}"',
            "",
        ]
    )
    logs.mkdir(parents=True, exist_ok=True)
    path = write_atomically(plan.folder / SCRIPT_FILE, text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def submit(script: Path) -> str:
    """Submit the script of a job array, unless the sweep's last job is still in the queue.

    Returns:
        The number of the job.

    Raises:
        FileNotFoundError: when there is no `sbatch`.
        RuntimeError: when it refuses, or the last job has not ended; the message says so.
    """
    program = shutil.which("sbatch")
    if program is None:
        raise FileNotFoundError(
            f"sbatch: no such program on this machine; {script} is written, for a machine that has Slurm"
        )
    file = script.with_name(_JOB_FILE)
    if file.is_file():
        last = str(json.loads(file.read_text(encoding="utf-8"))["job"])
        if _is_there(last):
            raise RuntimeError(
                f"job {last} of this sweep has not ended; wait for its end, or end it by `scancel {last}`"
            )
    done = subprocess.run([program, "--parsable", str(script)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"sbatch refused {script}: {done.stderr.strip() or done.stdout.strip()}")
    job = done.stdout.strip().partition(";")[0]
    write_atomically(file, json.dumps({"job": job}) + "\n")
    return job


def _is_there(job: str) -> bool:
    """Whether Slurm still has a job in its queue, waiting or running."""
    program = shutil.which("squeue")
    if program is None:
        return False
    done = subprocess.run([program, "--noheader", "--jobs", job], capture_output=True, text=True)
    return done.returncode == 0 and bool(done.stdout.strip())


def _escaped(path: Path) -> str:
    """A path in a directive of the script; a path with spaces needs quotation marks."""
    text = str(path)
    return f'"{text}"' if " " in text else text
