"""Normalisations of inputs at which a file hints without holding them."""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_helpers import make_model

from fastadv.cli import main
from fastadv.evaluation import evaluate
from fastadv.models import Normalized, load_published_state_dict, small_cnn
from fastadv.trainers import load_teacher

MEAN, STD = [0.4], [0.2]


def written(folder: Path, new: bool = True, prefix: str = "", **beside: Any) -> Path:
    state = {prefix + name: value for name, value in make_model(1).state_dict().items()}
    torch.save({"state_dict": state, **beside}, folder / "a.pt", _use_new_zipfile_serialization=new)
    return folder / "a.pt"


HINTS: dict[str, dict[str, Any]] = {
    "options of Lightning": {"hyper_parameters": {"lr": 0.1, "mean": MEAN, "std": STD}},
    "options of a script": {"args": argparse.Namespace(mean=tuple(MEAN), std=tuple(STD))},
    "a dict of its own": {"normalize": {"mean": torch.tensor(MEAN), "std": torch.tensor(STD)}},
    "deeper": {"cfg": {"data": {"img_mean": np.array(MEAN), "img_std": np.array(STD)}}},
    "another name": {"data_mean": MEAN, "data_std": STD},
}


@pytest.mark.parametrize("name", HINTS)
def test_constants_that_are_not_applied_are_told(name: str, tmp_path: Path) -> None:
    file = written(tmp_path, **HINTS[name])
    words = r"state.* has a mean \[0\.4\] and a std \[0\.2\], which are not applied.*--normalise"
    with pytest.warns(UserWarning, match=words):
        load_published_state_dict(make_model(2), file)
    with pytest.warns(UserWarning, match=words):
        assert not isinstance(load_teacher(file, make_model(2)), Normalized)


def test_a_module_before_the_network_is_told(tmp_path: Path) -> None:
    file = written(tmp_path, prefix="module.1.")
    with pytest.warns(UserWarning, match=r"begin with 'module\.1\.': before the network stood"):
        load_published_state_dict(make_model(2), file)


@pytest.mark.parametrize(
    ("prefix", "beside"),
    [
        ("0.", {}),
        ("1.", {"mean": MEAN, "std": STD}),
        ("", {"args": {"mean": None, "std": 0.1}, "scores": {"mean": [90.1, 50.2], "std": [1, 2]}}),
        ("", {"args": {"mean": [0, 0, 0], "std": [1, 1, 1]}}),
        ("layer10.", {}),
    ],
)
def test_nothing_is_told_without_a_hint(
    prefix: str, beside: dict[str, Any], tmp_path: Path
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_published_state_dict(
            Normalized(make_model(2)), written(tmp_path, prefix=prefix, **beside)
        )


@pytest.mark.parametrize("name", HINTS)
def test_nothing_is_told_to_who_normalises(name: str, tmp_path: Path) -> None:
    target = Normalized(make_model(2), MEAN, STD)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_published_state_dict(target, written(tmp_path, **HINTS[name]))
    assert float(target.mean) == pytest.approx(0.4)


def test_weights_in_arrays_are_named(tmp_path: Path) -> None:
    arrays = {name: value.numpy() for name, value in make_model(1).state_dict().items()}
    torch.save(arrays, tmp_path / "a.pt")
    with pytest.raises(TypeError, match=r"of which 'conv1.weight' is an array of numpy's"):
        load_published_state_dict(make_model(2), tmp_path / "a.pt")


def accuracies(model: torch.nn.Module, **options: Any) -> Any:
    data = (torch.rand(8, 1, 8, 8), torch.arange(8) % 4)
    return evaluate(model, data, ["clean", "pgd-2", "square-5"], progress=False, **options)


@pytest.mark.filterwarnings("ignore:state", "ignore:the model is right on")
def test_figures_without_a_normalisation_at_which_a_file_hints_are_suspect(tmp_path: Path) -> None:
    file, model = written(tmp_path, args={"mean": MEAN, "std": STD}), make_model(2)
    load_published_state_dict(model, file)
    for doubted in (model, Normalized(model)):
        for row in accuracies(doubted).rows:
            assert row.status == "suspect"
            assert "the network may lack the normalisation of its training: state" in str(row.notes)
    assert {row.status for row in accuracies(Normalized(model, MEAN, STD)).rows} == {"ok"}
    rows = accuracies(make_model(3), surrogate=model).rows
    assert [row.status for row in rows] == ["ok", "suspect", "suspect"]
    assert "the surrogate: the network may lack" in str(rows[1].notes)
    load_published_state_dict(model, written(tmp_path))  # now a file that hints at nothing
    assert {row.status for row in accuracies(model).rows} == {"ok"}


@pytest.mark.filterwarnings("ignore:state", "ignore:.*the model is right on")
@pytest.mark.parametrize(
    ("words", "status"),
    [([], "suspect"), (["--normalise", "0.4", "0.2"], "ok"), (["--normalise", "0", "1"], "ok")],
)
def test_eval_marks_them_until_the_normalisation_is_named(
    words: list[str], status: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = {"state_dict": small_cnn(10, 1).state_dict(), "args": {"mean": MEAN, "std": STD}}
    torch.save(state, tmp_path / "a.pt")
    common = ["--model", "small_cnn", "--weights", str(tmp_path / "a.pt"), "--data", "digits"]
    common += ["--attacks", "clean", "fgsm", "--max_examples", "8", "--quiet", "--json"]
    assert main(["eval", *common, *words]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["status"] for row in rows] == [status, status]
