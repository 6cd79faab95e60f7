"""The command `fastadv sweep`. It takes a plan, which `fastadv.cli.sweep` makes of the words.

The attributes of `Launch` are options; its docstring is their help.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from fastadv.commands.report import judged_run
from fastadv.evaluation import Result
from fastadv.evaluation.comparison import distinct_paths
from fastadv.evaluation.reporting import aligned, markdown, write_report
from fastadv.fields import check_fields
from fastadv.files import naming, write_atomically
from fastadv.locks import locked
from fastadv.sweeps.local import run_locally, say
from fastadv.sweeps.plan import PLAN_FILE, Plan, SweepRun
from fastadv.sweeps.processes import Failure
from fastadv.sweeps.ray_cluster import run_on_ray
from fastadv.sweeps.slurm import SCRIPT_FILE, submit, write_script
from fastadv.sweeps.table import Judgement, SweepTable, distinct_curves

_TIMEOUT = 3.0  # seconds to wait for the lock of a sweep that was killed a moment ago


@dataclass(frozen=True)
class Launch:
    """Where and how the runs of a sweep go.

    Attributes:
        launcher: local, on this machine; ray, on a Ray cluster; slurm, as an array of Slurm.
        jobs: number of runs that go on at once; by default one on this machine, and on a cluster as many as it has
            room for.
        gpus_per_run: with ray and slurm, GPUs of each run; with ray also a part of a GPU, such as .5. By default
            ray gives one where the cluster has any, and slurm gives 0.
        cpus_per_run: with ray and slurm, processors of each run.
        ray_address: with ray, the address of the cluster; by default the cluster of this machine.
        slurm: with slurm, further options of sbatch without their dashes, such as partition=gpu time=12:00:00.
    """

    launcher: Literal["local", "ray", "slurm"] = "local"
    jobs: int | None = None
    gpus_per_run: float | None = None
    cpus_per_run: int | None = None
    ray_address: str | None = None
    slurm: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)
        for name, least in (("jobs", 1), ("gpus_per_run", 0), ("cpus_per_run", 1)):
            value = getattr(self, name)
            if value is not None and not least <= value < 100_000:
                raise ValueError(f"{name} must be >= {least}, got {value}")
        used = {
            "local": ("jobs",),
            "ray": ("jobs", "gpus_per_run", "cpus_per_run", "ray_address"),
            "slurm": ("jobs", "gpus_per_run", "cpus_per_run", "slurm"),
        }[self.launcher]
        for name in ("gpus_per_run", "cpus_per_run", "ray_address", "slurm"):
            if getattr(self, name) not in (None, ()) and name not in used:
                raise ValueError(f"{name} has no effect with launcher {self.launcher}")


@dataclass(frozen=True)
class SweepResult:
    """The outcome of a sweep.

    Attributes:
        text: the table and the files, as text.
        failures: the runs that failed.
        unsaved: why the table, the plot or the report could not be written; empty if nothing prevented it.
        content: the contents of ``text`` for scripts, as JSON types.
    """

    text: str
    failures: tuple[Failure, ...] = ()
    unsaved: str = ""
    content: dict[str, Any] = field(default_factory=dict)


def run_sweep(
    plan: Plan,
    launch: Launch,
    *,
    beside: Sequence[str] = (),
    dry_run: bool = False,
    quiet: bool = False,
) -> SweepResult:
    """Do the runs of a sweep that are left, and compare all its runs.

    Args:
        plan: the sweep.
        launch: where and how the runs go.
        beside: directories of further sweeps, whose points come into the same table and plot.
        dry_run: with slurm, only write the script; else only say which runs are left.
        quiet: print no progress.

    Raises:
        Interrupted: after SIGTERM or Ctrl-C.
        TimeoutError: if another process does a sweep in the same directory.
        ValueError: if the directory holds another sweep.
    """
    if len(distinct_paths([str(plan.folder), *beside])) < 1 + len(beside):
        raise ValueError(
            f"beside must name other sweeps than out, {plan.folder}, each once, got {' '.join(beside)}"
        )
    others = [Plan.load(Path(folder)) for folder in beside]  # before hours are spent
    plan.check()
    if dry_run and launch.launcher != "slurm":
        return _commands(plan)
    with naming(plan.folder):
        plan.folder.mkdir(parents=True, exist_ok=True)
    with _alone_in(plan.folder):
        plan.save()
        left = plan.unfinished()
        say(quiet, f"{len(plan.runs)} runs, {len(left)} of them left to do")
        failures: list[Failure] = []
        if left and launch.launcher == "slurm":
            return _hand_to_slurm(plan, left, launch, dry_run)
        if left and launch.launcher == "ray":
            failures = run_on_ray(
                plan,
                left,
                address=launch.ray_address,
                jobs=launch.jobs,
                gpus=launch.gpus_per_run,
                cpus=launch.cpus_per_run,
                quiet=quiet,
            )
        elif left:
            failures = run_locally(plan, left, launch.jobs or 1, quiet)
        return _tabulate([plan, *others], failures)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Let one process at a time do the sweep in a directory."""
    with ExitStack() as held:
        try:
            held.enter_context(locked(folder / PLAN_FILE, _TIMEOUT))
        except TimeoutError as error:
            raise TimeoutError(
                f"out must be a directory in which no other process does a sweep, got {folder}; wait for its end, "
                f"or choose another directory ({error})"
            ) from error
        yield


def _commands(plan: Plan) -> SweepResult:
    """The trainings that are left, as command lines."""
    lines = [
        shlex.join(
            ["fastadv", "train", plan.method, *plan.training_words(run), "--run", str(run.folder)]
        )
        for run in plan.unfinished()
    ]
    text = "\n".join([f"{len(plan.runs)} runs, {len(lines)} of them left to do", *lines])
    return SweepResult(text, content={"runs": len(plan.runs), "left": lines})


def _hand_to_slurm(
    plan: Plan, left: Sequence[SweepRun], launch: Launch, dry_run: bool
) -> SweepResult:
    script = write_script(
        plan,
        left,
        jobs=launch.jobs,
        gpus=launch.gpus_per_run,
        cpus=launch.cpus_per_run,
        options=launch.slurm,
    )
    handed = {"script": str(script), "runs": len(left)}
    if dry_run:
        return SweepResult(f"written: {script}, for {len(left)} runs", content=handed)
    job = submit(script)
    return SweepResult(
        f"submitted: job {job}, {SCRIPT_FILE} in {plan.folder}, for {len(left)} runs\n"
        "next: when it has ended, the same command prints the table",
        content={**handed, "job": job},
    )


def _tabulate(plans: Sequence[Plan], failures: Sequence[Failure]) -> SweepResult:
    """Write the table, the plot and the report of the finished runs, and return them with the missing runs."""
    plan = plans[0]
    judgements, missing = _judgements(plans)
    parts = []
    rows: list[dict[str, Any]] = []
    files: dict[str, str] = {}
    unsaved = ""
    if judgements:
        results = SweepTable(judgements)
        table = results.table()
        rows = results.records()
        parts.append(aligned([table.heading, *table.rows]) + "\n\n" + "\n".join(table.notes))
        title = f"Sweep of {' and '.join(dict.fromkeys(one.method for one in plans))}"
        try:
            write_atomically(plan.folder / "table.csv", results.csv())
            write_atomically(plan.folder / "table.md", markdown([table], title))
            files, why_not = _pictures(plan, results)
        except OSError as error:  # the table and the failures are not lost, as they are printed
            unsaved = str(error)
        else:
            named = (f"{name}: {path}" for name, path in files.items())
            parts.append("\n".join([*named, *why_not]))
    if missing:
        parts.append("not in the table: " + ", ".join(missing))
    texts = [failure.text() for failure in failures]
    if failures:
        parts += ["failed; the same command tries them again:", *texts]
    content = {"rows": rows, "files": files, "missing": missing, "failures": texts}
    return SweepResult("\n\n".join(parts), tuple(failures), unsaved, content)


def _pictures(plan: Plan, results: SweepTable) -> tuple[dict[str, str], list[str]]:
    """Write the plot and the report.

    Returns:
        The paths of the table, the plot and the report, and why one of them is missing.
    """
    files = {"table": str(plan.folder / "table.csv")}
    try:
        picture = results.picture()
        if picture is not None:
            files["plot"] = str(write_atomically(plan.folder / "trade_off.png", picture))
        write_report(results.summary, plan.folder / "report")
        files["report"] = str(plan.folder / "report" / "report.html")
    except ImportError as error:
        return files, [f"There is no plot and no report: {error}"]
    return files, []


def _judgements(plans: Sequence[Plan]) -> tuple[list[Judgement], list[str]]:
    """The results of the runs that are finished, and the names of the other runs."""
    curves = distinct_curves([(plan.method, str(plan.folder)) for plan in plans])
    found, missing = [], []
    for plan, curve in zip(plans, curves, strict=True):
        for run in plan.runs:
            name = run.name if len(plans) == 1 else f"{curve} {run.name}"
            if run.is_finished(plan.evaluation):
                judged = judged_run(str(run.folder), name)
                results = tuple(_results_of_checkpoint(judged.results, run, plan))
                found.append(Judgement(curve, run, replace(judged, results=results)))
            else:
                missing.append(name)
    return found, missing


def _results_of_checkpoint(results: Sequence[Result], run: SweepRun, plan: Plan) -> list[Result]:
    """The results of the checkpoint that the sweep judges; earlier evaluations may have judged others."""
    name = plan.judged_checkpoint(run)
    return [result for result in results if result.subject.checkpoint == name]
