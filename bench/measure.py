"""The common part of the benchmarks: the machine's description, fair timing, memory, and writing results.

Comparisons are made within one process and interleaved: round 1 runs every candidate once, then round 2, and so
on, so that a slow stretch of the machine falls on all of them. Medians are reported with the smallest and the
largest time. Every candidate has run before the first counted round, so that neither compilation nor the first
touch of fresh memory is counted.
"""

from __future__ import annotations

import ctypes
import gc
import json
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from fastadv.files import write_atomically
from fastadv.info import collect


@dataclass(frozen=True)
class Seconds:
    """Times of one candidate, one per round."""

    median: float
    smallest: float
    largest: float
    rounds: int

    @classmethod
    def of(cls, times: list[float]) -> Seconds:
        return cls(statistics.median(times), min(times), max(times), len(times))

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def machine(device: torch.device) -> dict[str, Any]:
    """Who measured: date, versions, processor or GPU, threads."""
    facts = collect()
    facts.pop("ops")
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device.type,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        **facts,
    }


def machine_line(facts: Mapping[str, Any]) -> str:
    """The machine in one line, for the head of a table."""
    where = facts["gpu"] or f"{facts['cpu']['name']}, {facts['cpu']['threads']} threads"
    torch_version = facts["packages"]["torch"]
    return f"{where}; torch {torch_version}, Python {facts['python']}, {facts['date']}"


def synchronize(device: torch.device) -> None:
    """Wait until the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_once(run: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Seconds of one call, the device's work included; of several in a row, for short ones, the mean."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        run()
    synchronize(device)
    return (time.perf_counter() - start) / calls


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Interrupt the main thread's work after so many seconds.

    Raises:
        TimeoutError: the time is over.
    """

    def stop(*_: object) -> None:
        raise TimeoutError(f"not ready after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where there is no message."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else repr(error)


def image_shape(text: str) -> tuple[int, int, int]:
    """Channels, height and width from a word such as 3x32x32."""
    channels, height, width = (int(part) for part in text.split("x"))
    return channels, height, width


def calls_for(run: Callable[[], object], device: torch.device, seconds: float) -> int:
    """The number of calls that together last about `seconds`; at least 1."""
    run()
    return max(1, round(seconds / time_once(run, device)))


def keep_freed_memory() -> bool:
    """Have the C library keep freed memory for the next allocation; False where it is not glibc.

    Otherwise large results are mapped afresh on every call, and the kernel's zeroing of pages, not the code
    measured, decides.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    trim_threshold, mmap_max = -1, -4
    return bool(mallopt(mmap_max, 0) and mallopt(trim_threshold, 2**31 - 1))


def interleaved_times(
    candidates: Mapping[str, Callable[[], object]],
    rounds: Mapping[str, int],
    device: torch.device,
    calls: Mapping[str, int],
) -> dict[str, list[float]]:
    """Seconds per call of each candidate and round, `calls` in a row; each must have run before.

    Every round starts with another candidate, so that no candidate always follows the same one. A candidate with
    fewer rounds than the others takes part at even distances.
    """
    names, most = list(candidates), max(rounds.values(), default=0)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(most):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            if (number + 1) * rounds[name] // most > number * rounds[name] // most:
                times[name].append(time_once(candidates[name], device, calls[name]))
    return times


def interleave(
    candidates: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    progress: Callable[[str], None] = lambda _: None,
    patience: float = float("inf"),
    seconds: float = float("inf"),
) -> dict[str, Seconds]:
    """Time candidates in turn, `rounds` times; each must have run before.

    One whose first time is over `patience` seconds is timed twice at the most. No second round begins after
    ``seconds``.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    began = time.perf_counter()
    for number in range(rounds):
        if number and time.perf_counter() - began > seconds:
            break
        for name, run in candidates.items():
            if number >= 2 and times[name][0] > patience:
                continue
            progress(f"round {number + 1} of {rounds}: {name}")
            times[name].append(time_once(run, device))
    return {name: Seconds.of(values) for name, values in times.items()}


def copy_bandwidth(device: torch.device, megabytes: int = 256, rounds: int = 7) -> float:
    """Bytes per second of a copy, read and written counted: the ceiling of memory-bound code."""
    source = torch.zeros(megabytes << 20, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    times = [time_once(lambda: target.copy_(source), device) for _ in range(rounds)]
    return 2 * source.numel() / statistics.median(times)


class PeakMemory:
    """Bytes that a piece of work needed at its peak, above the bytes in use when it began.

    On CUDA these are torch's allocations. On Linux CPUs it is the process's resident memory: its high-water
    mark is reset on entry, after memory that was freed has been given back. None elsewhere.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.bytes: int | None = None

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
            return self
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            self._before = -1
            return self
        self._before = _status_bytes("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        if self._device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self._device) - self._before
        elif self._before >= 0:
            self.bytes = max(0, _status_bytes("VmHWM") - self._before)


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return 0


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write results, whole or not at all."""
    write_atomically(path, json.dumps(content, indent=2) + "\n")


def text_table(header: list[str], rows: list[list[str]]) -> str:
    """Columns aligned for a terminal; the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: list[str]) -> str:
        first = f"{cells[0]:<{widths[0]}}"
        others = (f"{cell:>{width}}" for cell, width in zip(cells[1:], widths[1:], strict=True))
        return "  ".join([first, *others]).rstrip()

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)])
