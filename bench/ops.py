"""Benchmark of every op on every backend: time, bandwidth, memory, against eager and compiled torch.

    python bench/ops.py                          all ops on the CPU
    python bench/ops.py --quick                  one shape of each, nothing that compiles
    python bench/ops.py --rows pgd_step_/linf    the rows whose name contains this
    python bench/ops.py --op pgd_step --device cuda --backend triton
    python bench/ops.py --compare bench/results/ops_cpu.json
    python bench/ops.py --markdown bench/results/ops_cpu.json    the tables of an earlier run, for docs/ops.md

First the op tests run in a process of their own; an op whose tests fail is not measured, and the exit status
is 1.

The timed calls. For each row (`op_rows.py`) the candidates run in one process, in turn, in rounds that each begin
with another candidate, so that a slow stretch of the machine falls on all alike. A round's figure is the mean of
as many calls in a row as last 2 ms; medians over the rounds are reported, with half the distance of the quartiles
as the spread. On CUDA the device is synchronised before and after.

* Directions "forward" and "backward" time raw ops: the backends, the op's reference in eager mode and under
  torch.compile, the code that is commonly written instead where the case names it ("usual"), and a copy of as many
  bytes as the op must move at least (each input read once, each output written once).
* Direction "both" times a public function and the backward pass to all its differentiable arguments from a given
  gradient (a scalar's is 1, as in `loss.backward()`), against the commonly written code, eager ("usual") and with
  both passes compiled ("usual compiled").

Before it is timed, commonly written code must agree with the op, or the row is refused.

How long it takes. A row's rounds last 1 s at the most, shared among the candidates, of which each gets 3 rounds at
the least (2 if a call lasts over a second); every candidate that is compiled adds about 4 s. The estimate for the
rows chosen is printed at the start: on 2 quiet cores 4 minutes for 43 rows, 10 for 150, and 1 to 2 for the tests.
With --seconds the tests run without --thorough, and get half of the time. No row begins when the time is over, and
each row that is left out is named.

Page faults. Arguments are allocated once; results are fresh, as in use, but the C library is told to keep freed
memory and every candidate has run before, so that no page is touched for the first time (on CUDA torch's
allocator does the same). Data that fit a cache therefore stay there: "of copy" is the time of the interleaved copy
of equal size, from equal caches, over the op's; the copy bandwidth at the table's head is measured with 256 MB.

pytest-benchmark runs one candidate to the end before the next, which interleaving is to avoid. So the
first test of a row times all its candidates, and each test then plays its own times back to pytest-benchmark's
fixture on a clock of its own. Selection, statistics and the JSON are pytest-benchmark's, and `pytest-benchmark
compare` reads the files. `pytest bench/ops.py -o addopts= --benchmark-only` works too, without the tests before
and the report after.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import op_plot
import op_report
import pytest
import torch
from measure import copy_bandwidth, keep_freed_memory, machine, write_json
from op_rows import CASES, OPTIONS, Options, Row, rows
from op_tests import failures
from op_times import estimate, measured

RESULTS = Path(__file__).parent / "results"


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


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    options = metafunc.config.stash.get(OPTIONS, Options())
    metafunc.parametrize(
        ("row", "name", "options"),
        [
            pytest.param(row, name, options, id=f"{row.name}-{name}")
            for row in rows(options)
            for name in row.candidates(options)
        ],
    )


@pytest.mark.benchmark(timer=CLOCK)
def test_op(benchmark: Any, row: Row, name: str, options: Options) -> None:
    found = measured(row, options)
    if found.refused:
        pytest.fail(found.refused, pytrace=False)
    if name in found.missing:
        pytest.skip(found.missing[name])
    facts = dict(found.facts[name])
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
    """Passes the options to the tests and this machine's facts to the JSON, and prints a line per row."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._told: set[str] = set()
        self._rows = len(list(rows(options)))
        self.refused: dict[str, str] = {}
        self.missing: dict[str, dict[str, str]] = {}

    def pytest_configure(self, config: pytest.Config) -> None:
        config.stash[OPTIONS] = self._options

    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str] | None:
        """No dots between the lines."""
        if report.passed:
            return ("passed" if report.when == "call" else "", "", "")
        return None

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_call(self, item: pytest.Function) -> Any:
        yield
        row = item.callspec.params["row"]
        if row.name not in self._told:
            self._tell(row)

    def _tell(self, row: Row) -> None:
        found = measured(row, self._options)
        self._told.add(row.name)
        if found.refused:
            self.refused[row.name] = found.refused
        if found.missing:
            self.missing[row.name] = found.missing
        line = op_report.progress(row.name, found.facts, row.case.registered.owner(row.spec.device))
        why = [found.refused, *(f"no {name}: {text}" for name, text in found.missing.items())]
        text = "; ".join([line, *(part.splitlines()[0] for part in why if part)])
        print(f"[{len(self._told)}/{self._rows}] {text} ({found.seconds:.1f} s)", flush=True)

    def pytest_benchmark_update_machine_info(
        self, config: pytest.Config, machine_info: dict[str, Any]
    ) -> None:
        device = torch.device(self._options.device)
        machine_info.pop("node", None)
        machine_info["fastadv"] = machine(device)
        machine_info["copy_bytes_per_second"] = copy_bandwidth(device)


def run_benchmarks(options: Options) -> dict[str, Any]:
    """Run this file under pytest; pytest-benchmark's JSON, with the rows that could not be measured and why."""
    plugin = Plugin(options)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "benchmark.json"
        arguments = [__file__, "-o", "addopts=", "-q", "-s", "--tb=short", "--no-header"]
        arguments += ["-p", "no:cacheprovider", "-W", "ignore"]
        arguments += ["--benchmark-only", "--benchmark-quiet", f"--benchmark-json={report}"]
        status = pytest.main(arguments, plugins=[plugin])
        if not report.is_file() or not report.stat().st_size:
            raise SystemExit(f"nothing was measured; pytest ended with {status!r}")
        results = json.loads(report.read_text())
    for entry in results["benchmarks"]:
        # Nothing reads every round's time and the parameters in full, which are half of the file.
        entry["stats"].pop("data", None)
        entry["params"] = {"row": entry["group"], "name": entry["extra_info"].get("candidate")}
    return {**results, "refused": plugin.refused, "missing": plugin.missing}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    names = sorted({case.op for case in CASES.values() if case.bench_shapes})
    parser.add_argument("--op", action="append", choices=names, help="one op; may be repeated")
    parser.add_argument("--rows", default="", metavar="TEXT", help="rows whose name contains it")
    parser.add_argument("--backend", action="append", choices=("native", "triton", "reference"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="one shape of each op")
    told = (
        "the report (--junitxml) of a run of tests/ops on the device that has ended: run no tests"
    )
    parser.add_argument("--tests", type=Path, metavar="FILE", help=told)
    parser.add_argument("--seconds", type=float, help="for all of it, about; no limit by default")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--compare", type=Path, help="an earlier JSON of this benchmark")
    parser.add_argument("--markdown", type=Path, help="print this JSON's tables; measure nothing")
    args = parser.parse_args()
    args.part = bool(args.rows or args.op or args.backend)
    args.op = tuple(args.op or names)
    return args


def main() -> int:
    args = parse_arguments()
    if args.markdown:
        print(op_report.markdown(json.loads(args.markdown.read_text())))
        return 0
    earlier = json.loads(args.compare.read_text()) if args.compare else None
    until = float("inf") if args.seconds is None else time.perf_counter() + args.seconds
    options = Options(args.device, args.quick, args.op, tuple(args.backend or ()), args.rows, until)
    options, refused = _without_failing(options, args.seconds, args.tests)
    chosen = list(rows(options))
    if not chosen:
        return 1
    print(
        f"{len(chosen)} rows, about {estimate(chosen, options) / 60:.1f} minutes on 2 cores",
        flush=True,
    )
    kept = keep_freed_memory()
    results = run_benchmarks(options)
    results["refused"] |= refused
    results["freed_memory_kept"] = kept
    stem = f"ops_{args.device}{'_quick' if args.quick else ''}{'_part' if args.part else ''}"
    text = op_report.report(results)
    if earlier is not None:
        text += "\n\n" + op_report.comparison(earlier, results)
    print(f"\n{text}")
    write_json(args.out / f"{stem}.json", results)
    op_plot.roofline(results, args.out / f"{stem}.png")
    print(f"\nwritten: {args.out / stem}.json and .png")
    return 1 if results["refused"] else 0


def _without_failing(
    options: Options, seconds: float | None = None, ended: Path | None = None
) -> tuple[Options, dict[str, str]]:
    """The options less the ops whose tests fail, and why they do; the tests get half of ``seconds``."""
    ops = tuple(dict.fromkeys(row.case.op for row in rows(options)))
    if not ops:
        raise SystemExit(f"--rows: no row's name contains {options.part!r}")
    print(f"testing {len(ops)} ops", flush=True)
    refused = failures(ops, options.device, None if seconds is None else seconds / 2, ended)
    for op, why in refused.items():
        print(f"refused: {op}: {why}", flush=True)
    passed = tuple(op for op in ops if op not in refused)
    return replace(options, ops=passed), refused


if __name__ == "__main__":
    sys.exit(main())
