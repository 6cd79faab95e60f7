"""`fastadv eval --model NAME --weights FILE`: anybody's checkpoint is judged without a run."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attack_helpers import trained_small_cnn
from safetensors.torch import save_file
from torch import nn

from fastadv import evaluate
from fastadv.cli import main
from fastadv.commands.judged import recorded_accuracy
from fastadv.data import load_dataset
from fastadv.evaluation import load_results
from fastadv.models import Normalized, create_model, small_cnn

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
FEW = ("--data", "digits", "--max_examples", "60", "--device", "cpu", "--quiet")
ATTACKS = ("--attacks", "clean", "fgsm")


def judge(*words: str) -> int:
    return main(["eval", *words, *FEW, *ATTACKS])


def saved(path: Path, model: nn.Module, **beside: Any) -> str:
    torch.save({"state_dict": model.state_dict(), **beside}, path)
    return str(path)


def expected(model: nn.Module) -> list[int]:
    report = evaluate(
        model, load_dataset("digits").test, ("clean", "fgsm"), max_examples=60, progress=False
    )
    return [row.correct for row in report.rows]


def found(file: Path) -> list[int]:
    return [result.row.correct for result in load_results(file)]


def test_a_file_of_weights_is_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = trained_small_cnn(half=False)
    file = saved(tmp_path / "net.pth.tar", model, epoch=3, acc=97.0)
    assert judge("--model", "small_cnn", "--weights", file) == 0
    results = tmp_path / "net.pth.tar.eval.json"
    assert found(results) == expected(model)
    subject = load_results(results)[0].subject
    assert (subject.run, subject.network, subject.checkpoint) == (
        "net.pth",
        "small_cnn",
        "net.pth.tar",
    )
    assert "fgsm" in capsys.readouterr().out
    assert judge("--model", "small_cnn", "--weights", file, "--out", str(tmp_path / "o.json")) == 0
    assert found(tmp_path / "o.json") == found(results)


@pytest.mark.parametrize("name", ["ema", "swa", "natural"])
def test_the_weights_of_a_checkpoint_are_judged(name: str, tmp_path: Path) -> None:
    model, other = trained_small_cnn(half=False), small_cnn(10, 1)
    judged, beside = (other, model) if name == "natural" else (model, other)
    packed = {f"{name}/{key}": value for key, value in model.state_dict().items()}
    file = tmp_path / "model.safetensors"
    save_file({**other.state_dict(), **packed}, file)
    assert judge("--model", "small_cnn", "--weights", str(file)) == 0
    assert found(tmp_path / "model.safetensors.eval.json") == expected(judged) != expected(beside)


@pytest.mark.parametrize("words", [("0.3", "0.5"), ("0.30", "5e-1")])
def test_a_normalisation_is_given(tmp_path: Path, words: tuple[str, str]) -> None:
    inner = trained_small_cnn(half=False)
    file = saved(tmp_path / "net.pt", inner)
    assert judge("--model", "small_cnn", "--weights", file, "--normalise", *words) == 0
    assert found(tmp_path / "net.pt.eval.json") == expected(Normalized(inner, 0.3, 0.5))


def test_a_normalisation_in_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Normalized(trained_small_cnn(half=False), (0.3,), (0.5,))
    file = saved(tmp_path / "net.pt", model)
    assert judge("--model", "small_cnn", "--weights", file) == 0
    assert judge("--model", "small_cnn", "--weights", file, "--normalise", "0.3", "0.5") == 0
    assert found(tmp_path / "net.pt.eval.json") == expected(model)
    assert judge("--model", "small_cnn", "--weights", file, "--normalise", "0.3", "0.6") != 0
    assert "normalise must be left out or be what" in capsys.readouterr().err


def trained() -> nn.Module:
    """A function of somebody's own that returns a trained model."""
    return trained_small_cnn(half=False)


def test_a_function_returns_a_trained_model(tmp_path: Path) -> None:
    out = tmp_path / "own.json"
    assert judge("--model", f"{__name__}:trained", "--out", str(out)) == 0
    assert found(out) == expected(trained())


def test_images_of_an_npz_file(tmp_path: Path) -> None:
    test = load_dataset("digits").test
    images = test.images[:60].permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "some.npz", image=images, label=test.labels[:60].numpy())
    file = saved(tmp_path / "net.pt", trained_small_cnn(half=False))
    words = ["eval", "--model", "small_cnn", "--weights", file, "--quiet", "--device", "cpu"]
    assert main([*words, "--data", str(tmp_path / "some.npz"), *ATTACKS]) == 0
    result = load_results(tmp_path / "net.pt.eval.json")[0]
    assert result.subject.data == "some.npz" and found(tmp_path / "net.pt.eval.json") == expected(
        trained_small_cnn(half=False)
    )


def test_a_form_that_was_perhaps_not_meant_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = create_model("preact_resnet18", 10, 1)
    file = saved(tmp_path / "net.pt", model)
    words = ["eval", "--model", "preact_resnet18", "--weights", file, "--data", "digits"]
    with pytest.warns(UserWarning, match="guessing"):
        assert main([*words, "--max_examples", "60", "--attacks", "clean"]) == 0
    told = capsys.readouterr().err
    assert "also fit preact_resnet18_raw_shortcut, which computes something else" in told


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "run must be given, or model: fastadv eval RUN"),
        (("--weights", "FILE"), "run must be given, or model"),
        (("--model", "small_cnn"), "weights must be given with model 'small_cnn'"),
        (("--model", "timm:resnet18"), ""),
        (("--model", "smal_cnn", "--weights", "FILE"), "model: name must be one of"),
        (("--model", "resnet18", "--weights", "FILE"), "FILE"),
        (("--model", "small_cnn", "--weights", "absent.pt"), "absent.pt: no such file"),
        (
            ("--model", "small_cnn", "--weights", "FILE", "--normalise", "0.1,0.2", "1"),
            "normalise must have one number or 1",
        ),
        (
            ("--model", "small_cnn", "--weights", "FILE", "--normalise", "a", "1"),
            "normalise must be numbers with commas, got 'a'",
        ),
        (
            ("--model", "small_cnn", "--weights", "FILE", "--normalise", "0", "0"),
            "normalise must have a standard deviation > 0",
        ),
        (
            ("--model", "small_cnn", "--weights", "FILE", "--checkpoint", "best"),
            "checkpoint must come with a run",
        ),
        (("RUN", "--weights", "FILE"), "weights must be left out with a run"),
    ],
)
def test_what_does_not_fit_is_named(
    words: tuple[str, ...],
    told: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = saved(tmp_path / "net.pt", small_cnn(10, 1))
    spelled = [file if word == "FILE" else word for word in words]
    assert judge(*spelled) != 0
    error = capsys.readouterr().err
    assert told.replace("FILE", file) in error and "Traceback" not in error


def test_data_must_be_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = saved(tmp_path / "net.pt", small_cnn(10, 1))
    assert main(["eval", "--model", "small_cnn", "--weights", file]) != 0
    assert "data must be given without a run: digits, cifar10" in capsys.readouterr().err


def test_the_first_line_is_the_clean_accuracy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = saved(tmp_path / "net.pt", trained_small_cnn(half=False))
    words = ["eval", "--model", "small_cnn", "--weights", file, "--data", "digits"]
    assert main([*words, "--max_examples", "60", "--attacks", "fgsm"]) == 0
    share = 100 * expected(trained_small_cnn(half=False))[0] / 60
    assert capsys.readouterr().err.startswith(f"right on {share:.2f} % of 60 clean images")


def test_a_model_that_guesses_or_is_another_one_is_told() -> None:
    test, options = load_dataset("digits").test, {"max_examples": 100, "progress": False}
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="about as many as by guessing among 10 classes; is it"):
        evaluate(small_cnn(10, 1), test, "clean", **options)
    model = trained_small_cnn(half=False)
    with pytest.warns(UserWarning, match="while 50.00 % are recorded for this model"):
        evaluate(model, test, "clean", expected=0.5, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        share = evaluate(model, test, "clean", **options)["clean"].correct / 100
        evaluate(model, test, "clean", expected=share, **options)
        evaluate(small_cnn(10, 1), test, "clean", max_examples=20, progress=False)
    with pytest.raises(ValueError, match=r"expected must lie in 0..1, got 97"):
        evaluate(model, test, "clean", expected=97, **options)


@pytest.mark.parametrize(
    ("beside", "accuracy"),
    [
        ({"acc": 94.5}, 0.945),
        ({"best_acc": 0.5, "acc": 99}, 0.5),
        ({"epoch": 90, "loss": 0.3}, None),
        ({"acc": True}, None),
        ({"acc": 0}, None),
        ({"Test_Acc": 12.5}, 0.125),
    ],
)
def test_the_accuracy_that_a_file_records(beside: dict[str, Any], accuracy: float | None) -> None:
    assert recorded_accuracy({"state_dict": {}, **beside}) == accuracy
    assert recorded_accuracy([beside]) is None
