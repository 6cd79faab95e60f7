"""SIGTERM and Ctrl-C while a run trains: the step is finished, a checkpoint written, resuming is bit for bit."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from processes import Started
from run_helpers import SharedRuns, assert_same_end, run
from training_helpers import small_data, small_recipe

from fastadv.evaluation import evaluate
from fastadv.interruption import Interrupted, StopRequest, stopped_by_signals
from fastadv.trainers import Settings, TrainingInterrupted, train
from fastadv.trainers.checkpoint import checkpoints_in
from fastadv.trainers.logs import read_records
from fastadv.trainers.monitor import Monitor

pytestmark = pytest.mark.usefixtures("one_thread")
BOTH = [(signal.SIGTERM, 143), (signal.SIGINT, 130)]
ALL = [*BOTH, (signal.SIGHUP, 129), (signal.SIGUSR1, 138)]


def handlers() -> list[Any]:
    return [signal.getsignal(number) for number, _ in ALL]


def signal_at(step: int, *numbers: int) -> Any:
    """What sends this process signals after a step."""

    def send(progress: Any) -> None:
        if progress.step == step:
            for number in numbers:
                os.kill(os.getpid(), number)

    return send


@pytest.mark.parametrize(("signum", "status"), BOTH)
@pytest.mark.parametrize(
    "step", [2, 4, 5]
)  # within an epoch of four steps, at its end, in the next
def test_the_step_is_finished_and_resuming_is_bit_for_bit(
    signum: int, status: int, step: int, shared_runs: SharedRuns, tmp_path: Path
) -> None:
    before = handlers()
    cut = tmp_path / "cut"
    settings = Settings(log_every=2)
    with pytest.raises(TrainingInterrupted) as caught:
        run("pgd_at", cut, settings=settings, on_step=signal_at(step, signum))
    assert handlers() == before
    stop = caught.value
    assert stop.signal == signum and stop.code == status
    assert stop.checkpoint == checkpoints_in(cut / "checkpoints")[-1]
    assert stop.checkpoint.name == f"step_{step:06d}" and stop.run_dir == cut
    assert str(stop.checkpoint) in str(stop) and f"after step {step}" in str(stop)
    run("pgd_at", cut, resume=True)
    assert_same_end(shared_runs.whole("pgd_at"), cut)


@pytest.mark.parametrize(("signum", "status"), ALL[2:])
def test_a_closed_terminal_and_slurms_signal_leave_a_checkpoint(
    signum: int, status: int, tmp_path: Path
) -> None:
    before = handlers()
    with pytest.raises(TrainingInterrupted, match="after step 2") as caught:
        run("standard", tmp_path, on_step=signal_at(2, signum))
    assert caught.value.code == status and handlers() == before
    assert run("standard", tmp_path, resume=True).progress.step == 8


class GoneTerminal(io.StringIO):
    """Standard error whose reader has gone."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal, self.tries = terminal, 0

    def isatty(self) -> bool:
        return self.terminal

    def write(self, text: str) -> int:
        self.tries += 1
        raise OSError(errno.EIO if self.terminal else errno.EPIPE, "gone")


@pytest.mark.parametrize("terminal", [True, False])
def test_nobody_who_reads_the_progress_is_no_reason_to_stop(
    terminal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", gone := GoneTerminal(terminal))
    result = train(
        "standard",
        small_recipe("standard"),
        data=small_data(),
        model="small_cnn",
        run_dir=tmp_path,
        settings=Settings(log_every=1),
    )
    report = evaluate(result.model, small_data().test, ("clean", "fgsm"), eps=0.1)
    assert result.progress.step == 8 and len(report.rows) == 2 and gone.tries


@pytest.mark.processes
def test_it_is_no_fault_and_ends_a_script_with_the_shells_status(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run("standard", tmp_path, on_step=signal_at(1, signal.SIGINT))
    assert not issubclass(Interrupted, Exception)
    script = (
        "import signal\nfrom fastadv.interruption import Interrupted\n"
        "raise Interrupted('stopped', signal.SIGTERM)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 143 and "Traceback" not in done.stderr


@pytest.mark.parametrize("validations", [1, 2])  # of two epochs
def test_a_signal_between_epochs_waits_for_the_epochs_end(
    validations: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    validate, left = Monitor.validate, [validations]

    def send(monitor: Monitor) -> Any:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return validate(monitor)

    monkeypatch.setattr(Monitor, "validate", send)
    if validations == 2:  # nothing is left to do
        assert run("standard", tmp_path).progress.epoch == 2
        return
    with pytest.raises(TrainingInterrupted, match="after step 4"):
        run("standard", tmp_path)
    assert [
        r["epoch"] for r in read_records(tmp_path / "metrics.jsonl") if r["kind"] == "epoch"
    ] == [1]


@pytest.mark.parametrize("numbers", [(signal.SIGTERM,) * 2, (signal.SIGINT, signal.SIGTERM)])
def test_a_second_signal_stops_at_once(numbers: tuple[int, ...], tmp_path: Path) -> None:
    before = handlers()
    with pytest.raises(Interrupted, match="stopped at once") as caught:
        run("standard", tmp_path, settings=Settings(), on_step=signal_at(2, *numbers))
    assert not isinstance(caught.value, TrainingInterrupted)
    assert caught.value.signal == numbers[1] and handlers() == before
    assert checkpoints_in(tmp_path / "checkpoints") == []


def test_before_the_first_step_it_stops_at_once(tmp_path: Path) -> None:
    def send(_: Path) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="resuming goes on from the last checkpoint, or starts"):
        run("standard", tmp_path, on_start=send)
    assert run("standard", tmp_path, resume=True).progress.step == 8


def test_a_handler_of_the_callers_own_stays(tmp_path: Path) -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    ignored = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        result = run("standard", tmp_path, on_step=signal_at(2, signal.SIGTERM, signal.SIGINT))
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, ignored)
    assert heard == [signal.SIGTERM] and result.progress.step == 8


def test_a_run_in_another_thread_sets_no_handler(tmp_path: Path) -> None:
    seen: list[Any] = []
    thread = threading.Thread(
        target=run,
        args=("standard", tmp_path),
        kwargs={"on_step": lambda _: seen.append(handlers())},
    )
    before = handlers()
    thread.start()
    thread.join()
    assert len(seen) == 8 and all(one == before for one in seen)


def test_handlers_are_put_back_whatever_happens() -> None:
    before = handlers()
    with pytest.raises(KeyError), StopRequest():
        assert handlers() != before
        raise KeyError
    assert handlers() == before
    with stopped_by_signals("outer"):
        outer = handlers()
        with StopRequest() as request:
            assert handlers() != outer
            os.kill(os.getpid(), signal.SIGTERM)
            assert request.signal == signal.SIGTERM
        assert handlers() == outer
    assert handlers() == before


def test_signals_that_follow_soon_can_belong_to_the_first(capfd: Any) -> None:
    with StopRequest("stopping", repeats_within=60) as request:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.signal == signal.SIGINT
    assert capfd.readouterr().err == "Ctrl-C: stopping\n"


@pytest.mark.processes
@pytest.mark.parametrize(
    ("signum", "status"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 7)]
)
def test_a_forked_process_is_not_held_by_the_handler(signum: int, status: int) -> None:
    with StopRequest() as request:
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signum)
            os._exit(7)
        _, found = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(found) == status and request.signal is None


def test_a_checkpoint_is_not_asked_for_in_vain(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="where there is no run, got 'step_000003'"):
        run("standard", tmp_path, resume="step_000003")
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_comes_by_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("fastadv.trainers.loop.time.monotonic", lambda: clock[0])
    found: list[list[str]] = []

    def work(_: Any) -> None:
        clock[0] += 200.0
        found.append([path.name for path in checkpoints_in(tmp_path / "checkpoints")])

    recipe = small_recipe("standard", batch_size=8)  # two epochs of nine steps
    options: dict[str, Any] = {
        "data": small_data(),
        "model": "small_cnn",
        "run_dir": tmp_path,
        "settings": Settings(keep=99),  # ten minutes are three such steps
        "progress": False,
        "device": "cpu",
    }
    train("standard", recipe, on_step=work, **options)
    names = [path.name for path in checkpoints_in(tmp_path / "checkpoints")]
    assert names == [f"step_{step:06d}" for step in (3, 6, 9, 12, 15, 18)]
    assert found[3] == ["step_000003"]
    with pytest.raises(ValueError, match="checkpoint_minutes must be > 0, got 0"):
        Settings(checkpoint_minutes=0)
    with pytest.raises(ValueError, match="timeout must be > 0, got -1"):
        Settings(timeout=-1)


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize(("signum", "status"), BOTH)
def test_from_the_command_line_it_says_how_to_go_on_without_repeating_the_options(
    signum: int, status: int, tmp_path: Path
) -> None:
    folder = tmp_path / "at"
    options = ["--data", "digits", "--epochs", "300", "--eps", "1/10", "--alpha", "0.025"]
    options += ["--pad", "1", "--flip", "false", "--seed", "5", "--schedule", "Cosine", "--quiet"]
    options += ["--schedule.floor", "1/3", "--monitor_images", "16", "--log_every", "1"]
    options += ["--device", "cpu", "--keep", "3"]
    command = ["pgd_at", "--run", str(folder)]
    for words in ([*command, *options], [*command, "--resume", "--quiet"]):
        process = Started(["-m", "fastadv", "train", *words], merged=True)
        log = folder / "metrics.jsonl"
        begun = log.stat().st_size if log.exists() else 0
        deadline = time.monotonic() + 120
        while not (log.exists() and log.stat().st_size > begun):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signum)
        out, _ = process.communicate(timeout=60)
        assert process.returncode == status, out
        assert f"go on: fastadv train pgd_at --run {folder} --resume" in out
        assert checkpoints_in(folder / "checkpoints")[-1].name in out
    recipe = json.loads((folder / "run.json").read_text())["recipe"]
    assert recipe["schedule"] == {"class": "Cosine", "floor": 1 / 3}
    assert (recipe["eps"], recipe["seed"], recipe["flip"]) == (0.1, 5, False)
    assert len(checkpoints_in(folder / "checkpoints")) <= 4
