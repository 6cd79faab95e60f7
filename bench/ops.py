"""Benchmark of every op on every backend: time, bandwidth, memory, against eager and compiled torch.

    python bench/ops.py                          all ops on the CPU; about a quarter of an hour on 2 cores
    python bench/ops.py --quick                  one shape of each, nothing that compiles
    python bench/ops.py --op pgd_step --device cuda --backend triton
    python bench/ops.py --compare bench/results/ops_cpu.json

First the op tests run in a process of their own; an op whose tests fail is not measured, and the exit status
is 1.

What is timed. For each sample of an op (`tests/op_cases`; backward ops are ops too): the backends, the reference
in eager mode and under torch.compile, and a copy of as many bytes as the op must move at least (each input read
once, each output written once). They run in one process, in turn, in rounds that each begin with another
candidate, so that a slow stretch of the machine falls on all alike. A round's figure is the mean of as many calls
in a row as last 2 ms; medians over the rounds are reported, with half the distance of the quartiles as the
spread. On CUDA the device is synchronised before and after.

Page faults. Arguments are allocated once; results are fresh, as in use, but the C library is told to keep freed
memory and every candidate has run before, so that no page is touched for the first time (on CUDA torch's
allocator does the same). What fits a cache therefore stays there: "of copy" is the time of the interleaved copy of
equal size, from equal caches, over the op's; the copy bandwidth at the table's head is that of 256 MB.

pytest-benchmark runs one candidate to the end before the next, which is what interleaving is to avoid. So the
first test of a sample times all its candidates, and each test then plays its own times back to pytest-benchmark's
fixture on a clock of its own. Selection, statistics and the JSON are pytest-benchmark's, and `pytest-benchmark
compare` reads the files. `pytest bench/ops.py -o addopts= --benchmark-only` works too, without the tests before
and the report after.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import op_report
import pytest
import torch
from measure import (
    PeakMemory,
    calls_for,
    copy_bandwidth,
    interleaved_times,
    keep_freed_memory,
    machine,
    write_json,
)
from op_rows import CASES, OPTIONS, Options, Row, Workload, rows
from op_tests import failures

RESULTS = Path(__file__).parent / "results"
SAMPLE_SECONDS = 0.002  # of one candidate in one round
ROW_SECONDS = 3.0  # of one row; slow candidates get fewer rounds
ROUNDS = (5, 31)  # fewest and most
QUICK_ROUNDS = (3, 7)


class Playback:
    """A clock that stands still but for recorded times."""

    __name__ = "playback"

    def __init__(self) -> None:
        self._now = 0.0

    def __call__(self) -> float:
        return self._now

    def play(self, benchmark: Any, times: list[float]) -> None:
        """Hand the times to a benchmark fixture that reads this clock, one round each."""
        remaining = iter(times)

        def run() -> None:
            self._now = next(remaining)

        def rewind() -> None:
            self._now = 0.0

        benchmark.pedantic(run, setup=rewind, rounds=len(times))


CLOCK = Playback()


@cache
def measured(row: Row, candidates: tuple[str, ...], quick: bool) -> dict[str, dict[str, Any]]:
    """Times and facts of each candidate of a row; of one that cannot run, the reason."""
    device = torch.device(row.spec.device)
    work = Workload(row)
    ready, facts = {}, {}
    for name in candidates:
        try:
            call = work.candidate(name)
            call()
            with PeakMemory(device) as peak:
                call()
        except Exception as error:
            facts[name] = {"missing": f"{type(error).__name__}: {error}"}
            continue
        ready[name] = call
        facts[name] = {"bytes": work.bytes, "operations": work.operations, "peak": peak.bytes}
    calls = {name: calls_for(call, device, SAMPLE_SECONDS) for name, call in ready.items()}
    rounds = _rounds(ready, calls, device, QUICK_ROUNDS if quick else ROUNDS)
    for name, times in interleaved_times(ready, rounds, device, calls).items():
        facts[name] |= {"times": times, "calls": calls[name]}
    return facts


def _rounds(
    ready: dict[str, Any], calls: dict[str, int], device: torch.device, limits: tuple[int, int]
) -> int:
    """As many rounds as fit the time, within the limits."""
    once = interleaved_times(ready, 1, device, calls)
    seconds = sum(times[0] * calls[name] for name, times in once.items())
    return min(max(limits[0], int(ROW_SECONDS / seconds)), limits[1])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    options = metafunc.config.stash.get(OPTIONS, Options())
    metafunc.parametrize(
        ("row", "name", "options"),
        [
            pytest.param(row, name, options, id=f"{row.name}-{name}")
            for row in rows(options)
            for name in options.candidates_of(row.case.registered)
        ],
    )


@pytest.mark.benchmark(timer=CLOCK)
def test_op(benchmark: Any, row: Row, name: str, options: Options) -> None:
    names = tuple(options.candidates_of(row.case.registered))
    facts = dict(measured(row, names, options.quick)[name])
    if "missing" in facts:
        pytest.skip(facts["missing"])
    benchmark.group = row.name
    CLOCK.play(benchmark, facts.pop("times"))
    benchmark.extra_info |= {
        **facts,
        "candidate": name,
        "op": row.case.op,
        "variant": row.case.variant,
        "direction": row.direction,
        "shape": list(row.spec.shape),
        "dtype": str(row.spec.dtype).removeprefix("torch."),
        "layout": row.spec.layout,
        "owner": row.case.registered.owner(row.spec.device),
    }


class Plugin:
    """Passes the options to the tests and this machine's facts to the JSON."""

    def __init__(self, options: Options) -> None:
        self._options = options

    def pytest_configure(self, config: pytest.Config) -> None:
        config.stash[OPTIONS] = self._options

    def pytest_benchmark_update_machine_info(
        self, config: pytest.Config, machine_info: dict[str, Any]
    ) -> None:
        device = torch.device(self._options.device)
        machine_info.pop("node", None)
        machine_info["fastadv"] = machine(device)
        machine_info["copy_bytes_per_second"] = copy_bandwidth(device)


def run_benchmarks(options: Options) -> dict[str, Any]:
    """Run this file under pytest; pytest-benchmark's JSON."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "benchmark.json"
        arguments = [__file__, "-o", "addopts=", "-q", "-rs", "-p", "no:cacheprovider"]
        arguments += ["--benchmark-only", "--benchmark-quiet", f"--benchmark-json={report}"]
        status = pytest.main(arguments, plugins=[Plugin(options)])
        if not report.is_file() or not report.stat().st_size:
            raise SystemExit(f"nothing was measured; pytest ended with {status!r}")
        return json.loads(report.read_text())


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    names = sorted({case.op for case in CASES.values() if case.bench_shapes})
    parser.add_argument("--op", action="append", choices=names, help="one op; may be repeated")
    parser.add_argument("--backend", action="append", choices=("native", "triton", "reference"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="one shape of each op")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--compare", type=Path, help="an earlier JSON of this benchmark")
    args = parser.parse_args()
    args.op = tuple(args.op or names)
    return args


def main() -> int:
    args = parse_arguments()
    earlier = json.loads(args.compare.read_text()) if args.compare else None
    print(f"testing {len(args.op)} ops", flush=True)
    refused = failures(args.op)
    for op, why in refused.items():
        print(f"refused: {op}: {why}", flush=True)
    passed = tuple(op for op in args.op if op not in refused)
    if not passed:
        return 1
    options = Options(args.device, args.quick, passed, tuple(args.backend or ()))
    kept = keep_freed_memory()
    results = run_benchmarks(options)
    results["refused"], results["freed_memory_kept"] = refused, kept
    stem = f"ops_{args.device}{'_quick' if args.quick else ''}"
    text = op_report.table(results)
    if earlier is not None:
        text += "\n\n" + op_report.comparison(earlier, results)
    print(f"\n{text}")
    write_json(args.out / f"{stem}.json", results)
    op_report.roofline(results, args.out / f"{stem}.png")
    print(f"\nwritten: {args.out / stem}.json and .png")
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
