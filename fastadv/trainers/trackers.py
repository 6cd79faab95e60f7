"""Callbacks that send a run's metrics to TensorBoard, Weights & Biases and MLflow."""

from __future__ import annotations

import abc
import importlib
import math
import os
import warnings
from typing import Any, ClassVar

from fastadv.files import write_atomically
from fastadv.ops.values import check_choice
from fastadv.trainers.callbacks import Callback, Metrics, RunStart

MLFLOW_FILE = "mlflow_run"  # holds the id of MLflow's run, with which a resumed run goes on


class Tracker(Callback, abc.ABC):
    """Base of the callbacks that send metrics to another program, which shows them.

    A tracker that cannot be imported or started is an error before the first step. A tracker that fails later does
    not end the run: the first failure is a warning, and `metrics.jsonl` has all records.

    Attributes:
        title: name of the program.
        module: name of the module to import.
        package: name of the package to install.
    """

    title: ClassVar[str]
    module: ClassVar[str]
    package: ClassVar[str]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.module!r})"

    def __init__(self) -> None:
        self._warned = False
        try:
            self.program: Any = importlib.import_module(self.module)
        except ImportError as error:
            raise ImportError(
                f"{self.title} is not installed: pip install '{self.package}' ({error})"
            ) from error

    @abc.abstractmethod
    def send(self, values: dict[str, float], step: int) -> None:
        """Send numbers, with the names "step/NAME" and "epoch/NAME"."""

    @abc.abstractmethod
    def close(self, finished: bool) -> None:
        """End the tracking that `on_start` began. It is called also if `on_start` has failed."""

    def on_step(self, metrics: Metrics) -> None:
        """Send a record of steps."""
        self._try_to_send("step", metrics)

    def on_epoch(self, metrics: Metrics) -> None:
        """Send a record of an epoch."""
        self._try_to_send("epoch", metrics)

    def on_end(self, finished: bool) -> None:
        """End the tracker's own run."""
        try:
            self.close(finished)
        except Exception as error:  # code of another package, which often uses a network
            self._warn(f"could not be ended ({type(error).__name__}: {error})")

    def _try_to_send(self, kind: str, metrics: Metrics) -> None:
        step = int(metrics["step"])
        values = {
            f"{kind}/{name}": float(value)
            for name, value in metrics.items()
            if name != "step" and isinstance(value, int | float)
        }
        try:
            self.send(values, step)
        except Exception as error:  # code of another package, which often uses a network
            if not self._warned:
                self._warned = True
                self._warn(
                    f"did not take the metrics of step {step} ({type(error).__name__}: {error}); the run goes on, "
                    "and metrics.jsonl has all of them"
                )

    def _warn(self, text: str) -> None:
        warnings.warn(f"{self.title} {text}", stacklevel=4)


class TensorBoardCallback(Tracker):
    """Writes events to the folder `tensorboard` of the run directory."""

    title = "TensorBoard"
    module = "torch.utils.tensorboard"
    package = "fastadv[tensorboard]"

    def __init__(self) -> None:
        super().__init__()
        self._writer: Any = None

    def on_start(self, run: RunStart) -> None:
        """Open the file; events of repeated iterations are hidden."""
        folder = str(run.run_dir / "tensorboard")
        self._writer = self.program.SummaryWriter(folder, purge_step=run.step + 1)

    def send(self, values: dict[str, float], step: int) -> None:
        """Write events."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self, finished: bool) -> None:
        """Write the events that are not on disk yet."""
        if self._writer is not None:
            self._writer.close()


class WandbCallback(Tracker):
    """Sends metrics to Weights & Biases, in a run with the identity and the folder's name of fastadv's run.

    A run that is resumed goes on there, too.

    Args:
        project: project of Weights & Biases; by default WANDB_PROJECT of the environment, else "fastadv".
        options: further arguments of `wandb.init`.
    """

    title = "Weights & Biases"
    module = "wandb"
    package = "fastadv[wandb]"

    def __init__(self, project: str | None = None, **options: Any) -> None:
        super().__init__()
        self._project = project or os.environ.get("WANDB_PROJECT") or "fastadv"
        self._options = options
        self._run: Any = None

    def on_start(self, run: RunStart) -> None:
        """Begin or resume the run of Weights & Biases."""
        arguments: dict[str, Any] = {
            "project": self._project,
            "name": run.run_dir.resolve().name,
            "id": run.identity,
            "resume": "allow",
            "dir": str(run.run_dir),
            "config": {"method": run.method, **run.recipe, "model": run.model, "data": run.data},
        }
        self._run = self.program.init(**{**arguments, **self._options})

    def send(self, values: dict[str, float], step: int) -> None:
        """Log numbers."""
        self._run.log(values, step=step)

    def close(self, finished: bool) -> None:
        """Finish the run of Weights & Biases, with exit code 1 if fastadv's run has not finished."""
        if self._run is not None:
            self._run.finish(exit_code=0 if finished else 1)


class MlflowCallback(Tracker):
    """Sends metrics to MLflow, in the active run if there is one, else in a run with the folder's name.

    A run that is resumed goes on there, too. The server and the experiment are MLflow's own settings, such as
    MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME of the environment.
    """

    title = "MLflow"
    module = "mlflow"
    package = "fastadv[mlflow]"

    def __init__(self) -> None:
        super().__init__()
        self._begun = False

    def on_start(self, run: RunStart) -> None:
        """Begin or resume the run of MLflow."""
        file = run.run_dir / MLFLOW_FILE
        if self.program.active_run() is None:
            known = file.read_text().strip() if run.step and file.is_file() else ""
            begun = (
                self.program.start_run(run_id=known)
                if known
                else self.program.start_run(run_name=run.run_dir.resolve().name)
            )
            self._begun = True
            write_atomically(file, f"{begun.info.run_id}\n")
            if known:
                return  # MLflow has the parameters already
        self.program.log_params(_flat({"method": run.method, **run.recipe, "model": run.model}))

    def send(self, values: dict[str, float], step: int) -> None:
        """Log the finite numbers; MLflow's databases take no other numbers."""
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        self.program.log_metrics(finite, step=step)

    def close(self, finished: bool) -> None:
        """End MLflow's run, if this callback began it."""
        if self._begun:
            self.program.end_run(status="FINISHED" if finished else "FAILED")


_TRACKERS: dict[str, type[Tracker]] = {
    "tensorboard": TensorBoardCallback,
    "wandb": WandbCallback,
    "mlflow": MlflowCallback,
}


def tracker_names(text: str | None) -> list[str]:
    """Return the names in "wandb,mlflow", each once.

    Raises:
        ValueError: if one is unknown.
    """
    names = [] if text is None else [name.strip().lower() for name in text.split(",")]
    for name in names:
        check_choice("log", name, list(_TRACKERS))
    return list(dict.fromkeys(names))


def make_trackers(names: list[str]) -> list[Callback]:
    """Make trackers by name.

    Raises:
        ImportError: if one is not installed.
    """
    return [_TRACKERS[name]() for name in names]


def _flat(values: Metrics, prefix: str = "") -> dict[str, Any]:
    """The entries of nested dicts in one dict, with names such as "model.name"."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
