"""Checkpoints: whole or refused, and never lost to a kill."""

from __future__ import annotations

import hashlib
import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Started
from run_helpers import fingerprint
from safetensors.torch import load_file

from fastadv.trainers.checkpoint import (
    CheckpointError,
    checkpoints_in,
    find_checkpoint,
    load_checkpoint,
    newest_good,
    pack_weights,
    prune,
    remove_unfinished,
    save_checkpoint,
    unpack_average,
    unpack_weights,
)
from fastadv.trainers.sealed import sealed_json


def save(folder: Path, step: int) -> Path:
    weights = {"conv.weight": torch.full((4, 3, 3, 3), float(step)), "count": torch.tensor(step)}
    state = {"optimizers": {"model": {"momentum": torch.arange(3.0)}}, "progress": {"step": step}}
    return save_checkpoint(folder, step, weights, state, {"recipe": {"lr": 0.1}})


def write_meta(path: Path, meta: dict[str, Any]) -> None:
    """Write a checkpoint's meta data with the right hash."""
    content = {name: value for name, value in meta.items() if name != "sha256"}
    (path / "meta.json").write_text(sealed_json(content))


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    read = load_checkpoint(path)
    assert path.name == "step_000007"
    assert torch.equal(read.weights["conv.weight"], torch.full((4, 3, 3, 3), 7.0))
    assert read.weights["count"].item() == 7
    assert read.train_state["progress"] == {"step": 7}
    assert read.meta["recipe"] == {"lr": 0.1}
    assert read.meta["step"] == 7


def test_the_files_open_without_fastadv(tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    assert set(load_file(path / "model.safetensors")) == {"conv.weight", "count"}
    state = torch.load(path / "train_state.pt", weights_only=True)
    assert state["progress"] == {"step": 7}
    meta = json.loads((path / "meta.json").read_text())
    for name in ("model.safetensors", "train_state.pt"):
        digest = hashlib.sha256((path / name).read_bytes()).hexdigest()
        assert meta["files"][name]["sha256"] == digest


def test_channels_last_and_shared_tensors_are_saved_by_value(tmp_path: Path) -> None:
    images = torch.randn(2, 3, 4, 4)
    weights = {
        "last": images.contiguous(memory_format=torch.channels_last),
        "one": images,
        "same": images,
    }
    path = save_checkpoint(tmp_path, 1, weights, {}, {})
    read = load_checkpoint(path).weights
    assert all(torch.equal(read[name], images) for name in weights)


def test_latest_follows_the_newest_and_is_found_from_anywhere(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in (5, 10):
        newest = save(run / "checkpoints", step)
    for start in (run, run / "checkpoints", newest, run / "checkpoints" / "latest"):
        assert find_checkpoint(start) == newest.resolve()
    assert find_checkpoint(run, "step_000005").name == "step_000005"


def test_a_lost_or_dangling_link_is_no_loss(tmp_path: Path) -> None:
    newest = save(tmp_path, 5)
    (tmp_path / "latest").unlink()
    assert find_checkpoint(tmp_path) == newest
    (tmp_path / "latest").symlink_to("step_000099")
    assert find_checkpoint(tmp_path) == newest


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["model.safetensors", "train_state.pt"])
@pytest.mark.parametrize(
    ("damage", "reason"),
    [(truncate, "bytes instead of"), (flip_bit, "SHA-256"), (Path.unlink, "no such file")],
)
def test_damage_is_named_and_the_last_good_checkpoint_offered(
    tmp_path: Path, name: str, damage, reason: str
) -> None:
    good = save(tmp_path, 5)
    bad = save(tmp_path, 10)
    damage(bad / name)
    before = fingerprint(tmp_path)
    with pytest.raises(CheckpointError, match=reason) as caught:
        load_checkpoint(bad)
    assert str(bad / name) in str(caught.value)
    assert f"newest good checkpoint there is {good}" in str(caught.value)
    assert newest_good(tmp_path) == good
    assert fingerprint(tmp_path) == before


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "format must be 1 or 2"),
        ('{"format": true}', "format must be 1 or 2, .* got True"),
        ('{"format": 2}', "damaged or changed"),
        ('{"format": 1}', "no list of files"),
        ('{"format": 1, "files": {}}', "does not list"),
    ],
)
def test_a_foreign_meta_file_is_refused(tmp_path: Path, content: str, reason: str) -> None:
    path = save(tmp_path, 5)
    (path / "meta.json").write_text(content)
    with pytest.raises(CheckpointError, match=reason):
        load_checkpoint(path)


def test_foreign_directories_are_refused(tmp_path: Path) -> None:
    (tmp_path / "step_000001").mkdir()
    with pytest.raises(CheckpointError, match="not a fastadv checkpoint"):
        load_checkpoint(tmp_path / "step_000001")
    with pytest.raises(CheckpointError, match="no such checkpoint directory"):
        load_checkpoint(tmp_path / "step_000002")
    with pytest.raises(CheckpointError, match="no such file or directory"):
        find_checkpoint(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="there are none"):
        find_checkpoint(tmp_path / "empty")


def test_a_file_that_hashes_right_but_is_no_state_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 5)
    (path / "train_state.pt").write_bytes(b"not a torch file")
    meta = json.loads((path / "meta.json").read_text())
    meta["files"]["train_state.pt"] = {
        "bytes": 16,
        "sha256": hashlib.sha256(b"not a torch file").hexdigest(),
    }
    write_meta(path, meta)
    with pytest.raises(CheckpointError, match=r"train_state.pt: cannot be read"):
        load_checkpoint(path)


def test_a_failed_write_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 5)
    before = fingerprint(tmp_path)

    def full_disk(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 10)
    assert fingerprint(tmp_path) == before


def test_saving_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 5)
    path = save_checkpoint(tmp_path, 5, {"w": torch.ones(1)}, {}, {})
    assert set(load_checkpoint(path).weights) == {"w"}
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_kill_between_the_renames_of_one_step_loses_nothing(tmp_path: Path) -> None:
    """Found by stopping after each call of the system: the only checkpoint is then beside its name."""
    path = save(tmp_path, 5)
    path.rename(tmp_path / ".writing-step_000005.old")
    (tmp_path / ".writing-step_000005").mkdir()
    remove_unfinished(tmp_path)
    assert load_checkpoint(find_checkpoint(tmp_path)).meta["step"] == 5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_000005"]


def test_prune_keeps_the_newest_the_best_and_no_abandoned_course(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5, 9):
        save(tmp_path, step)
    prune(tmp_path, keep=2, step=5, best="step_000002")
    names = [path.name for path in checkpoints_in(tmp_path)]
    assert names == ["step_000002", "step_000004", "step_000005"]


def test_packing_keeps_state_dicts_apart() -> None:
    states = {"model": {"w": torch.ones(1)}, "ema": {"w": torch.zeros(1)}}
    packed = pack_weights(states)
    assert set(packed) == {"w", "ema/w"}
    assert unpack_weights(packed)["w"].item() == 1
    assert unpack_weights(packed, "ema")["w"].item() == 0
    assert unpack_average(packed)["w"].item() == 0
    partly = pack_weights(
        {"model": states["model"] | {"frozen": torch.ones(1)}, "swa": states["ema"]}
    )
    assert {name: value.item() for name, value in unpack_average(partly).items()} == {
        "w": 0,
        "frozen": 1,
    }
    with pytest.raises(ValueError, match="slash"):
        pack_weights({"model": {"a/b": torch.ones(1)}})


WRITER = """
import sys, torch
from pathlib import Path
from fastadv.trainers.checkpoint import save_checkpoint
folder = Path(sys.argv[1])
for step in range(1, 10**6):
    weights = {f"w{i}": torch.full((1000, 1000), float(step)) for i in range(4)}
    save_checkpoint(folder, step, weights, {"step": step}, {})
    print(step, flush=True)
"""


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("delay", [0.0, 0.004, 0.012, 0.03])
def test_a_kill_in_the_middle_of_a_write_loses_nothing_written_before(
    tmp_path: Path, delay: float
) -> None:
    process = Started(["-c", WRITER, str(tmp_path)])
    try:
        process.first_line()
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob(".writing-*")):  # a write is under way
            assert time.monotonic() < deadline
        time.sleep(delay)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = int(process.output().split()[-1])
    read = load_checkpoint(find_checkpoint(tmp_path))
    step = read.train_state["step"]
    assert step >= done
    assert all(bool((w == step).all()) for w in read.weights.values())
    for path in checkpoints_in(tmp_path):  # whatever has a checkpoint's name is one
        load_checkpoint(path)
    save(tmp_path, 10**6)
    assert not list(tmp_path.glob(".writing-*"))
