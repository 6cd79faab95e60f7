"""Measuring the seconds of each phase of a training iteration, on CUDA without a synchronisation."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeAlias

import torch

_Mark: TypeAlias = "float | torch.cuda.Event"


class PhaseTimer:
    """Adds up the time of named phases. The time of an inner phase does not count for the outer phase.

    On CUDA it is the time between two events on the current stream, read only in `take`.

    Args:
        device: the device of the work.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._segments: list[tuple[str, _Mark, _Mark]] = []
        self._running: list[str] = []
        self._since: _Mark = 0.0

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time the body of a with statement as part of the phase `name`."""
        self._close_segment()
        self._running.append(name)
        try:
            yield
        finally:
            self._close_segment()
            self._running.pop()

    def take(self) -> dict[str, float]:
        """Return the seconds of each phase since the last call; waits for the device."""
        seconds: defaultdict[str, float] = defaultdict(float)
        for name, start, end in self._segments:
            seconds[name] += _seconds_between(start, end)
        self._segments.clear()
        return dict(seconds)

    def _close_segment(self) -> None:
        """End the running segment, if there is one, and begin the next."""
        now = self._mark()
        if self._running:
            self._segments.append((self._running[-1], self._since, now))
        self._since = now

    def _mark(self) -> _Mark:
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _seconds_between(start: _Mark, end: _Mark) -> float:
    if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        end.synchronize()
        return start.elapsed_time(end) / 1000
    assert isinstance(start, float) and isinstance(end, float)
    return end - start
