"""The natural model of an ACT or LBGAT run: loaded, judged, and kept apart from the robust one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_helpers import train_quickly
from torch import nn
from training_helpers import make_model, small_data, small_recipe, states_equal

from fastadv.cli import main
from fastadv.digest import digest_of
from fastadv.evaluation import load_results
from fastadv.models import SmallCNN, create_model
from fastadv.trainers import load_model, train
from fastadv.trainers.checkpoint import find_checkpoint, load_checkpoint, unpack_weights

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


def act_run(folder: Path, name: str = "act", **changes: Any) -> dict[str, torch.Tensor]:
    """Train, and return the weights of the natural network."""
    train(
        name,
        small_recipe(name, epochs=1, ema_decay=0.9, **changes),
        data=small_data(32, 8),
        model="small_cnn",
        run_dir=folder,
        progress=False,
        device="cpu",
    )
    return unpack_weights(load_checkpoint(find_checkpoint(folder)).weights, "natural")


@pytest.mark.parametrize("natural", [None, "resnet18_layer2_stride1", "small-cnn"])
def test_the_natural_network_is_loaded(natural: str | None, tmp_path: Path) -> None:
    weights = act_run(tmp_path / "run", "lbgat", natural=natural)
    found: Any = load_model(tmp_path / "run", network="natural")
    assert states_equal(found.state_dict(), weights) and not found.training
    assert isinstance(load_model(tmp_path / "run"), SmallCNN)
    assert getattr(found, "layer2_stride", None) == (
        1 if natural and "stride1" in natural else None
    )
    filled: nn.Module = create_model(natural or "small_cnn", 4, 1)
    load_model(tmp_path / "run", filled, network="natural")
    assert states_equal(filled.state_dict(), weights)
    if natural == "resnet18_layer2_stride1":
        with pytest.raises(ValueError, match="model must be 'resnet18_layer2_stride1'"):
            load_model(tmp_path / "run", create_model("resnet18", 4, 1), network="natural")


def test_a_network_that_is_not_there_is_told(tmp_path: Path) -> None:
    act_run(tmp_path / "run")
    with pytest.raises(
        ValueError, match=r"network must be one of model, natural, which .* got 'ema'"
    ):
        load_model(tmp_path / "run", network="ema")
    train(
        "standard",
        small_recipe("standard", epochs=1),
        data=small_data(32, 8),
        model=make_model(0),
        run_dir=tmp_path / "other",
        progress=False,
        device="cpu",
    )
    with pytest.raises(ValueError, match=r"network must be one of model, which .* got 'natural'"):
        load_model(tmp_path / "other", network="natural")


def test_both_networks_are_judged_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    options = ["--natural", "wrn_10_1", "--train_images", "64", "--batch-size", "32", "--quiet"]
    assert train_quickly("act", run, *options) == 0
    words = ["--attacks", "clean", "fgsm", "--max-examples", "40", "--quiet", "--device", "cpu"]
    assert main(["eval", str(run), *words]) == 0
    assert main(["eval", str(run), *words, "--network", "natural"]) == 0
    robust, natural = (load_results(run / name) for name in ("eval.json", "natural.eval.json"))
    assert len(robust) == len(natural) == 2
    state = load_model(run, network="natural").state_dict()
    subject = natural[0].subject
    assert subject.weights == digest_of(state) != robust[0].subject.weights
    assert (subject.run, subject.method, subject.network) == (
        "run natural",
        "act natural",
        "wrn_10_1",
    )
    assert (robust[0].subject.method, robust[0].subject.network) == ("act", "small_cnn")
    assert subject.checkpoint == robust[0].subject.checkpoint

    capsys.readouterr()
    files = [str(run), str(run / "natural.eval.json")]
    assert main(["report", *files]) == 0
    table = capsys.readouterr().out
    assert "act natural" in table and "natural.eval.json" in table
    assert main(["report", *files, "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["results"]
    assert [entry["method"] for entry in listed] == ["act", "act", "act natural", "act natural"]
    # The run alone stands for both, its file of results for the robust network.
    for words, lines in (([str(run)], 2), ([str(run / "eval.json")], 1)):
        assert main(["report", *words]) == 0
        assert len(capsys.readouterr().out.strip().splitlines()) == 1 + lines
    (run / "eval.json").unlink()
    assert main(["report", str(run)]) == 0
    assert "run/natural.eval.json" in capsys.readouterr().out


def test_refusals_of_the_command_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["eval", "--model", "small_cnn", "--weights", "x.pt", "--data", "digits"]
    assert main([*words, "--network", "natural"]) == 2
    assert "network must come with a run, got 'natural'" in capfd.readouterr().err
    act_run(tmp_path / "run")
    assert main(["eval", str(tmp_path / "run"), "--data", "digits", "--network", "x"]) == 2
    assert "network must be one of model, natural" in capfd.readouterr().err
