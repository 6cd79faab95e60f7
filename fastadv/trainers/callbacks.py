"""Functions of the user's that are called while a run trains, with the metrics."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

Metrics: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True)
class RunStart:
    """The facts that a callback gets about a run that is about to train.

    Attributes:
        run_dir: where everything of the run is.
        identity: tells this run from all others; a run that is resumed keeps it.
        method: the method's name.
        recipe: all its numbers, as JSON types.
        model: how the model is built.
        data: which images.
        step: steps done before; more than 0 where the run is resumed.
        total_steps: steps of the whole run.
    """

    run_dir: Path
    identity: str
    method: str
    recipe: Mapping[str, Any]
    model: Mapping[str, Any]
    data: Mapping[str, Any]
    step: int
    total_steps: int


class Callback:
    """Base class of callbacks; override the functions that you need.

    All functions are called only in the first process. Its metrics are means over all processes. A callback does
    not change a run: random numbers that it draws are not missing elsewhere, and the metrics are its own copy.

    An exception ends the run, as one anywhere else: it can be resumed from its last checkpoint. `on_end` of all
    callbacks is called in any case.
    """

    def on_start(self, run: RunStart) -> None:
        """Called once, before the first iteration, when the run directory is ready."""

    def on_step(self, metrics: Metrics) -> None:
        """Called with each record of steps in metrics.jsonl: every `log_every` steps, and at an epoch's end.

        Args:
            metrics: "step", "epoch", "lr", "loss", the method's own and the rest, each a mean over the steps since
                the last record.
        """

    def on_epoch(self, metrics: Metrics) -> None:
        """Called with each record of an epoch in metrics.jsonl.

        Args:
            metrics: means over the epoch, and "clean_accuracy" and "robust_accuracy" where there was a look.
        """

    def on_end(self, finished: bool) -> None:
        """Called once, at the end.

        Args:
            finished: False where the run was interrupted or has failed.
        """


class Callbacks:
    """Several callbacks, called one after another.

    Args:
        callbacks: the callbacks.
    """

    def __init__(self, callbacks: Sequence[Callback] = ()) -> None:
        self._callbacks = tuple(callbacks)
        self._started: list[Callback] = []

    def start(self, run: RunStart) -> None:
        """Tell all that a run begins."""
        for callback in self._callbacks:
            self._started.append(callback)
            with _apart():
                callback.on_start(run)

    def step(self, metrics: Metrics) -> None:
        """Hand a record of steps on."""
        for callback in self._callbacks:
            with _apart():
                callback.on_step(dict(metrics))

    def epoch(self, metrics: Metrics) -> None:
        """Hand a record of an epoch on."""
        for callback in self._callbacks:
            with _apart():
                callback.on_epoch(dict(metrics))

    @contextmanager
    def running(self) -> Iterator[None]:
        """Tell the callbacks that have begun when a with statement ends.

        Where it ends by an exception, or a callback before has raised one, further exceptions become warnings.
        """
        failure: BaseException | None = None
        try:
            yield
        except BaseException as error:
            failure = error
            raise
        finally:
            ended = failure is None
            for callback in self._started:
                with _apart():
                    failure = _ending(callback.on_end, ended, failure)
            if ended and failure is not None:
                raise failure


def check_callbacks(callbacks: object) -> None:
    """Check the argument of `train`.

    Raises:
        TypeError: if it is no list of callbacks.
    """
    if not isinstance(callbacks, list | tuple):
        kind = type(callbacks).__name__
        raise TypeError(f"callbacks must be a list of Callback, got {kind}")
    for position, callback in enumerate(callbacks):
        if not isinstance(callback, Callback):
            hint = (
                f"; call it: {callback.__name__}()"
                if isinstance(callback, type) and issubclass(callback, Callback)
                else ""
            )
            raise TypeError(
                f"callbacks[{position}] must be a fastadv.trainers.Callback, got {callback!r}{hint}"
            )


def _ending(
    end: Callable[[bool], None], finished: bool, failure: BaseException | None
) -> BaseException | None:
    """Call a callback's end, and return the first failure so far."""
    try:
        end(finished)
    except Exception as error:
        if failure is None:
            return error
        warnings.warn(f"{type(error).__name__} at the end of a callback: {error}", stacklevel=2)
    return failure


@contextmanager
def _apart() -> Iterator[None]:
    """Give back the random numbers and the switches of torch as they were."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=devices), torch.enable_grad():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
