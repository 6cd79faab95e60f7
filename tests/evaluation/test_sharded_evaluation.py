"""An evaluation by several processes, and one that is killed: the table of one undisturbed process."""

from __future__ import annotations

import json
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from attack_helpers import digits_test, trained_small_cnn
from linear_model import linear_problem
from processes import Started, ran, rank_environments, spawn
from test_doubtful_figures import BEYOND_THE_IMAGES, nan_off_the_grid, spoilt_off_the_grid
from training_helpers import small_recipe

from fastadv.evaluation import AutoAttackResult, Result, Stage, evaluate
from fastadv.evaluation.rows import joined
from fastadv.evaluation.shared_work import SharedWork
from fastadv.evaluation.worst import WorstImages
from fastadv.files import file_key
from fastadv.ranks import Ranks
from fastadv.trainers import train

pytestmark = pytest.mark.slow

pytest.importorskip("pyautoattack")
ATTACKS = (
    *("clean", "fgsm", "pgd-3-2", "pgd-2-2runs", "apgd-ce-3", "square-20", "cwl2-5", "min-fgsm"),
    "autoattack",
)
WORDS = (
    *("--attacks", *ATTACKS, "--engine", "fp32", "--eps", "0.2", "--max-examples", "20"),
    *("--batch-size", "8", "--device", "cpu", "--quiet"),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "at"
    options = {"data": "digits", "model": "small_cnn", "device": "cpu", "progress": False}
    train("pgd_at", small_recipe("pgd_at", epochs=1, train_images=64), run_dir=folder, **options)
    return folder


def results(file: Path) -> list[Result]:
    from fastadv.evaluation import load_results

    return [
        replace(one, row=replace(one.row, seconds=0.0), date="", command="", worst_file="")
        for one in load_results(file)
    ]


def judging(run: Path, out: Path) -> list[str]:
    return ["eval", str(run), *WORDS, "--out", str(out)]


@pytest.fixture(scope="module")
def undisturbed(
    run: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[Result], str, list[WorstImages]]:
    out = tmp_path_factory.mktemp("alone") / "eval.json"
    done = ran(["-m", "fastadv", *judging(run, out)])
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in out.parent.iterdir()) == ["eval.json", "worst"]
    return results(out), done.stdout, worst(out)


def worst(out: Path) -> list[WorstImages]:
    """The worst images of each row, where there are some."""
    from fastadv.evaluation import load_results

    files = [out.parent / one.worst_file for one in load_results(out) if one.worst_file]
    return [WorstImages.load(file) for file in files]


def without_seconds(table: str) -> list[list[str]]:
    """The words of each line but those with a point, which are seconds and percentages."""
    return [[word for word in line.split() if "." not in word] for line in table.splitlines()]


@pytest.mark.processes
def test_two_processes_give_the_table_of_one(
    run: Path, tmp_path: Path, undisturbed: tuple[list[Result], str, list[WorstImages]]
) -> None:
    words = ["-m", "fastadv", *judging(run, tmp_path / "eval.json")]
    processes = [Started(words, variables) for variables in rank_environments(2)]
    told = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    assert results(tmp_path / "eval.json") == undisturbed[0]
    assert without_seconds("".join(out for out, _ in told)) == without_seconds(
        undisturbed[1]
    )  # printed once
    assert sorted(path.name for path in tmp_path.iterdir()) == ["eval.json", "worst"]
    found = worst(tmp_path / "eval.json")
    assert [one.indices.tolist() for one in found] == [
        one.indices.tolist() for one in undisturbed[2]
    ]
    assert any(
        len({i % 2 for i in one.indices.tolist()}) == 2 for one in found
    )  # of both processes
    for one, other in zip(found, undisturbed[2], strict=True):
        assert (one.adversarials - other.adversarials).abs().max() < 1e-4
    rows = {one.row.name: one.row for one in undisturbed[0]}
    assert rows["clean"].correct > rows["pgd-3-2"].correct >= rows["autoattack"].correct
    assert [stage.name for stage in rows["autoattack"].stages] == [
        *("apgd-ce", "apgd-t", "fab-t", "square")
    ]


CHILD = """
import os, signal, sys
from fastadv.evaluation.finished_batches import FinishedBatches
from fastadv.evaluation.autoattack_state import AutoAttackState
from fastadv.cli import main

limit, count = int(sys.argv[1]), [0]

def counting(save):
    def counted(*arguments):
        if count[0] == limit:
            os.kill(os.getpid(), signal.SIGKILL)  # the batch that has just been attacked is lost
        count[0] += 1
        save(*arguments)
    return counted

for kind in (FinishedBatches, AutoAttackState):
    kind.save = counting(kind.save)
status = main(sys.argv[2:])
print(f"{count[0]} batches", file=sys.stderr)
sys.exit(status)
"""


@pytest.mark.processes
def test_kills_lose_one_batch_each(
    run: Path, tmp_path: Path, undisturbed: tuple[list[Result], str, list[WorstImages]]
) -> None:
    out = tmp_path / "eval.json"
    words = judging(run, out)

    def attempt(limit: int) -> subprocess.CompletedProcess[str]:
        return ran(["-c", CHILD, str(limit), *words])

    limits = (6, 4)
    for limit in limits:
        assert attempt(limit).returncode == -signal.SIGKILL
    done = attempt(10**6)
    assert done.returncode == 0, done.stderr
    assert results(out) == undisturbed[0]
    batches = int(done.stderr.split()[-2])
    alone = tmp_path / "alone.json"
    words[-1] = str(alone)
    assert int(attempt(10**6).stderr.split()[-2]) == batches + sum(limits)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone.json", "eval.json", "worst"]


def test_finished_batches_belong_to_one_evaluation(tmp_path: Path) -> None:
    model, (x, y) = trained_small_cnn(), digits_test(16)
    settings = {"progress": False, "batch_size": 8, "device": "cpu", "state_dir": tmp_path}
    report = evaluate(model, (x, y), ["clean", "pgd-2"], **settings)
    files = sorted((tmp_path / "batches").glob("pgd-2-*.json"))
    assert len(files) == -(-report["clean"].correct // 8)
    again = evaluate(model, (x, y), ["clean", "pgd-2"], **settings)
    assert [row.correct for row in again.rows] == [row.correct for row in report.rows]
    with pytest.raises(ValueError, match="belongs to another run: other data"):
        evaluate(model, (1 - x, y), ["clean", "pgd-2"], **settings)
    with pytest.raises(ValueError, match="seed was 0 and is 1"):
        evaluate(model, (x, y), ["clean", "pgd-2"], seed=1, **settings)
    with pytest.raises(TypeError, match="state_dir needs a torch module as model"):
        evaluate(lambda images: model(images), (x, y), ["clean"], **settings)
    # What a file holds is used, and a damaged one is named.
    count = len(json.loads(files[0].read_text())["values"])
    files[0].write_text(json.dumps({"values": [0.0] * count, "violations": {}}))
    changed = evaluate(model, (x, y), ["clean", "pgd-2"], **settings)
    assert changed["pgd-2"].correct < report["pgd-2"].correct
    for damage in ("", "{}", '{"values": [1.0], "violations": {}}', '{"values": "a"}'):
        files[0].write_text(damage)
        with pytest.raises(ValueError, match=f"{files[0].name} cannot be read"):
            evaluate(model, (x, y), ["clean", "pgd-2"], **settings)


def test_keys_differ_with_what_the_values_depend_on() -> None:
    keys = {file_key("pgd-2", *facts) for facts in ((), (1,), (1.0,), (1, 2), ("1",))}
    assert len(keys) == 5 and all(key.startswith("pgd-2-") for key in keys)
    assert "/" not in file_key("a/b\\c:d")


def test_images_are_shared_out_in_turn() -> None:
    shares = [SharedWork(ranks=Ranks(rank, 3)).own(torch.arange(7)).tolist() for rank in range(3)]
    assert shares == [[0, 3, 6], [1, 4], [2, 5]]


def doubts(images: int, sharded: bool) -> list[tuple[object, ...]]:
    """What is told of attacks on models with NaN and infinite gradients, and with NaN as logits."""
    attacks = [
        name for name in BEYOND_THE_IMAGES if name != "cwl2-3"
    ]  # its numbers are of rounding
    found = []
    for value in (torch.nan, torch.inf, 0.0):
        model, (x, y) = spoilt_off_the_grid(value)
        some = (x[:images], y[:images])
        found.append(
            evaluate(model, some, attacks, eps=0.02, batch_size=5, progress=False, sharded=sharded)
        )
    model, (x, y) = nan_off_the_grid()
    some = (x[:images], y[:images])
    found.append(
        evaluate(model, some, ["fab-3", "fab-t-3"], eps=0.3, progress=False, sharded=sharded)
    )
    return [(row.name, row.correct, row.status, row.notes) for one in found for row in one.rows]


def doubting(rank: int, folder: str) -> None:
    """One of two processes that share 7 images, and then a single one."""
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    torch.save([doubts(7, True), doubts(1, True)], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.processes
@pytest.mark.filterwarnings("ignore:the model's gradient in x is", "ignore:the model returned NaN")
def test_useless_gradients_and_nan_are_counted_over_all_processes(tmp_path: Path) -> None:
    spawn(doubting, (str(tmp_path),), 2)
    wanted = [doubts(7, False), doubts(1, False)]
    assert {status for one in wanted for _, _, status, _ in one} == {"ok", "suspect"}
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pt", weights_only=False) == wanted


def test_without_a_process_group_nothing_is_shared() -> None:
    model, x, y = linear_problem(classes=4, n=4)
    with pytest.raises(ValueError, match="sharded must be False without a process group"):
        evaluate(model, (x, y), "clean", sharded=True, progress=False)


def test_the_results_of_processes_are_joined() -> None:
    def result(correct: int, status: str, *notes: str) -> AutoAttackResult:
        empty = torch.empty(0)
        stages = (Stage("apgd-ce", correct + 1, "bf16", 1, 2, 3.0, 0.5), Stage("square", correct))
        return AutoAttackResult(
            *(empty, empty, empty, stages, status, notes, 0, 8, 2.0 * correct, "bf16")
        )

    one, other = result(3, "ok"), result(5, "suspect", "7 runs began blind")
    assert joined([one]) is one
    both = joined([one, other, replace(other, notes=("9 runs began blind",))])
    assert [stage.correct for stage in both.stages] == [16, 13]
    assert (both.stages[0].refined, both.stages[0].unconfirmed) == (3, 6)
    assert (both.status, both.seconds, both.search) == ("suspect", 10.0, "bf16")
    assert both.notes == ("7 runs began blind (1 more like this)",)
    assert joined([one, replace(one, status="invalid"), other]).status == "invalid"
