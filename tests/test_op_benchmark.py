"""The op benchmark: it refuses ops whose tests fail, and reports what it has measured."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCH = Path(__file__).resolve().parents[1] / "bench"


@pytest.fixture(autouse=True)
def bench_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))


def _suite(folder: Path, monkeypatch: pytest.MonkeyPatch, **files: str) -> None:
    """Put a small suite in the place of this one."""
    import op_tests

    tests = folder / "tests"
    tests.mkdir()
    for name, text in files.items():
        (tests / f"{name}.py").write_text(f"import pytest\n{text}")
    monkeypatch.setattr(op_tests, "ROOT", folder)


PASSES = (
    "@pytest.mark.parametrize('op', ['pgd_step/linf', 'crop_flip/plain'])\ndef test_a(op): pass\n"
)
EMPTY_FAMILIES = {"test_pgd_step": "", "test_crop_flip": ""}


@pytest.mark.parametrize(
    ("files", "refused"),
    [
        ({"test_ops": PASSES}, {}),
        (
            {"test_ops": PASSES.replace("pass", "assert op != 'pgd_step/linf'")},
            {"pgd_step": "1 of 1"},
        ),
        ({"test_ops": PASSES, "test_pgd_step": "def test_b(): assert 0"}, {"pgd_step": "1 of 2"}),
        (
            {"test_ops": PASSES + "def test_every_op_has_cases(): assert 0"},
            {"pgd_step": "has_cases", "crop_flip": "has_cases"},
        ),
        ({"test_ops": PASSES.replace("'pgd_step/linf', ", "")}, {"pgd_step": "no test"}),
        ({"test_ops": "import nothing_of_that_name"}, {"pgd_step": "", "crop_flip": ""}),
        (
            {"test_ops": PASSES.replace("def test_a(op): pass", "def test_a(op, missing): pass")},
            {"pgd_step": "1 of 1", "crop_flip": "1 of 1"},
        ),
    ],
    ids=["passing", "sample", "family", "common", "untested", "import", "setup"],
)
def test_ops_whose_tests_fail_are_refused(
    files: dict[str, str],
    refused: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from op_tests import failures

    _suite(tmp_path, monkeypatch, **{**EMPTY_FAMILIES, **files})
    found = failures(["pgd_step", "crop_flip"])
    assert set(found) == set(refused)
    for op, why in refused.items():
        assert why in found[op]


def test_every_op_is_measured_in_both_directions() -> None:
    from op_rows import Options, rows

    from fastadv.ops import REGISTRY

    for quick in (True, False):
        found = list(rows(Options(quick=quick)))
        assert {row.case.op for row in found} == set(REGISTRY)
        assert len({row.name for row in found}) == len(found)
        assert {row.direction for row in found} == {"forward", "backward"}


def test_a_backend_that_is_not_there_is_an_error() -> None:
    from op_rows import Options

    from fastadv.ops import REGISTRY

    with pytest.raises(
        ValueError, match=r"--backend must be one of native, reference for pgd_step"
    ):
        Options(backends=("triton",)).backends_of(REGISTRY["pgd_step"])


def test_bytes_count_each_input_and_output_once() -> None:
    from op_cases import CASES
    from op_cases.draw import Spec
    from op_rows import Row, Workload

    pixels = 2 * 3 * 5 * 7
    for name, size in (
        ("pgd_step/linf", 4 * 4 * pixels),  # adv, grad, x, result
        ("pgd_step_/linf", 4 * 4 * pixels),
        ("random_start/linf", 2 * 4 * pixels),
        ("noisy_replay/fixed-eps", 2 * 4 * pixels),  # x or adv, and the result
        ("angular_distance/same-dtype", 4 * (2 * pixels + 2 * (1 + 3))),
    ):
        assert Workload(Row(CASES[name], Spec((2, 3, 5, 7)))).bytes == size


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A real run on one small row."""
    sys.path.insert(0, str(BENCH))
    import op_rows
    import ops

    options = op_rows.Options(quick=True, ops=("angular_distance",))
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(ops, "ROW_SECONDS", 0.01)
    monkeypatch.setattr(ops, "SAMPLE_SECONDS", 1e-4)
    monkeypatch.setattr(ops, "copy_bandwidth", lambda device: 1e10)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield ops.run_benchmarks(options)
    torch.set_num_threads(threads)
    monkeypatch.undo()


def test_a_run_reports_every_candidate(results: Any, tmp_path: Path) -> None:
    import op_report

    names = [entry["extra_info"]["candidate"] for entry in results["benchmarks"]]
    assert names == ["native", "reference", "copy"]
    assert len({entry["group"] for entry in results["benchmarks"]}) == 1
    for entry in results["benchmarks"]:
        assert 1e-7 < entry["stats"]["min"] <= entry["stats"]["median"] < 10
        assert entry["stats"]["rounds"] == len(entry["stats"]["data"]) >= 3
    text = op_report.table(results)
    assert "native *" in text and "10.0 GB/s" in text
    assert op_report.table({**results, "refused": {"x": "why"}}).count("refused: x: why") == 1
    op_report.roofline(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_comparison_with_an_earlier_run(results: Any) -> None:
    import copy

    import op_report

    later = copy.deepcopy(results)
    for entry in later["benchmarks"]:
        for key in ("median", "q1", "q3"):
            entry["stats"][key] = results["benchmarks"][0]["stats"]["max"] * 20
    text = op_report.comparison(results, later)
    assert "slower" in text and "faster" not in text and "ANOTHER SETUP" not in text
    assert "faster" in op_report.comparison(later, results)
    assert "slower" not in op_report.comparison(results, results)
    later["machine_info"]["fastadv"]["packages"]["torch"] = "1.0"
    assert "ANOTHER SETUP" in op_report.comparison(results, later)
    later["benchmarks"] = []
    assert "nothing was measured in both" in op_report.comparison(results, later)


def test_played_back_times_are_the_recorded_ones() -> None:
    from ops import Playback

    class Fixture:
        """What pytest-benchmark's fixture does with a clock."""

        def __init__(self, clock: Playback) -> None:
            self.clock, self.times = clock, []

        def pedantic(self, run: Any, setup: Any, rounds: int) -> None:
            for _ in range(rounds):
                setup()
                start = self.clock()
                run()
                self.times.append(self.clock() - start)

    clock = Playback()
    fixture = Fixture(clock)
    clock.play(fixture, [0.25, 1e-7, 3.0])
    assert fixture.times == [0.25, 1e-7, 3.0]


def test_rounds_start_with_another_candidate_each() -> None:
    from measure import interleaved_times

    order: list[str] = []
    candidates = {name: lambda name=name: order.append(name) for name in "abc"}
    calls = {"a": 1, "b": 2, "c": 1}
    times = interleaved_times(candidates, 3, torch.device("cpu"), calls)
    assert "".join(order) == "abbc" + "bbca" + "cabb"
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3, "c": 3}
