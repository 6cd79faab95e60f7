"""The script for a machine with a GPU: what it has found stays, whatever happens to a stage or to the script."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "bench" / "gpu.sh"
# Takes the place of python3: it prints its command, and waits in the benchmark of the ops.
PYTHON = """#!{python} -S
import sys, time
if sys.argv[1] == "-":
    print("a GPU")
elif sys.argv[1] == "-c":
    sys.exit(1)  # no package is there that a stage can do without
else:
    print(*sys.argv[1:], flush=True)
    if "bench/ops.py" in sys.argv:
        time.sleep(60)
    print("PASS")
    sys.exit(1 if "bench/gpu_smoke.py" in sys.argv else 0)
"""
pytestmark = pytest.mark.processes


@pytest.fixture
def python(tmp_path: Path) -> Path:
    path = tmp_path / "python3"
    path.write_text(PYTHON.format(python=sys.executable))
    path.chmod(0o755)
    return path


def command(*arguments: object) -> list[str]:
    return ["bash", str(SCRIPT), *map(str, arguments)]


def run(python: Path, *arguments: object) -> int:
    environment = {"PYTHON": str(python), "PATH": "/usr/bin:/bin"}
    return subprocess.run(command(*arguments), env=environment, capture_output=True).returncode


def test_each_call_adds_to_the_summary_and_a_failure_stops_nothing(
    python: Path, tmp_path: Path
) -> None:
    out, wheel, other = tmp_path / "out", tmp_path / "some.whl", tmp_path / "other.whl"
    wheel.touch()
    other.touch()
    assert run(python, "-s", 100, "-w", wheel, "-w", other, out, "build", "smoke") == 1
    assert run(python, "-s", 100, out, "throughput") == 0
    lines = (out / "summary.txt").read_text().splitlines()
    told = [" ".join(line.split()[:2]) for line in lines]
    assert told == ["a GPU", "build passed", "smoke failed", "a GPU", "throughput passed"]
    log = (out / "log.txt").read_text()
    assert f"pip install --no-index --no-deps --force-reinstall {wheel} {other}\nPASS" in log
    # 8 of 10 of what is left: of 100 s 15 are for an interrupted stage, and a part has passed.
    seconds = re.search(r"bench/throughput.py --device cuda --seconds (\d+)", log)
    assert seconds is not None and 0 < int(seconds[1]) <= 68


def test_a_stage_that_runs_out_of_time_leaves_its_output(python: Path, tmp_path: Path) -> None:
    assert run(python, "-s", 2, tmp_path / "out", "ops", "throughput") == 1
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert "ops         timed out" in summary and "throughput  passed" in summary
    assert "\nbench/ops.py --device cuda" in (tmp_path / "out" / "log.txt").read_text()


def test_the_log_has_what_a_stage_found_before_the_script_was_killed(
    python: Path, tmp_path: Path
) -> None:
    environment = {"PYTHON": str(python), "PATH": "/usr/bin:/bin"}
    log = tmp_path / "log.txt"
    started = subprocess.Popen(command(tmp_path, "ops"), env=environment, start_new_session=True)
    try:
        end = time.monotonic() + 60
        while "\nbench/ops.py" not in (log.read_text() if log.is_file() else ""):
            assert started.poll() is None and time.monotonic() < end
            time.sleep(0.1)
    finally:
        os.killpg(started.pid, signal.SIGKILL)  # the session of its own that was started above
        started.wait()


def test_every_file_with_tests_for_a_gpu_is_run(python: Path, tmp_path: Path) -> None:
    assert run(python, "-s", 60, tmp_path, "test") == 0
    line = next(
        line for line in (tmp_path / "log.txt").read_text().splitlines() if line.startswith("-m ")
    )
    assert " -m gpu tests/ops " in line and " --continue-on-collection-errors " in line
    assert "--thorough" in line
    chosen = [ROOT / word for word in line.split() if word.startswith("tests/")]
    for file in (ROOT / "tests").rglob("test_*.py"):
        if file.parent.name != "bench" and "mark.gpu" in file.read_text():
            assert any(file.is_relative_to(place) for place in chosen), file


@pytest.mark.parametrize(
    "arguments", [(), ("-s", "soon", "out"), ("-w", "absent.whl", "out"), ("out", "all")]
)
def test_wrong_arguments_are_refused(
    python: Path, arguments: tuple[str, ...], tmp_path: Path
) -> None:
    placed = [tmp_path / a if a == "out" else a for a in arguments]
    assert run(python, *placed) == 2
