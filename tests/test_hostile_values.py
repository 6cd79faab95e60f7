"""Files whose content is whole but means nothing, and arguments of another kind: each is named."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training_helpers import small_recipe

from fastadv.cli import main
from fastadv.data import load_dataset
from fastadv.evaluation import load_results
from fastadv.files import write_atomically
from fastadv.models import load_published_state_dict, small_cnn
from fastadv.trainers import load_teacher, train

pytestmark = pytest.mark.usefixtures("one_thread")


def spoiled(change: Any) -> dict[str, Tensor]:
    state = small_cnn(10, 1).state_dict()
    name = next(iter(state))
    state[name] = change(state[name])
    return state


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_no_numbers_are_refused(value: float, tmp_path: Path) -> None:
    state = spoiled(lambda weight: weight.index_fill(0, torch.tensor([0]), value))
    with pytest.raises(ValueError, match="state must hold finite numbers, got NaN or infinity in"):
        load_published_state_dict(small_cnn(10, 1), state)
    torch.save(state, tmp_path / "teacher.pt")
    with pytest.raises(ValueError, match=r"teacher\.pt: state must hold finite numbers"):
        load_teacher(tmp_path / "teacher.pt", small_cnn(10, 1))


def test_whole_numbers_of_a_quantised_model_are_no_weights() -> None:
    state = spoiled(lambda weight: (100 * weight).to(torch.int8))
    with pytest.raises(
        ValueError, match=r"1 mismatched: .*: torch.int8 in the file, torch.float32 in the model"
    ):
        load_published_state_dict(small_cnn(10, 1), state)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda weight: weight.to("meta"), "got one on the device 'meta' in 'conv1.weight'"),
        (lambda weight: weight.to_sparse(), "got one of layout torch.sparse_coo in 'conv1.weight'"),
        (lambda weight: torch.nested.nested_tensor([weight]), "got a nested one in 'conv1.weight'"),
    ],
)
def test_weights_without_values_of_their_own_are_refused(
    change: Any, words: str, tmp_path: Path
) -> None:
    state = spoiled(change)
    for given in (state, {"model": state, "ema": small_cnn(10, 1).state_dict()}):
        with pytest.raises(ValueError, match=f"state must hold dense tensors with values, {words}"):
            load_published_state_dict(small_cnn(10, 1), given)
    torch.save(state, tmp_path / "teacher.pt")
    with pytest.raises(ValueError, match=rf"teacher\.pt: state must hold dense tensors .*{words}"):
        load_teacher(tmp_path / "teacher.pt", small_cnn(10, 1))


def test_numbers_that_need_a_scale_are_no_weights() -> None:
    state = spoiled(lambda weight: weight.to(torch.float8_e4m3fn))
    with pytest.raises(
        ValueError,
        match=r"1 mismatched: .*: torch.float8_e4m3fn in the file, torch.float32",
    ):
        load_published_state_dict(small_cnn(10, 1), state)


def written(path: Path, **change: Any) -> Path:
    row = {
        "name": "clean", "n": 10, "correct": 9, "eps": 0.0, "seed": 0, "seconds": 1.0,
        "alpha": None, "steps": None,
        "status": "ok", "notes": [], "stages": [], "search": "", "run": "r", "method": "m",
        "network": "n",
        "checkpoint": "c", "weights": "w", "data": "d", "images": "i", "norm": "linf", "bounds": [0, 1],
        "batch_size": 10, "device": "cpu", "versions": {}, "after": [],
    }  # fmt: skip
    path.write_text(json.dumps({"format": 2, "rows": [row | change]}))
    return path


@pytest.mark.parametrize(
    "change", [{"eps": float("nan")}, {"eps": "8/255"}, {"n": "10"}, {"status": 3}, {"eps": -1}]
)
def test_results_that_mean_nothing_are_refused(
    change: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = next(iter(change))
    file = written(tmp_path / "eval.json", **change)
    with pytest.raises(ValueError, match=f"eval.json.*{name} must"):
        load_results(file)
    assert main(["report", str(file)]) != 0
    error = capsys.readouterr().err
    assert str(file) in error and "Traceback" not in error


def test_results_nested_without_end_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "eval.json"
    file.write_text("[" * 200_000)
    with pytest.raises(ValueError, match=r"eval\.json: it is not valid JSON"):
        load_results(file)


def test_a_link_stays_and_its_file_is_renewed(tmp_path: Path) -> None:
    real, link = tmp_path / "shared" / "eval.json", tmp_path / "eval.json"
    real.parent.mkdir()
    real.write_text("old")
    os.symlink(real, link)
    write_atomically(link, "new")
    assert link.is_symlink() and real.read_text() == "new"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": (torch.zeros(4, 1, 8, 8), torch.zeros(4))}, "data must be Splits"),
        ({"data": load_dataset("digits").test}, "data must be Splits"),
        ({"model": small_cnn}, "model must be a module or a name, got function; call it"),
        ({"run_dir": None}, "run_dir must be the path of a directory, got None"),
        ({"extra": torch.zeros(4, 1, 8, 8)}, "extra must be ImageData, got Tensor"),
        ({"settings": {"tensorboard": True}}, r"settings must be Settings\(...\), got dict"),
        ({"on_step": "print"}, "on_step must be a function, got 'print'"),
        ({"on_start": 3}, "on_start must be a function, got 3"),
    ],
)
def test_an_argument_of_another_kind_is_named(
    change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    good = {"data": "digits", "model": "small_cnn", "run_dir": tmp_path / "run"}
    with pytest.raises(TypeError, match=words):
        train("pgd_at", small_recipe("pgd_at"), progress=False, **(good | change))
    assert not (tmp_path / "run").exists()
