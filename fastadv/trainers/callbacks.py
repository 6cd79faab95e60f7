"""Callbacks: the user's functions that a run calls with its metrics while it trains."""

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
        run_dir: the run directory.
        identity: a text that no other run has; a resumed run keeps it.
        method: the method's name.
        recipe: all numbers of the recipe, as JSON types.
        model: the facts by which the model is built.
        data: the facts about the training images.
        step: number of steps done before; more than 0 if the run is resumed.
        total_steps: number of steps of the whole run.
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

    All functions are called only in the first process. The metrics are means over all processes. A callback does
    not change a run: the generators of random numbers are restored after each call, and the metrics are a copy.

    An exception in a callback ends the run, like any other exception. The run can be resumed from its last
    checkpoint. `on_end` of all callbacks is called in any case.
    """

    def on_start(self, run: RunStart) -> None:
        """Called once, before the first iteration, when the run directory is ready."""

    def on_step(self, metrics: Metrics) -> None:
        """Called with each record of steps in metrics.jsonl: every `log_every` steps, and at an epoch's end.

        Args:
            metrics: "step", "epoch", "lr", "loss", the method's own metrics and others, each a mean over the steps
                since the last record.
        """

    def on_epoch(self, metrics: Metrics) -> None:
        """Called with each record of an epoch in metrics.jsonl.

        Args:
            metrics: means over the epoch, and "clean_accuracy" and "robust_accuracy" if there was a validation.
        """

    def on_end(self, finished: bool) -> None:
        """Called once, at the end.

        Args:
            finished: False if the run was interrupted or has failed.
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
        """Call `on_start` of all callbacks."""
        for callback in self._callbacks:
            self._started.append(callback)
            with _random_state_kept():
                callback.on_start(run)

    def step(self, metrics: Metrics) -> None:
        """Call `on_step` of all callbacks."""
        for callback in self._callbacks:
            with _random_state_kept():
                callback.on_step(dict(metrics))

    def epoch(self, metrics: Metrics) -> None:
        """Call `on_epoch` of all callbacks."""
        for callback in self._callbacks:
            with _random_state_kept():
                callback.on_epoch(dict(metrics))

    @contextmanager
    def running(self) -> Iterator[None]:
        """Call `on_end` of the started callbacks when a with statement ends.

        If it ends by an exception, or an earlier callback has raised one, further exceptions become warnings.
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
                with _random_state_kept():
                    failure = _ending(callback.on_end, ended, failure)
            if ended and failure is not None:
                raise failure


def check_callbacks(callbacks: object) -> None:
    """Check the argument `callbacks` of `train`.

    Raises:
        TypeError: if it is not a list of callbacks.
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
def _random_state_kept() -> Iterator[None]:
    """Restore the generators of random numbers and torch's switch of gradients after a with statement."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=devices), torch.enable_grad():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
