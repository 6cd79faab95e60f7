"""safetensors files that fastadv writes refuse damage, wherever they lie; files of others are read as they are."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import torch
from command_helpers import train_quickly
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from training_helpers import make_model

from fastadv.models import StateFileError, load_published_state_dict, read_state_file
from fastadv.models.sealed_safetensors import check_seal, sealed_safetensors
from fastadv.trainers import load_teacher
from fastadv.trainers.checkpoint import CheckpointError

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3, dtype=torch.float16)}


def flipped(content: bytes, place: int, bit: int) -> bytes:
    damaged = bytearray(content)
    damaged[place] ^= 1 << bit
    return bytes(damaged)


def test_any_flipped_bit_is_refused_or_changes_nothing(tmp_path: Path) -> None:
    content = sealed_safetensors(TENSORS, {"format": "pt", "form": "resnet18"})
    file = tmp_path / "weights.safetensors"
    file.write_bytes(content)
    whole = read_state_file(file)
    assert all(torch.equal(whole[name], value) for name, value in TENSORS.items())
    refused = 0
    for place in range(len(content)):
        file.write_bytes(flipped(content, place, place % 8))
        try:
            found = read_state_file(file)
        except StateFileError as error:
            assert "weights.safetensors" in str(error)
            refused += 1
        else:  # the name of the entry with the hash
            assert found.keys() == whole.keys()
            assert all(torch.equal(found[name], whole[name]) for name in whole)
    assert refused > 0.9 * len(content)


def test_a_sealed_file_is_an_ordinary_one_for_others(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    file.write_bytes(sealed_safetensors(TENSORS, {"form": "resnet18"}))
    check_seal(file)
    loaded = load_file(file)
    assert all(torch.equal(loaded[name], value) for name, value in TENSORS.items())
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["form"] == "resnet18"
    save_file(TENSORS, tmp_path / "of_others.safetensors")
    check_seal(tmp_path / "of_others.safetensors")


def test_the_weights_of_a_run_are_refused_where_a_bit_has_flipped(tmp_path: Path) -> None:
    assert (
        train_quickly(
            "standard", tmp_path / "teacher", "--train_images", "32", "--batch_size", "32"
        )
        == 0
    )
    words = ["--train_images", "32", "--batch_size", "32", "--teacher", str(tmp_path / "teacher")]
    assert train_quickly("arrest", tmp_path / "run", *words) == 0
    random.seed(0)
    kept = tmp_path / "run" / "teacher.safetensors"
    checkpoint = next((tmp_path / "run" / "checkpoints").glob("step_*")) / "model.safetensors"
    for file in (kept, checkpoint):
        copy = tmp_path / "elsewhere.safetensors"
        shutil.copy(file, copy)
        model = make_model()
        state = load_file(copy)
        model = type(model)(state["linear.bias"].numel(), state["conv1.weight"].shape[1])
        load_teacher(copy, model)
        content = copy.read_bytes()
        copy.write_bytes(flipped(content, random.randrange(len(content) // 2, len(content)), 6))
        with pytest.raises(CheckpointError, match=r"elsewhere\.safetensors.*damaged"):
            load_teacher(copy, model)


def test_of_copies_in_two_precisions_the_wider_one_is_loaded(tmp_path: Path) -> None:
    model, other = make_model(0), make_model(1)
    state = model.state_dict()
    half = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    for saved in ({"ema": half, "model": state}, {"model": state, "ema": half}):
        load_published_state_dict(other, saved)
        assert torch.equal(other.state_dict()["linear.weight"], state["linear.weight"])


def test_a_negative_variance_is_refused() -> None:
    model = make_model(0)
    state = dict(model.state_dict())
    state["bn1.running_var"] = -state["bn1.running_var"]
    with pytest.raises(ValueError, match=r"variances >= 0, got -.* in 'bn1.running_var'"):
        load_published_state_dict(model, state)
