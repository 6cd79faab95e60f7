"""Which ops pass their tests: only those are measured."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Collection
from pathlib import Path

from op_rows import CASES

# Marks of tests; see pyproject.toml. Tests that say nothing about results, and take longest, are left out.
FOR_ALL = "every_op"
LEFT_OUT = "compiles or refusals"
# The files of a family beside test_<family>.py.
MORE_FILES = {"pgd_step": ("test_pgd_step_l1.py",)}
ROOT = Path(__file__).resolve().parents[1]


def failures(
    ops: Collection[str],
    device: str = "cpu",
    seconds: float | None = None,
    ended: Path | None = None,
) -> dict[str, str]:
    """Run the tests of ops on a device in a process of their own; why each op that does not pass does not.

    With ``seconds`` they run without --thorough. If they have not ended by then, no op has passed. ``ended`` is
    the report, by pytest's --junitxml, of a run on this device that has ended; then no test runs.

    An op's tests are those in tests/ops/test_ops.py that bear its name and look at its results, and the file of
    its family. A test marked `every_op` counts for all; an op without a passed test does not pass.
    """
    if ended is not None:
        return _refused(ops, ended)
    cases = [case for case in CASES.values() if case.op in ops]
    files = {"test_ops.py", *(file for case in cases for file in _files(case.family))}
    named = " or ".join(f"[{op}/" for op in sorted({case.op for case in cases}))
    families = " or ".join(sorted(files - {"test_ops.py"}))
    chosen = f"{named} or {families} or {FOR_ALL}"  # which looks for marks as well as for names
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        parallel = _in_parallel()
        command = [sys.executable, "-m", "pytest", "-k", chosen, *parallel]
        command += ["--thorough"] if seconds is None else []
        place = "gpu" if device == "cuda" else "not gpu"
        command += ["-m", f"{place} and not ({LEFT_OUT})"]
        command += [f"--junitxml={report}", *(f"tests/ops/{name}" for name in sorted(files))]
        threads = {"OMP_NUM_THREADS": "1"} if parallel else {}
        try:
            finished = subprocess.run(
                command,
                cwd=ROOT,
                env={**os.environ, **threads},
                capture_output=True,
                text=True,
                timeout=seconds,
            )
        except subprocess.TimeoutExpired:
            return dict.fromkeys(ops, f"the tests did not end in {seconds:.0f} s")
        if not report.is_file():
            return dict.fromkeys(ops, f"the tests did not run: {finished.stdout[-500:]}")
        return _refused(ops, report)


def _refused(ops: Collection[str], report: Path) -> dict[str, str]:
    tests = list(ElementTree.parse(report).iter("testcase"))
    return {op: why for op in ops if (why := _why_refused(op, tests))}


def _files(family: str) -> tuple[str, ...]:
    folder = ROOT / "tests" / "ops"
    more = (file for file in MORE_FILES.get(family, ()) if (folder / file).is_file())
    return (f"test_{family}.py", *more)


def _in_parallel() -> list[str]:
    """Pytest's options for as many processes as there are cores, where its plugin for that is installed."""
    processes = min(os.cpu_count() or 1, 12)
    return ["-n", str(processes)] if importlib.util.find_spec("xdist") and processes > 2 else []


def _why_refused(op: str, tests: list[ElementTree.Element]) -> str | None:
    mine = [test for test in tests if _concerns(test, op)]
    broken = [test.get("name") for test in mine if _broken(test)]
    if broken:
        return f"{len(broken)} of {len(mine)} tests fail, {broken[0]} among them"
    return None if mine else "it has no test"


def _concerns(test: ElementTree.Element, op: str) -> bool:
    family = next(case.family for case in CASES.values() if case.op == op)
    name, file = test.get("name", ""), test.get("classname", "").rpartition(".")[2]
    if f"{file}.py" in _files(family):
        return True
    return file == "test_ops" and ("/" not in name or f"[{op}/" in name)


def _broken(test: ElementTree.Element) -> bool:
    return test.find("failure") is not None or test.find("error") is not None
