"""The times of a row's candidates, taken in turn, and how long a whole run will last."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from measure import PeakMemory, calls_for, interleaved_times, time_once
from op_rows import COMPILED, COPY, USUAL_COMPILED, Options, Row
from op_work import Disagreement, Run, workload

SAMPLE_SECONDS = 0.002  # of one candidate in one round
ROW_SECONDS = 1.0  # of all rounds of a row, but for candidates so slow that they need more
ROUNDS = (3, 31)  # fewest and most
QUICK_ROUNDS = (3, 7)
FEWEST_OF_SLOW = 2  # rounds of a candidate
_SLOW = 1.0  # seconds of a call of such a one
_LONG = 0.05  # seconds of a call that is not repeated to find out how long it takes

# About, on 2 cores, nothing cached: the seconds of a row beside its rounds.
_ROW_START, _ELEMENT, _COMPILATION = 0.3, 3e-7, 4.0

Facts = dict[str, Any]


@dataclass
class Measured:
    """The outcome of a row.

    Attributes:
        facts: times and facts of each candidate that ran.
        missing: why a candidate did not run.
        refused: why no candidate was timed; empty where they were.
        seconds: its duration.
    """

    facts: dict[str, Facts] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    refused: str = ""
    seconds: float = 0.0


@cache
def measured(row: Row, options: Options) -> Measured:
    """Time the candidates of a row in turn, once; none of them after the end of the time that is given."""
    start = time.perf_counter()
    found = Measured()
    if start > options.until:
        found.missing = dict.fromkeys(row.candidates(options), "left out, as the time is over")
        return found
    try:
        ready = _ready(row, options, found)
    except Exception as error:  # one broken row must not end the run
        found.refused = str(error) if isinstance(error, Disagreement) else _text(error)
    else:
        _time(ready, found, options)
    found.seconds = time.perf_counter() - start
    return found


def _ready(row: Row, options: Options, found: Measured) -> dict[str, Run]:
    """The candidates that run; each has run twice."""
    device, work, ready = torch.device(options.device), workload(row), {}
    for name in row.candidates(options):
        try:
            call = work.candidate(name)
            call()
            with PeakMemory(device) as peak:
                seconds = time_once(call, device)
        except Exception as error:  # whatever a compiler or a backend may raise
            found.missing[name] = _text(error)
            continue
        ready[name] = call
        once = seconds if seconds > _LONG else None
        calls = 1 if once else calls_for(call, device, SAMPLE_SECONDS)
        found.facts[name] = {
            "bytes": work.bytes,
            "operations": work.operations,
            "peak": None if name == COPY else peak.bytes,
            "calls": calls,
            "seconds": once or time_once(call, device, calls),
        }
    return ready


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _time(ready: dict[str, Run], found: Measured, options: Options) -> None:
    """Add the times to the facts: as many rounds of each candidate as fit its share of the row's time."""
    fewest, most = QUICK_ROUNDS if options.quick else ROUNDS
    calls = {name: found.facts[name]["calls"] for name in ready}
    rounds = {}
    for name in ready:
        round_seconds = calls[name] * found.facts[name].pop("seconds")
        fitting = ROW_SECONDS / len(ready) / max(round_seconds, 1e-9)
        least = FEWEST_OF_SLOW if round_seconds > _SLOW else fewest
        rounds[name] = min(max(least, int(fitting)), most)
    times = interleaved_times(ready, rounds, torch.device(options.device), calls)
    for name, values in times.items():
        found.facts[name]["times"] = values


def estimate(rows: Iterable[Row], options: Options) -> float:
    """Seconds that measuring these rows takes on 2 CPU cores, about."""
    return sum(_estimate(row, options) for row in rows)


def _estimate(row: Row, options: Options) -> float:
    compilations = sum(name in (COMPILED, USUAL_COMPILED) for name in row.candidates(options))
    elements = row.case.bench_elements(row.spec.shape)
    return ROW_SECONDS + _ROW_START + _ELEMENT * elements + _COMPILATION * compilations
