"""Interrupted runs: resumed bit for bit, refused when they are another run."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Started
from run_helpers import Interruption, SharedRuns, assert_same_end, fingerprint, run
from test_checkpoint import truncate
from training_helpers import make_model, small_data, small_recipe, states_equal

from fastadv.cli import main
from fastadv.data import Splits
from fastadv.files import point_link
from fastadv.trainers import CheckpointError, load_model
from fastadv.trainers.checkpoint import checkpoints_in, find_checkpoint, load_checkpoint
from fastadv.trainers.logs import read_records
from fastadv.trainers.sealed import read_sealed, sealed_json

pytestmark = pytest.mark.usefixtures("one_thread")
METHODS = ["standard", "pgd_at", "arrest"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stop_after", [2, 4, 5, 7])
def test_a_resumed_run_ends_bit_for_bit_where_it_would_have(
    method: str, stop_after: int, shared_runs: SharedRuns, tmp_path: Path
) -> None:
    # Two epochs of four steps; there are checkpoints after steps 3, 4, 6 and 8.
    whole = shared_runs.whole(method)
    with pytest.raises(Interruption):
        run(method, tmp_path / "cut", stop_after)
    torch.manual_seed(stop_after)
    resumed = run(method, tmp_path / "cut", resume=True)
    assert_same_end(whole, tmp_path / "cut")
    assert states_equal(load_model(whole).state_dict(), resumed.model.state_dict())

    logs = [read_records(folder / "metrics.jsonl") for folder in (whole, tmp_path / "cut")]
    untimed = [
        [{k: v for k, v in r.items() if "seconds" not in k and "per_second" not in k} for r in log]
        for log in logs
    ]
    assert untimed[0] == untimed[1]


def test_a_run_stopped_twice_and_resumed_from_an_older_checkpoint(
    shared_runs: SharedRuns, tmp_path: Path
) -> None:
    with pytest.raises(Interruption):
        run("pgd_at", tmp_path / "cut", 5)
    with pytest.raises(Interruption):
        run("pgd_at", tmp_path / "cut", 7, resume=True)
    names = [path.name for path in checkpoints_in(tmp_path / "cut" / "checkpoints")]
    assert names == ["step_000003", "step_000004", "step_000006"]
    run("pgd_at", tmp_path / "cut", resume="step_000003")
    assert_same_end(shared_runs.whole("pgd_at"), tmp_path / "cut")


def test_resuming_a_finished_run_does_nothing(tmp_path: Path) -> None:
    first = run("arrest", tmp_path)
    before = fingerprint(tmp_path / "checkpoints")
    again = run("arrest", tmp_path, resume=True)
    assert states_equal(first.model.state_dict(), again.model.state_dict())
    assert fingerprint(tmp_path / "checkpoints") == before
    assert again.record == {}


@pytest.mark.parametrize("left", ["step_000004", "step_000008", None])
def test_the_best_checkpoint_has_its_link_also_after_a_kill_before_the_link(
    left: str | None, tmp_path: Path
) -> None:
    best = run("pgd_at", tmp_path).best_checkpoint.name
    link = tmp_path / "checkpoints" / "best"
    link.unlink()
    if left is not None:
        point_link(link, left)
    with pytest.raises(
        Interruption
    ):  # an older checkpoint does not know which is the best of the run
        run("pgd_at", tmp_path, 7, resume="step_000006")
    assert link.is_symlink() == (left is not None)
    assert left is None or os.readlink(link) == left
    assert run("pgd_at", tmp_path, resume=True).best_checkpoint.name == best
    assert os.readlink(link) == best


def test_resuming_where_nothing_is_starts_a_run(tmp_path: Path) -> None:
    assert run("standard", tmp_path / "new", resume=True).progress.step == 8


def test_a_run_can_be_made_longer_on_request(tmp_path: Path) -> None:
    run("standard", tmp_path)
    with pytest.raises(ValueError, match="epochs: 2 -> 3"):
        run("standard", tmp_path, resume=True, changes={"epochs": 3})
    longer = run("standard", tmp_path, resume=True, allow_changes=True, changes={"epochs": 3})
    assert longer.progress.step == 12
    # From now on that is what the run is.
    assert run("standard", tmp_path, resume=True, changes={"epochs": 3}).progress.step == 12


@pytest.mark.parametrize(
    ("size", "begins_at", "steps"), [(8, 6, 9), (24, 2, 3), (36, 1, 2), (64, 0, 1)]
)
def test_a_run_goes_on_at_its_place_in_the_epoch_with_batches_of_another_size(
    size: int, begins_at: int, steps: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Interruption):
        run("standard", tmp_path, 4)  # the last checkpoint is after 3 batches of 16 images
    places: list[tuple[int, int]] = []
    run(
        "standard",
        tmp_path,
        resume=True,
        allow_changes=True,
        changes={"batch_size": size},
        on_step=lambda progress: places.append((progress.epoch, progress.epoch_step)),
        progress=True,
    )
    assert places == [(0, i) for i in range(begins_at + 1, steps + 1)] + [
        (1, i) for i in range(1, steps + 1)
    ]


@pytest.mark.parametrize(
    ("method", "first", "second", "told"),
    [
        ("standard", {}, {"optimizer": "adamw"}, "optimizer: sgd -> adamw"),
        ("standard", {"optimizer": "adamw"}, {}, "optimizer: adamw -> sgd"),
        ("standard", {}, {"norm_decay": False}, "norm_decay: True -> False"),
        ("free", {"steps": 2}, {"steps": 2, "batch_size": 24}, "batch_size: 16 -> 24"),
    ],
)
def test_changes_that_a_state_does_not_fit_are_named(
    method: str, first: dict[str, Any], second: dict[str, Any], told: str, tmp_path: Path
) -> None:
    with pytest.raises(Interruption):
        run(method, tmp_path, 4, changes=first)
    with pytest.raises(CheckpointError, match=rf"these changes: {told}.*Go on without them"):
        run(method, tmp_path, resume=True, allow_changes=True, changes=second)


@pytest.mark.parametrize("changes", [{"weight_decay": 0.3}, {"nesterov": True}])
def test_changed_numbers_of_the_optimizer_have_an_effect(
    changes: dict[str, Any], shared_runs: SharedRuns, tmp_path: Path
) -> None:
    """torch's optimisers take all their numbers from a state that they load."""
    with pytest.raises(Interruption):
        run("standard", tmp_path, 4)
    changed = run("standard", tmp_path, resume=True, allow_changes=True, changes=changes)
    whole = load_model(shared_runs.whole("standard"))
    assert not states_equal(changed.model.state_dict(), whole.state_dict())


def test_a_run_from_before_a_number_existed_goes_on(tmp_path: Path) -> None:
    run("pgd_at", tmp_path)
    file = tmp_path / "run.json"
    content = read_sealed(file)
    for name in ("norm", "attack_mode", "optimizer", "mixup"):
        del content["recipe"][name]
    file.write_text(sealed_json(content))
    assert run("pgd_at", tmp_path, resume=True).progress.step == 8
    with pytest.raises(ValueError, match="attack_mode: eval -> train"):
        run("pgd_at", tmp_path, resume=True, changes={"attack_mode": "train"})


def test_a_run_does_not_go_on_with_other_pixels_under_the_same_labels(tmp_path: Path) -> None:
    with pytest.raises(Interruption):
        run("standard", tmp_path, stop_after=5)
    data = small_data()
    images = data.train.images.clone()
    images[7, 0, 3, 3] ^= 1
    other = replace(data, train=replace(data.train, images=images))
    with pytest.raises(ValueError, match=r"holds another run .*data\.pixels: "):
        run("standard", tmp_path, resume=True, data=other)
    file = tmp_path / "run.json"
    content = read_sealed(file)
    del content["data"]["pixels"]  # as before they were recorded
    file.write_text(sealed_json(content))
    assert run("standard", tmp_path, resume=True).progress.step == 8


def test_an_existing_run_is_neither_touched_nor_taken_for_another(tmp_path: Path) -> None:
    run("standard", tmp_path)
    before = fingerprint(tmp_path)
    with pytest.raises(FileExistsError, match="already holds a run"):
        run("standard", tmp_path)
    with pytest.raises(ValueError, match=r"lr: 0.05 -> 0.1; seed: 3 -> 4"):
        run("standard", tmp_path, resume=True, changes={"lr": 0.1, "seed": 4})
    with pytest.raises(ValueError, match="method: standard -> pgd_at"):
        run("pgd_at", tmp_path, resume=True)
    data = small_data()
    other = Splits(data.train.select(torch.arange(71)), data.test)
    with pytest.raises(ValueError, match=r"data\.images: 72 -> 71"):
        run("standard", tmp_path, resume=True, data=other)
    with pytest.raises(ValueError, match=r"model\.name: small_cnn -> resnet18"):
        run("standard", tmp_path, resume=True, model="resnet18")
    with pytest.raises(ValueError, match="exclude each other"):
        run("standard", tmp_path, resume=True, overwrite=True)
    assert fingerprint(tmp_path) == before


def test_another_teacher_is_another_run(tmp_path: Path) -> None:
    run("arrest", tmp_path)
    with pytest.raises(ValueError, match=r"teachers\.teacher"):
        run("arrest", tmp_path, resume=True, teacher=make_model(2))


def test_overwriting_starts_again_and_spares_foreign_files(tmp_path: Path) -> None:
    run("arrest", tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    for network in ("", "natural.", "extractors_1+3."):
        for name in ("eval.json", "eval.sanity.json", "analyses/a.json"):
            (tmp_path / f"{network}{name}").parent.mkdir(exist_ok=True)
            (tmp_path / f"{network}{name}").write_text("of the old run")
    (tmp_path / "my.analyses").mkdir()
    result = run("standard", tmp_path, overwrite=True, changes={"epochs": 1})
    assert result.progress.step == 4
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "teacher.safetensors").exists()
    assert not [*tmp_path.glob("*eval*"), *tmp_path.glob("*l.analyses"), *tmp_path.glob("ext*")]
    assert (tmp_path / "my.analyses").is_dir()
    assert [r["epoch"] for r in read_records(tmp_path / "metrics.jsonl")] == [1, 1, 1]


@pytest.mark.parametrize(
    "place", ["best", "step_000002", "checkpoints", "checkpoints/latest", "checkpoints/mine"]
)
@pytest.mark.parametrize("resume", [True, False])
def test_no_run_begins_in_the_place_of_a_checkpoint(
    place: str, resume: bool, tmp_path: Path
) -> None:
    run("standard", tmp_path)
    before = fingerprint(tmp_path)
    with pytest.raises(ValueError, match=r"run_dir must be .* --resume --from_checkpoint"):
        run("standard", tmp_path / place, resume=resume)
    assert fingerprint(tmp_path) == before


def test_the_run_of_a_checkpoint_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("standard", tmp_path)
    for command in ("eval", "report"):
        for place in ("latest", "checkpoints/latest"):
            assert main([command, str(tmp_path / place)]) == 2
            assert f" in {tmp_path};" in capsys.readouterr().err


def test_a_run_may_be_inside_another_or_be_called_as_a_checkpoint(tmp_path: Path) -> None:
    for place in ("finetuned", "checkpoints/step_000002", "step_000001"):
        assert run("standard", tmp_path / place).progress.step > 0


def test_a_damaged_checkpoint_is_refused_with_the_last_good_one_offered(
    shared_runs: SharedRuns, tmp_path: Path
) -> None:
    with pytest.raises(Interruption):
        run("standard", tmp_path / "cut", 7)
    truncate(tmp_path / "cut" / "checkpoints" / "step_000006" / "model.safetensors")
    before = fingerprint(tmp_path / "cut")
    with pytest.raises(CheckpointError, match=r"step_000006/model\.safetensors.*step_000004"):
        run("standard", tmp_path / "cut", resume=True)
    assert fingerprint(tmp_path / "cut") == before
    run("standard", tmp_path / "cut", resume="step_000004")
    assert_same_end(shared_runs.whole("standard"), tmp_path / "cut")


@pytest.mark.parametrize("content", ["", "{}", '{"format": 2}', '{"format": 1}'])
def test_a_damaged_run_record_is_named(content: str, tmp_path: Path) -> None:
    run("standard", tmp_path)
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"run\.json"):
        run("standard", tmp_path, resume=True)


def test_a_log_cut_off_in_the_middle_of_a_line_is_mended(tmp_path: Path) -> None:
    with pytest.raises(Interruption):
        run("standard", tmp_path, 5)
    with open(tmp_path / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"kind": "step", "st')
    run("standard", tmp_path, resume=True)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == [2, 4, 4, 6, 8, 8]


CHILD = """
import sys, torch
torch.set_num_threads(int(sys.argv[3]))
from run_helpers import run
run("arrest", sys.argv[1], changes={"epochs": 500}, resume=sys.argv[2] == "resume")
"""


@pytest.mark.slow
@pytest.mark.processes
def test_a_killed_run_is_resumed_bit_for_bit(tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    command = ["-c", CHILD, str(folder)]
    threads = str(torch.get_num_threads())
    for attempt in ("start", "resume"):
        process = Started([*command, attempt, threads])
        last = find_step(folder)
        deadline = time.monotonic() + 120
        try:
            while find_step(folder) < last + 12 or not any(
                (folder / "checkpoints").glob(".writing-*")
            ):
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.001)
        finally:
            process.send_signal(signal.SIGKILL)
            process.communicate()
    # How far a run of 500 epochs would get depends on the machine: cut it where it is.
    epoch = load_checkpoint(find_checkpoint(folder)).meta["epoch"] + 1
    schedule = small_recipe("arrest", epochs=500).schedule
    shorter: dict[str, Any] = {"changes": {"epochs": epoch, "schedule": schedule}}
    run("arrest", folder, resume=True, allow_changes=True, **shorter)
    run("arrest", tmp_path / "whole", **shorter)
    assert_same_end(tmp_path / "whole", folder)
    assert states_equal(
        load_model(folder).state_dict(), load_model(tmp_path / "whole").state_dict()
    )


def find_step(folder: Path) -> int:
    """Step of the latest checkpoint; 0 when there is none."""
    try:
        return int(find_checkpoint(folder).name.removeprefix("step_"))
    except (CheckpointError, OSError, ValueError):
        return 0
