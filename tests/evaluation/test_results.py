"""Collected results: each replaces its own key alone, and no other process's are lost."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from processes import ran

from fastadv.digest import sealed
from fastadv.evaluation import Report, Result, Row, Subject, add_results, load_results
from fastadv.evaluation.result_row import RANDOM
from fastadv.evaluation.results import check_destination, results_of
from fastadv.files import temporary_beside
from fastadv.locks import locked

CLEAN = Row("clean", 200, 190, 0.0, 7, 0.25)
PGD = Row("pgd-20", 200, 100, 8 / 255, 7, 1.5, alpha=2 / 255, steps=20)
SUBJECT = Subject(
    "arrest", "arrest", "resnet18", "step_000391", "ab" * 32, "digits test", "cd" * 32
)


def result(row: Row = PGD, subject: Subject = SUBJECT, **changes: object) -> Result:
    plain = Result(subject, row, "linf", (0.0, 1.0), 256, "cpu", {"torch": "2.13"})
    return replace(plain, **changes)  # type: ignore[arg-type]


def test_results_round_trip_with_what_they_depend_on(tmp_path: Path) -> None:
    file = tmp_path / "new" / "eval.json"
    results = [result(CLEAN), result(), result(after=("fgsm",))]
    assert add_results(file, results) == file
    assert load_results(file) == results
    assert [path.name for path in file.parent.iterdir()] == [
        "eval.json"
    ]  # no lock, no temporary file
    entry = json.loads(file.read_text())["rows"][1]
    assert entry["accuracy"] == 0.5 and entry["interval"][0] == pytest.approx(0.4313609, abs=1e-6)
    assert entry["checkpoint"] == "step_000391" and entry["norm"] == "linf" and entry["n"] == 200


@pytest.mark.parametrize(
    "other",
    [
        result(replace(PGD, eps=3 / 255)),
        result(replace(PGD, alpha=1 / 255)),
        result(replace(PGD, name="pgd-50", steps=50)),
        result(replace(PGD, seed=8)),
        result(replace(PGD, n=100, correct=50)),
        result(norm="l2"),
        result(bounds=(-1.0, 1.0)),
        result(after=("fgsm",)),
        result(subject=replace(SUBJECT, weights="ef" * 32)),
        result(subject=replace(SUBJECT, images="ef" * 32)),
        result(subject=replace(SUBJECT, data="cifar10 test")),
    ],
)
def test_another_key_is_another_result(other: Result, tmp_path: Path) -> None:
    file = tmp_path / "eval.json"
    add_results(file, [result()])
    add_results(file, [other])
    assert load_results(file) == [result(), other]


def test_no_result_is_replaced_by_one_that_may_be_of_another_model(tmp_path: Path) -> None:
    file, unnamed = tmp_path / "eval.json", replace(SUBJECT, weights="")
    add_results(file, [result(subject=unnamed)])
    other = result(replace(PGD, correct=90), unnamed)
    with pytest.raises(ValueError, match=r"must have Subject\.weights.*has 90 .* has 100 for"):
        add_results(file, [result(CLEAN, unnamed), other])
    assert load_results(file) == [result(subject=unnamed)]
    add_results(file, [result(CLEAN, unnamed), result(subject=unnamed), replace(other, norm="l2")])
    assert len(load_results(file)) == 3


def test_a_repeat_replaces_its_own_key_alone(tmp_path: Path) -> None:
    file = tmp_path / "eval.json"
    add_results(file, [result(CLEAN), result(), result(replace(PGD, seed=8))])
    again = result(replace(PGD, correct=99, seconds=9.0), batch_size=64, device="cuda:0")
    add_results(file, [again])
    assert load_results(file) == [result(CLEAN), again, result(replace(PGD, seed=8))]


def test_clean_accuracy_depends_on_the_seed_of_random_models_alone_and_autoattack_on_the_batches(
    tmp_path: Path,
) -> None:
    file = tmp_path / "eval.json"
    add_results(file, [result(CLEAN), result(replace(CLEAN, seed=8), norm="l2")])
    assert len(load_results(file)) == 1
    random = replace(CLEAN, notes=(f"{RANDOM}; and more",))
    add_results(file, [result(random), result(replace(random, seed=8, correct=180))])
    assert [one.row.correct for one in load_results(file)] == [190, 190, 180]
    ensemble = Row("autoattack", 200, 90, 8 / 255, 7, 60.0)
    add_results(file, [result(ensemble), result(ensemble, batch_size=50)])
    assert len(load_results(file)) == 5
    # A random model draws for each batch, so that its figures depend on the batches as well.
    drawn = replace(PGD, notes=(RANDOM,))
    for row in (random, drawn):
        add_results(file, [result(row), result(replace(row, correct=99), batch_size=50)])
    assert len(load_results(file)) == 8


def report(*rows: Row, worst_case: bool = False) -> Report:
    return Report(rows, "Net", "digits test", batch_size=256, worst_case=worst_case)


def test_a_worst_case_knows_what_came_before() -> None:
    fgsm = Row("fgsm", 200, 120, 8 / 255, 7, 1.0)
    plain = results_of(report(CLEAN, fgsm, PGD), SUBJECT)
    assert [one.after for one in plain] == [(), (), ()]
    worst = results_of(report(CLEAN, fgsm, PGD, worst_case=True), SUBJECT)
    assert [one.after for one in worst] == [(), (), ("fgsm",)]


def test_a_file_of_an_earlier_version_is_read_and_added_to(tmp_path: Path) -> None:
    file = report(CLEAN, PGD).save(tmp_path / "eval.json")
    old = load_results(file)
    assert [one.row for one in old] == [CLEAN, PGD]
    assert old[0].subject == Subject(network="Net", data="digits test")
    add_results(file, [result()])
    assert load_results(file) == [*old, result()]


def test_what_a_later_version_wrote_stays(tmp_path: Path) -> None:
    file = tmp_path / "eval.json"
    add_results(file, [result(), result(CLEAN)])
    content = json.loads(file.read_text())
    first = {name: value for name, value in content["rows"][0].items() if name != "sha256"}
    later = [sealed({**first, "kernel": kernel}) for kernel in ("a", "b")]
    file.write_text(json.dumps({**content, "rows": [*later, content["rows"][1], later[0]]}))
    add_results(file, [result(replace(PGD, seed=8))])
    rows = json.loads(file.read_text())["rows"]
    assert rows[:2] == later and len(rows) == 4
    assert load_results(file) == [result(), result(CLEAN), result(replace(PGD, seed=8))]
    add_results(file, [result(replace(PGD, correct=99))])
    assert [one.row.correct for one in load_results(file)] == [99, 190, PGD.correct]
    assert len(json.loads(file.read_text())["rows"]) == 3


def test_a_report_can_be_read_where_the_results_are_of_one_evaluation(tmp_path: Path) -> None:
    file = add_results(tmp_path / "eval.json", results_of(report(CLEAN, PGD), SUBJECT))
    assert Report.load(file)["pgd-20"] == PGD
    add_results(file, [result(replace(PGD, eps=3 / 255))])
    with pytest.raises(ValueError, match=r"several evaluations.*load_results"):
        Report.load(file)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"format": 99}', '{"format": 2}', '{"format": 2, "rows": [{}]}', "\x00"],
)
def test_a_damaged_file_is_named_and_left_as_it_is(text: str, tmp_path: Path) -> None:
    file = tmp_path / "eval.json"
    file.write_text(text)
    for read in (load_results, check_destination, lambda path: add_results(path, [result()])):
        with pytest.raises(ValueError, match=r"eval\.json"):
            read(file)
    assert file.read_text() == text


def test_what_stands_in_the_way_is_said_before(tmp_path: Path) -> None:
    assert check_destination(tmp_path / "a" / "b" / "eval.json") is None
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "eval.json").mkdir()
    why = check_destination(tmp_path / "eval.json")
    assert why == f"{tmp_path / 'eval.json'} cannot be written: Is a directory"
    (tmp_path / "file").write_text("")
    why = str(check_destination(tmp_path / "file" / "eval.json"))
    assert "Not a directory; a folder of its path is a file" in why


@pytest.mark.processes
def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    mine = temporary_beside(tmp_path / "eval.json")
    left = mine.with_name(mine.name.replace(f"@{os.getpid()}@", f"@{ended.pid}@"))
    for file in (left, mine):
        file.write_text("half")
    add_results(tmp_path / "eval.json", [result()])
    assert not left.exists() and mine.exists()


def add_one_by_one(file: str, seeds: list[int]) -> None:
    for seed in seeds:
        add_results(file, [result(replace(PGD, seed=seed))])


def refuse(*_: object) -> None:
    """A lock where the file system has no locks."""
    raise OSError(errno.ENOSYS, "Function not implemented")


@pytest.mark.processes
@pytest.mark.parametrize("locks", [True, False])
def test_processes_and_threads_that_add_at_once_lose_nothing(
    locks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "eval.json"
    if not locks:
        monkeypatch.setattr(fcntl, "flock", refuse)
    spawn = multiprocessing.get_context("fork")
    seeds = [list(range(i, 60, 3)) for i in range(3)]
    workers = [spawn.Process(target=add_one_by_one, args=(str(file), s)) for s in seeds[:2]]
    thread = threading.Thread(target=add_one_by_one, args=(str(file), seeds[2]))
    for worker in (*workers, thread):
        worker.start()
    for worker in (*workers, thread):
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert {one.row.seed for one in load_results(file)} == set(range(60))
    assert [path.name for path in tmp_path.iterdir()] == ["eval.json"]


def test_without_locks_what_a_killed_process_holds_is_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / ".x.held").write_text("")
    with locked(tmp_path / "x", wait=0.1):
        assert (tmp_path / ".x.held").exists()
        with locked(tmp_path / "x", wait=0.1):
            pass
    assert list(tmp_path.iterdir()) == []


def test_without_locks_and_time_to_wait_only_what_an_ended_process_holds_is_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two evaluations would work in one folder, each of which believes that it is alone."""
    monkeypatch.setattr(fcntl, "flock", refuse)
    told = pytest.raises(TimeoutError, match=r"x\.held.*delete this file if no process")
    with locked(tmp_path / "x", wait=0), told, locked(tmp_path / "x", wait=0):
        pass
    ended = ran(["-c", "import os; print(os.getpid())"])
    holder = tmp_path / ".x.held"
    holder.write_text(f"{int(ended.stdout)} {socket.gethostname()}\n")
    with locked(tmp_path / "x", wait=0):
        pass
    holder.write_text(f"{int(ended.stdout)} another-machine\n")
    with pytest.raises(TimeoutError), locked(tmp_path / "x", wait=0):
        pass


def test_without_locks_one_of_several_takes_over_what_a_killed_process_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / ".x.held").write_text("")
    inside, most = [], []

    def enter() -> None:
        with locked(tmp_path / "x", wait=0.5):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.1)
            inside.pop()

    threads = [threading.Thread(target=enter) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1]


def test_links_to_one_file_share_its_lock(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "eval.json").symlink_to("../all/results.json")
    add_results(tmp_path / "one" / "eval.json", [result()])
    with (
        locked(tmp_path / "one" / "eval.json"),
        pytest.raises(TimeoutError),
        locked(tmp_path / "other" / "eval.json", wait=0.1),
    ):
        pass
    assert load_results(tmp_path / "all" / "results.json") == [result()]
    assert [path.name for path in tmp_path.rglob(".*")] == []


def test_a_lock_is_waited_for_and_not_for_ever(tmp_path: Path) -> None:
    with locked(tmp_path / "x"):
        with pytest.raises(TimeoutError, match=r"\.x\.lock"), locked(tmp_path / "x", wait=0.1):
            pass
        with locked(tmp_path / "y", wait=0):
            pass
    with locked(tmp_path / "x", wait=0):
        pass
    assert list(tmp_path.iterdir()) == []
