"""The op benchmark's report of what it has measured: lines, targets, tables, comparisons."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture(autouse=True)
def bench_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A real run on two small rows."""
    sys.path.insert(0, str(BENCH))
    import op_rows
    import op_times
    import ops

    options = op_rows.Options(quick=True, ops=("angular_distance",))
    monkeypatch = pytest.MonkeyPatch()
    # pytest-benchmark measures nothing where xdist runs; this run is one of its own.
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    monkeypatch.setattr(op_times, "ROW_SECONDS", 0.01)
    monkeypatch.setattr(op_times, "SAMPLE_SECONDS", 1e-4)
    monkeypatch.setattr(ops, "copy_bandwidth", lambda device: 1e10)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield ops.run_benchmarks(options)
    torch.set_num_threads(threads)
    monkeypatch.undo()


@pytest.mark.slow
def test_a_run_reports_every_candidate(results: Any, tmp_path: Path) -> None:
    import op_plot
    import op_report
    from op_targets import TARGETS

    names = [entry["extra_info"]["candidate"] for entry in results["benchmarks"]]
    assert names == ["native", "reference", "copy", "native", "usual", "copy"]
    assert len({entry["group"] for entry in results["benchmarks"]}) == 2
    for entry in results["benchmarks"]:
        assert 1e-7 < entry["stats"]["min"] <= entry["stats"]["median"] < 10
        assert entry["stats"]["rounds"] >= 3 and "data" not in entry["stats"]
    text = op_report.report(results)
    assert text.count("native *") == 2 and "10.0 GB/s" in text
    assert text.count("not measured") == len(TARGETS)  # none of them is in this run
    odd = {**results, "refused": {"x": "why"}, "missing": {"row": {"copy": "no\nmore"}}}
    text = op_report.report(odd)
    assert "refused: x: why\n" in text and "missing: row: copy: no\n" in text
    op_plot.roofline(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_figures_of_a_line_come_from_its_row(results: Any) -> None:
    import op_report

    groups = op_report.groups_of(results)
    lines = op_report.table(results).splitlines()[2:]
    for group, line in zip(groups.values(), lines, strict=True):
        own, copy = group["native"]["stats"]["median"], group["copy"]["stats"]["median"]
        (eager,) = (e for n, e in group.items() if n in ("reference", "usual"))
        ratio = eager["stats"]["median"] / own
        assert f"{own * 1e6:.1f}" in line and f"({ratio:.2f}x)" in line
        assert f" {copy / own:.2f} " in line
        assert f"{group['native']['extra_info']['bytes'] / own / 1e9:.1f}" in line


def test_targets_are_met_or_not(results: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import op_targets

    (name, group), *_ = _groups(results)
    reached = group["copy"]["stats"]["median"] / group["native"]["stats"]["median"]
    asked = [op_targets.Target(name, "copy", least) for least in (reached * 0.99, reached * 1.01)]
    asked.append(op_targets.Target(name, "compiled", 1.0))
    monkeypatch.setattr(op_targets, "TARGETS", tuple(asked))
    lines = op_targets.lines({name: group})
    assert [line[-1] for line in lines] == ["met", "NOT MET", "not measured"]
    assert lines[0][2] == f"{reached:.2f}"


def _groups(results: Any) -> list[tuple[str, Any]]:
    import op_report

    return list(op_report.groups_of(results).items())


def test_markdown_has_tables_of_equal_width(results: Any) -> None:
    import op_report
    from op_targets import TARGETS

    lines = [x for x in op_report.markdown(results).splitlines() if x.startswith("|")]
    widths = {line.count("|") for line in lines}
    assert len(widths) == 2  # of the targets, and of the figures
    assert len(lines) == 2 + len(TARGETS) + 2 + 2  # each with a header and a rule; two rows


def test_comparison_with_an_earlier_run(results: Any) -> None:
    import copy

    import op_report

    later = copy.deepcopy(results)
    for entry in later["benchmarks"]:
        entry["stats"] |= dict.fromkeys(("median", "q1", "q3"), 20 * entry["stats"]["max"])
    text = op_report.comparison(results, later)
    assert "slower" in text and "faster" not in text and "ANOTHER SETUP" not in text
    assert "faster" in op_report.comparison(later, results)
    assert "slower" not in op_report.comparison(results, results)
    later["machine_info"]["fastadv"]["packages"]["torch"] = "1.0"
    assert "ANOTHER SETUP" in op_report.comparison(results, later)
    later["benchmarks"] = []
    assert "nothing was measured in both" in op_report.comparison(results, later)
