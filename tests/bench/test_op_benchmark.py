"""The op benchmark: which ops and rows it measures, and how."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture(autouse=True)
def bench_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))


def _suite(folder: Path, monkeypatch: pytest.MonkeyPatch, **files: str) -> None:
    """Put a small suite in the place of this one."""
    import op_tests

    tests = folder / "tests" / "ops"
    tests.mkdir(parents=True)
    (tests / "conftest.py").write_text(
        "def pytest_addoption(parser): parser.addoption('--thorough', action='store_true')"
    )
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
            {"test_ops": PASSES + "@pytest.mark.every_op\ndef test_c(): assert 0"},
            {"pgd_step": "test_c", "crop_flip": "test_c"},
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


def test_tests_on_another_device_say_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from op_tests import failures

    on_gpu = PASSES.replace("test_a", "test_b").replace("pass", "assert op != 'pgd_step/linf'")
    files = {**EMPTY_FAMILIES, "test_ops": f"{PASSES}@pytest.mark.gpu\n{on_gpu}"}
    _suite(tmp_path, monkeypatch, **files)
    ops = ["pgd_step", "crop_flip"]
    assert (set(failures(ops)), set(failures(ops, "cuda"))) == (set(), {"pgd_step"})


def test_ops_whose_tests_do_not_end_in_time_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from op_tests import failures

    _suite(tmp_path, monkeypatch, **EMPTY_FAMILIES, test_ops="import time; time.sleep(60)")
    assert failures(["pgd_step"], seconds=1) == {"pgd_step": "the tests did not end in 1 s"}


def test_the_report_of_tests_that_have_run_serves(tmp_path: Path) -> None:
    from op_tests import failures

    names = ("test_a[pgd_step/linf]", "test_a[crop_flip/plain]")
    cases = [f'<testcase classname="tests.ops.test_ops" name="{name}"' for name in names]
    report = tmp_path / "report.xml"
    report.write_text(f"<testsuite>{cases[0]}/>{cases[1]}><failure/></testcase></testsuite>")
    found = failures(["pgd_step", "crop_flip", "random_start"], ended=report)
    assert found["crop_flip"].startswith("1 of 1") and found["random_start"] == "it has no test"
    assert "pgd_step" not in found


def test_every_op_is_measured_in_both_directions() -> None:
    from op_cases import CASES
    from op_rows import Options, rows

    from fastadv.ops import REGISTRY

    pairs = {case.op for case in CASES.values() if case.differentiable and case.bench_shapes}
    assert pairs
    for quick in (True, False):
        found = list(rows(Options(quick=quick)))
        assert {row.case.op for row in found} == set(REGISTRY)
        assert len({row.name for row in found}) == len(found)
        assert {row.case.op for row in found if row.direction == "both"} == pairs
        for row in found:
            raw = "backward" if row.case.registered.backward_of else "forward"
            assert row.direction in (raw, "both")


def test_only_what_teaches_most_is_compiled() -> None:
    from op_rows import Options, rows

    found = {row.name: row.candidates(Options()) for row in rows(Options())}
    assert found["angular_distance/same-dtype-both-128x640x8x8-float32-contiguous"] == [
        "native",
        "usual",
        "usual compiled",
        "copy",
    ]
    assert found["pgd_step_/linf-forward-128x3x224x224-float32-contiguous"] == [
        "native",
        "reference",
        "compiled",
        "usual",
        "usual compiled",
        "copy",
    ]
    for name, candidates in found.items():
        compiled = "compiled" in candidates or "usual compiled" in candidates
        assert not (compiled and ("bfloat16" in name or name.endswith("channels_last")))
    quick = [row.candidates(Options(quick=True)) for row in rows(Options(quick=True))]
    assert not any("compiled" in c or "usual compiled" in c for c in quick)


def test_rows_are_chosen_by_a_part_of_their_names() -> None:
    from op_rows import Options, rows

    chosen = list(rows(Options(part="pgd_step_/linf-forward-128x3x224")))
    assert [row.spec.shape for row in chosen] == [(128, 3, 224, 224)]
    assert not list(rows(Options(part="no such row")))


def test_a_full_run_keeps_to_its_time() -> None:
    from op_rows import Options, rows
    from op_times import estimate

    options = Options()
    chosen = list(rows(options))
    assert len(chosen) < estimate(chosen, options) < 12 * 60
    assert estimate(chosen[:1], options) < estimate(chosen, options)


def test_every_target_is_a_row_that_is_measured() -> None:
    from op_rows import Options, rows
    from op_targets import TARGETS

    found = {row.name: row.candidates(Options()) for row in rows(Options())}
    assert all(target.against in found[target.row] for target in TARGETS)


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
    from op_rows import Row
    from op_work import workload

    pixels = 2 * 3 * 5 * 7
    spec = Spec((2, 3, 5, 7))
    for name, size in (
        ("pgd_step/linf", 4 * 4 * pixels),  # adv, grad, x, result
        ("pgd_step_/linf", 4 * 4 * pixels),
        ("random_start/linf", 2 * 4 * pixels),
        ("noisy_replay/fixed-eps", 2 * 4 * pixels),  # x or adv, and the result
        ("angular_distance/same-dtype", 4 * (2 * pixels + 2 * (1 + 3))),
    ):
        assert workload(Row(CASES[name], spec)).bytes == size
    both = workload(Row(CASES["angular_distance/same-dtype"], spec, "both"))
    assert both.bytes == 4 * (2 * pixels + 2 * (1 + 3)) + 4 * (2 + 2 * pixels)


def test_both_directions_give_the_gradients_of_all_arguments() -> None:
    from op_cases import CASES
    from op_cases.draw import Spec
    from op_rows import Row
    from op_work import workload

    case, spec = CASES["angular_distance/same-dtype"], Spec((5, 3, 4, 6))
    work = workload(Row(case, spec, "both"))
    own, usual = (work.candidate(name)() for name in ("native", "usual"))
    assert [g.shape for g in own] == [g.shape for g in usual] == 2 * [spec.shape]
    for gradient, expected in zip(own, usual, strict=True):
        assert gradient.abs().max() > 0
        normal = [0, 1, 3, 4]  # the definitions differ where a norm is zero
        torch.testing.assert_close(gradient[normal], expected[normal], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "direction", "rival", "what"),
    [
        ("pgd_step/linf", "forward", lambda adv, **_: adv, "result 0"),
        ("angular_distance/same-dtype", "both", lambda u, v: (u * v).flatten(1).sum(1), "result 0"),
        (
            "angular_distance/same-dtype",
            "both",
            lambda u, v: _distance(u, v).detach() + 0 * (u + v).flatten(1).sum(1),
            "gradient 0",
        ),
    ],
    ids=["forward", "both", "gradient"],
)
def test_a_rival_that_computes_something_else_is_refused(
    name: str, direction: str, rival: Any, what: str
) -> None:
    from dataclasses import replace

    from op_cases import CASES
    from op_cases.draw import Spec
    from op_rows import Options, Row
    from op_times import measured

    row = Row(replace(CASES[name], rival=rival), Spec((4, 3, 5, 7)), direction)
    found = measured(row, Options(quick=True))
    assert f"{what} of the rival differs" in found.refused and row.name in found.refused
    assert not found.facts


def _distance(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    from fastadv.ops import angular_distance

    return angular_distance(u, v)


def test_what_cannot_be_measured_is_told_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    import op_times
    from op_cases import CASES
    from op_cases.draw import Spec
    from op_rows import Options, Row

    class Work:
        bytes, operations = 8, 1.0

        def candidate(self, name: str) -> Any:
            if name == "copy":
                raise RuntimeError("no such thing")
            return lambda: torch.zeros(2)

    monkeypatch.setattr(op_times, "workload", lambda row: Work())
    row = Row(CASES["pgd_step/l2"], Spec((1, 2)))
    found = op_times.measured(row, Options(quick=True))
    assert found.missing == {"copy": "RuntimeError: no such thing"}
    assert set(found.facts) == {"native", "reference"} and not found.refused
    late = op_times.measured(row, Options(quick=True, until=time.perf_counter()))
    assert set(late.missing) == {"native", "reference", "copy"} and not late.facts
    monkeypatch.setattr(op_times, "workload", lambda row: 1 / 0)
    broken = op_times.measured(Row(CASES["pgd_step/l2"], Spec((1, 3))), Options(quick=True))
    assert broken.refused.startswith("ZeroDivisionError") and not broken.facts


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
    rounds = dict.fromkeys("abc", 3)
    times = interleaved_times(candidates, rounds, torch.device("cpu"), calls)
    assert "".join(order) == "abbc" + "bbca" + "cabb"
    assert {name: len(values) for name, values in times.items()} == rounds


def test_fewer_rounds_are_spread_over_all() -> None:
    from measure import interleaved_times

    order: list[str] = []
    candidates = {name: lambda name=name: order.append(name) for name in "ab"}
    rounds, calls = {"a": 6, "b": 2}, {"a": 1, "b": 1}
    times = interleaved_times(candidates, rounds, torch.device("cpu"), calls)
    assert "".join(order) == "aaabaaba"
    assert {name: len(values) for name, values in times.items()} == rounds
