"""Printing the progress of a run: a bar on a terminal, else one line per interval, or nothing."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fastadv.bars import Bar, say, say_above

_FIRST_ESTIMATE_STEPS = 20
_FIRST_ESTIMATE_SECONDS = 10.0
_SECONDS_BETWEEN_LINES = 30.0  # where standard error is no terminal


class Console:
    """Progress of a run on standard error.

    Args:
        enabled: False to print nothing.
        total_steps: number of steps of the whole run.
        done_steps: number of steps done before this process.
        batch_size: images per step.
    """

    def __init__(
        self,
        enabled: bool,
        total_steps: int,
        done_steps: int,
        batch_size: int,
    ) -> None:
        self.enabled = enabled
        self._left = total_steps - done_steps
        self._batch_size = batch_size
        self._on_terminal = enabled and sys.stderr.isatty()
        self._bar: Any = None
        self._done = 0
        self._seconds = 0.0  # of training steps alone
        self._aside = 0.0  # of everything between them
        self._since = self._said = time.perf_counter()
        self._estimated = False
        self._taken = (0, 0.0)
        if self._on_terminal:
            self._bar = Bar([], total=total_steps, initial=done_steps, smoothing=0.1)

    def say(self, text: str) -> None:
        """Print a line that stays."""
        if self._bar is not None:
            say_above(text)
        elif self.enabled:
            say(text)

    def step_done(self) -> None:
        """Count an iteration."""
        now = time.perf_counter()
        self._seconds += now - self._since
        self._since = now
        self._done += 1
        if self._bar is not None:
            self._bar.update()
        if not self._estimated and (
            self._done >= _FIRST_ESTIMATE_STEPS or self._seconds > _FIRST_ESTIMATE_SECONDS
        ):
            self._estimated = True
            self.say(
                f"expected: about {duration(self.seconds_left())} for the remaining "
                f"{count_of(self._left - self._done, 'iteration')}, at {self.images_per_second():,.0f} images/s"
            )

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Leave the time of a with statement out of images per second."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._since = time.perf_counter()
            self._aside += self._since - began

    def show(self, epoch: int, epochs: int, metrics: Mapping[str, float]) -> None:
        """Show the position of the run, if the interval since the last line is over.

        Args:
            epoch: current epoch, counted from 1.
            epochs: epochs of the run.
            metrics: means over the last steps.
        """
        rate = self.images_per_second()
        if self._bar is not None:
            figures = sorted(_figures(metrics), key=lambda one: one.startswith("lr "))
            self._bar.figures = [f"epoch {epoch}/{epochs}", *figures]  # the rate is left out first
            self._bar.rest = [f"{rate:,.0f} images/s"]
            self._bar.refresh()
        elif self.enabled and time.perf_counter() - self._said >= _SECONDS_BETWEEN_LINES:
            self._said = time.perf_counter()
            left = duration(self.seconds_left())
            self.say(
                f"epoch {epoch}/{epochs}: {', '.join(_figures(metrics))}, {rate:,.0f} images/s, {left} left"
            )

    def images_per_second(self) -> float:
        """Return the mean rate of this process's iterations."""
        return self._done * self._batch_size / max(self._seconds, 1e-9)

    def take_rate(self) -> float:
        """Return the images per second since the last call."""
        steps, seconds = self._taken
        self._taken = (self._done, self._seconds)
        return (self._done - steps) * self._batch_size / max(self._seconds - seconds, 1e-9)

    def seconds_left(self) -> float:
        """Estimate the rest of the run from the time of the iterations so far, with all work between them."""
        spent = self._seconds + self._aside
        return (self._left - self._done) * spent / max(self._done, 1)

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()


def count_of(number: int, thing: str) -> str:
    """Return a number of things as text: "1 epoch", "1,000 iterations"."""
    return f"{number:,} {thing}{'s' * (number != 1)}"


def duration(seconds: float) -> str:
    """Return a time span as text: "42 s", "3.5 min", "2.1 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _figures(metrics: Mapping[str, float]) -> list[str]:
    return [f"{name} {value:.3f}" for name, value in metrics.items()]


def epoch_line(record: dict[str, Any], epochs: int) -> str:
    """Return the line that is printed after an epoch."""
    parts = [f"epoch {record['epoch']}/{epochs}", f"lr {record['lr']:.4g}"]
    if "loss" in record:
        parts.append(f"loss {record['loss']:.4f}")
    for name in ("replayed", "clean_accuracy", "robust_accuracy"):
        if name in record:
            parts.append(f"{name.replace('_', ' ')} {100 * record[name]:.1f} %")
    if record["bad_steps"]:
        parts.append(f"{record['bad_steps']} iterations without an update")
    return ", ".join(parts)
