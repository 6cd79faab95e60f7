"""The plan of a sweep: its runs, their names and directories, and the file that describes it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from fastadv.evaluation.results import EVAL_FILE, load_results
from fastadv.files import write_atomically
from fastadv.sweeps.grid import Axis, Grid, canonical
from fastadv.trainers import Settings
from fastadv.trainers.checkpoint import find_checkpoint
from fastadv.trainers.run_directory import RunDirectory

PLAN_FILE = "sweep.json"
LOGS = "logs"
_FORMAT = 1
_RUNS = "runs"
_MAX_NAME_LENGTH = 200  # file systems take 255 bytes
_STATE_FILE = "sweep_run.json"  # in a run's directory
# Options that change how a run is done and not its numbers; so they may differ when a sweep goes on.
_MAY_DIFFER = frozenset({"device", "root", "quiet", *(one.name for one in fields(Settings))})


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep.

    Attributes:
        name: a name that no other run of the sweep has, also the name of its directory.
        folder: its directory.
        log: the file with everything that its processes print.
        settings: the values of the grid's options.
        seed: the seed of its training.
    """

    name: str
    folder: Path
    log: Path
    settings: Mapping[str, str]
    seed: int

    def is_trained(self) -> bool:
        """Whether the training has ended without an error."""
        return self._state().get("trained") is True

    def is_finished(self, evaluation: Sequence[str]) -> bool:
        """Whether the run is trained and has been judged.

        Args:
            evaluation: the options of `fastadv eval`.
        """
        judged = self._state().get("judged", [])
        return self.is_trained() and _key(evaluation) in judged and self._has_results()

    def mark_trained(self) -> None:
        """Record that the training has ended."""
        self._write({**self._state(), "trained": True})

    def mark_judged(self, evaluation: Sequence[str]) -> None:
        """Record that an evaluation has ended."""
        state = self._state()
        self._write({**state, "judged": sorted({*state.get("judged", []), _key(evaluation)})})

    def _has_results(self) -> bool:
        file = self.folder / EVAL_FILE
        return file.is_file() and bool(load_results(file))

    def _state(self) -> dict[str, Any]:
        """The record of the run that is in the directory now; empty where it is a record of another run."""
        directory = RunDirectory(self.folder)
        if not directory.exists:
            return {}
        try:
            state = json.loads((self.folder / _STATE_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        same = isinstance(state, dict) and state.get("run") == directory.identity()
        return state if same and isinstance(state.get("judged", []), list) else {}

    def _write(self, state: dict[str, Any]) -> None:
        content = {**state, "run": RunDirectory(self.folder).identity()}
        write_atomically(self.folder / _STATE_FILE, json.dumps(content, indent=2) + "\n")


@dataclass(frozen=True)
class Plan:
    """A sweep.

    Attributes:
        folder: its directory.
        method: name of the method that is trained.
        training: options of `fastadv train` that all runs share, as words.
        evaluation: options of `fastadv eval`, as words.
        grid: the options that differ, and at least one seed.
        config: for a plan that was read from its file, the text of the `--config` file when the plan was saved.
    """

    folder: Path
    method: str
    training: tuple[str, ...]
    evaluation: tuple[str, ...]
    grid: Grid
    config: str | None = field(default=None, compare=False)

    @property
    def runs(self) -> list[SweepRun]:
        """All runs; runs that differ only in their seed stand together."""
        return [
            self._run(settings, seed)
            for settings in self.grid.settings()
            for seed in self.grid.seeds
        ]

    def run_named(self, name: str) -> SweepRun:
        """Return one of the runs.

        Raises:
            ValueError: when there is no run of this name.
        """
        for run in self.runs:
            if run.name == name:
                return run
        raise ValueError(f"run must be one of the sweep in {self.folder}, got {name!r}")

    def unfinished(self) -> list[SweepRun]:
        """Return the runs that are not trained and judged yet."""
        return [run for run in self.runs if not run.is_finished(self.evaluation)]

    def training_words(self, run: SweepRun) -> list[str]:
        """Return the options of `fastadv train` for a run, without its directory.

        `{seed}`, or `{NAME}` of an option of the grid, stands for the run's value in the options that all share.
        """
        words = list(self.training)
        for name, value in {**run.settings, "seed": str(run.seed)}.items():
            words = [word.replace(f"{{{name}}}", value) for word in words]
        return [
            *words,
            *(f"--{name}={value}" for name, value in run.settings.items()),
            f"--seed={run.seed}",
        ]

    def judged_checkpoint(self, run: SweepRun) -> str:
        """The name of the checkpoint of a run that `fastadv eval` judges with the plan's options."""
        # The parser imports the commands, which import the sweeps.
        from fastadv.cli.evaluate import evaluation_options

        which = evaluation_options(["RUN", *self.evaluation])["checkpoint"]
        return find_checkpoint(run.folder, which).name

    def check(self) -> None:
        """Check that the directory holds no other sweep than this one, or one with fewer points.

        Raises:
            ValueError: naming the differences.
        """
        if not (self.folder / PLAN_FILE).is_file():
            return
        there = Plan.load(self.folder)
        if self.method != there.method:
            raise self._other("method", self.method, there.method)
        mine, old = (_options(plan.training) for plan in (self, there))
        if there.config is not None:  # its file may have changed since
            old["config"] = there.config
        for name in sorted({*mine, *old} - _MAY_DIFFER):
            if mine.get(name) != old.get(name):
                if name == "config" and name in mine and name in old:
                    raise self._other(name, "a file with other options", "the file as it was")
                raise self._other(name, mine.get(name, "nothing"), old.get(name, "nothing"))
        names = [[axis.name for axis in plan.grid.axes] for plan in (self, there)]
        if sorted(names[0]) != sorted(names[1]):
            raise self._other("grid", *(", ".join(part) or "no option" for part in names))
        lost = {run.name for run in there.runs} - {run.name for run in self.runs}
        if lost:
            raise ValueError(
                f"grid must keep the points that the sweep in {self.folder} has, and may add some; it leaves out "
                f"{sorted(lost)[0]}{' and others' if len(lost) > 1 else ''}. Choose another directory by --out"
            )

    def save(self) -> None:
        """Write the file that describes the sweep, after `check`."""
        self.check()
        content = {
            "format": _FORMAT,
            "method": self.method,
            "training": list(self.training),
            "evaluation": list(self.evaluation),
            "grid": {axis.name: list(axis.values) for axis in self.grid.axes},
            "seeds": list(self.grid.seeds),
            "config": _options(self.training).get("config"),
        }
        write_atomically(self.folder / PLAN_FILE, json.dumps(content, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Plan:
        """Read the sweep that is in a directory.

        Raises:
            FileNotFoundError: when there is no plan.
            ValueError: when its file is damaged.
        """
        file = folder / PLAN_FILE
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file; there is no sweep in {folder}")
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            if content["format"] != _FORMAT:
                raise ValueError(f"its format must be {_FORMAT}, got {content['format']!r}")
            axes = tuple(
                Axis(name, tuple(map(str, values))) for name, values in content["grid"].items()
            )
            return cls(
                folder,
                str(content["method"]),
                tuple(map(str, content["training"])),
                tuple(map(str, content["evaluation"])),
                Grid(axes, tuple(map(int, content["seeds"]))),
                content.get("config"),
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{file}: the description of the sweep is damaged: {error}") from error

    def _run(self, settings: Mapping[str, str], seed: int) -> SweepRun:
        # Sorted by option, so that a run keeps its name when the grid is written in another order.
        parts = [f"{name}={_for_file(value)}" for name, value in sorted(settings.items())]
        name = ",".join([*parts, f"seed={seed}"])
        if len(name) > _MAX_NAME_LENGTH:
            digest = hashlib.sha256(name.encode()).hexdigest()[:12]
            name = f"{name[: _MAX_NAME_LENGTH - 40]}_{digest},seed={seed}"
        return SweepRun(
            name, self.folder / _RUNS / name, self.folder / LOGS / f"{name}.log", settings, seed
        )

    def _other(self, what: str, mine: str, there: str) -> ValueError:
        return ValueError(
            f"{what} must be {there} as in the sweep that {self.folder} holds, got {mine}; choose another "
            "directory by --out"
        )


def _for_file(value: str) -> str:
    """A value as part of a file's name. A value that has to be changed gets a hash, to keep names distinct."""
    plain = re.fullmatch(r"(\d+)/(\d+)", value)
    if plain:
        return f"{plain[1]}_{plain[2]}"
    kept = re.sub(r"[^A-Za-z0-9.+-]", "-", value)[:40]
    return kept if kept == value else f"{kept}_{hashlib.sha256(value.encode()).hexdigest()[:6]}"


def _options(words: Sequence[str]) -> dict[str, str]:
    """The options of a command line with their values: numbers in one spelling, for `--config` the file's text."""
    found: dict[str, str] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            found[name] = canonical(value) if equals else ""
        else:
            found[name] = f"{found.get(name, '')} {canonical(word)}".strip()
    config = found.get("config")
    if config and Path(config).is_file():
        found["config"] = Path(config).read_text(encoding="utf-8")
    return {option: value or "true" for option, value in found.items()}


def _key(evaluation: Sequence[str]) -> str:
    """A hash of the options of an evaluation, by which evaluations are told apart."""
    options = sorted(_options(evaluation).items())
    return hashlib.sha256(json.dumps(options).encode()).hexdigest()[:16]
