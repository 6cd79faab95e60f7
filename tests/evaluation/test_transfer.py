"""Adversarial images made on one model and judged by another: one row, and the matrix of several models."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from attack_helpers import digits_test, randomise, trained_small_cnn
from linear_model import LinearModel, linear_problem
from torch import Tensor, nn

from fastadv.evaluation import (
    Report,
    Subject,
    Surrogate,
    TransferMatrix,
    add_results,
    evaluate,
    load_results,
    masking_checks,
    transfer_matrix,
)
from fastadv.evaluation.results import results_of
from fastadv.models import small_cnn

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
QUIET: dict[str, Any] = {"progress": False}
EPS = 0.12


def noisy_copy(size: float = 0.05, seed: int = 0) -> nn.Module:
    """The trained network with weights that are somewhat off, so that its gradients are others."""
    model = trained_small_cnn()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return model


def test_images_are_made_on_the_surrogate_and_judged_by_the_model() -> None:
    model, (x, y) = trained_small_cnn(), digits_test(64)
    other, seen, judged = noisy_copy(), [], []

    def surrogate(images: Tensor) -> Tensor:
        seen.append(images.requires_grad)
        return other(images)

    def watched(images: Tensor) -> Tensor:
        judged.append((images.detach().clone(), images.requires_grad))
        return model(images)

    row = evaluate(watched, (x, y), "fgsm", eps=EPS, surrogate=surrogate, **QUIET).rows[0]
    assert any(seen) and not any(grad for _, grad in judged), "gradients are the surrogate's"
    right = model(x).argmax(1) == y
    start = x[right].clone().requires_grad_()
    (grad,) = torch.autograd.grad(
        nn.functional.cross_entropy(other(start), y[right], reduction="sum"), start
    )
    adv = (x[right] + EPS * grad.sign()).clamp(0, 1)
    torch.testing.assert_close(judged[-1][0], adv)
    assert row.correct == int((model(adv).argmax(1) == y[right]).sum())
    assert row.surrogate == "function" and row.n == 64


NAMES = ["clean", "fgsm", "pgd-5", "pgd-5-2", "pgd-3-2runs", "cw-5", "mim-5", "apgd-ce-5"]
NAMES += ["fab-t-5", "square-40", "cwl2-30", "min-fgsm"]


def test_every_attack_transfers_and_is_weaker_than_the_white_box() -> None:
    model, data = trained_small_cnn(), digits_test(48)
    settings: dict[str, Any] = dict(eps=EPS, cw_c=1.0, cw_lr=0.05, **QUIET)
    white = evaluate(model, data, NAMES, **settings)
    black = evaluate(model, data, NAMES, surrogate=Surrogate(noisy_copy(), "n"), **settings)
    assert [row.surrogate for row in black.rows] == ["", *["n"] * (len(NAMES) - 1)]
    assert white["clean"].correct == black["clean"].correct
    for name in NAMES[1:-1]:
        assert white[name].correct <= black[name].correct <= white["clean"].correct, name
        if name != "fab-t-5":  # whose images lie at the boundary of the surrogate
            assert black[name].correct < white["clean"].correct, name
    near, far = white["min-fgsm"].distances, black["min-fgsm"].distances
    assert near and far and near.curve[0][1] <= far.curve[0][1]
    assert "pgd-5 from n" in black.table() and Report.from_dict(black.to_dict()) == black


def test_autoattack_transfers_between_equals_and_hardly_to_others() -> None:
    """It stops at the first point that breaks its image, which another network may still get right."""
    model, data = trained_small_cnn(), digits_test(12)
    settings: dict[str, Any] = dict(
        eps=0.3, **QUIET
    )  # so large that Auto-PGD breaks every image at once
    same = evaluate(model, data, "autoattack", surrogate=trained_small_cnn(), **settings).rows[0]
    assert same.correct == 0 and same.stages == () and same.search != ""
    assert "stops where the surrogate is fooled" in same.notes[-1]
    models = {"m": model, "other": noisy_copy()}
    matrix = transfer_matrix(models, data, "autoattack", **settings)
    assert matrix.correct[0][0] == matrix.correct[1][1] == 0 < matrix.correct[1][0]
    pgd = transfer_matrix(models, data, "pgd-20", **settings)
    assert pgd.correct[1][0] < matrix.correct[1][0]


def test_callables_get_the_surrogate_and_only_what_the_model_has_right() -> None:
    model, x, y = linear_problem(classes=4, n=40, wrong=10)
    other = LinearModel(-model.linear.weight.detach()).eval()
    got: list[tuple[Any, int]] = []

    def attack(attacked: Any, images: Tensor, labels: Tensor) -> Tensor:
        got.append((attacked, len(images)))
        return images

    row = evaluate(model, (x, y), [("mine", attack)], surrogate=other, **QUIET)["mine"]
    assert got == [(other, 30)] and row.correct == 30


def test_a_transfer_result_never_replaces_a_white_box_one(tmp_path: Path) -> None:
    model, data = trained_small_cnn(), digits_test(16)
    subject, file = Subject(run="a"), tmp_path / "r.json"
    surrogates = (None, Surrogate(noisy_copy(), "one"), Surrogate(noisy_copy(), "two"))
    for _ in range(2):
        for surrogate in surrogates:
            names = ["clean", "fgsm"]
            report = evaluate(model, data, names, eps=EPS, surrogate=surrogate, **QUIET)
            add_results(file, results_of(report, subject))
    found = [(r.row.name, r.row.surrogate) for r in load_results(file)]
    assert found == [("clean", ""), ("fgsm", ""), ("fgsm", "one"), ("fgsm", "two")]


def test_surrogates_are_checked_and_left_as_they_were() -> None:
    model, data = trained_small_cnn(), digits_test(8)
    other = randomise(small_cnn(num_classes=7)).train()
    with pytest.raises(ValueError, match="surrogate must have the model's 10 classes, got 7"):
        evaluate(model, data, "fgsm", surrogate=other, **QUIET)
    assert all(module.training for module in other.modules())
    assert all(parameter.requires_grad for parameter in other.parameters())
    with pytest.raises(TypeError, match="surrogate must be a model, got str"):
        evaluate(model, data, "fgsm", surrogate="resnet18", **QUIET)  # type: ignore[arg-type]


@pytest.mark.parametrize("attack", ["pgd-4", "pgd-4-3", "apgd-ce-4"])
def test_the_matrix_holds_what_evaluate_finds(attack: str) -> None:
    models = {"a": trained_small_cnn(), "b": noisy_copy(), "c": noisy_copy(seed=1)}
    data = digits_test(40)
    matrix = transfer_matrix(models, data, attack, eps=EPS, batch_size=16, seed=2, **QUIET)
    assert matrix.names == ("a", "b", "c") and matrix.n == 40
    for target, model in models.items():
        clean = evaluate(model, data, "clean", **QUIET).rows[0].correct
        assert matrix.clean[matrix.names.index(target)] == clean
        for source, other in models.items():
            surrogate = None if source == target else other
            row = evaluate(model, data, attack, eps=EPS, seed=2, surrogate=surrogate, **QUIET)
            assert matrix.accuracy(source, target) == row.rows[0].accuracy, (source, target)
    for i in range(3):
        assert matrix.correct[i][i] == min(row[i] for row in matrix.correct)


def test_a_matrix_is_written_and_read(tmp_path: Path) -> None:
    matrix = TransferMatrix(
        "pgd-20", ("a", "b|c"), ((10, 70), (60, 20)), (90, 95), 100, 8 / 255, "linf", (0.0, 1.0), 0
    )
    assert TransferMatrix.load(matrix.save(tmp_path / "m.json")) == matrix
    rows = list(csv.DictReader(matrix.save(tmp_path / "m.csv").open()))
    assert len(rows) == 6 and float(rows[3]["accuracy"]) == 0.7 and rows[3]["target"] == "b|c"
    assert rows[0]["attack"] == "clean" and float(rows[0]["low"]) < 0.9 < float(rows[0]["high"])
    assert r"b\|c" in matrix.save(tmp_path / "m.md").read_text()
    lines = matrix.table().splitlines()
    assert lines[0].startswith("100 images, pgd-20 at 8/255 linf")
    assert lines[-2].split() == ["a", "10.00", "70.00"] and str(matrix) == matrix.table()
    with pytest.raises(ValueError, match="out must end in one of"):
        matrix.save(tmp_path / "m.txt")
    with pytest.raises(KeyError, match="no model 'c', there are a"):
        matrix.accuracy("c", "a")
    (tmp_path / "m.json").write_text("[]")
    with pytest.raises(ValueError, match=r"m.json: a transfer matrix must have format"):
        TransferMatrix.load(tmp_path / "m.json")


@pytest.mark.parametrize("attack", ["clean", "min-fgsm", "cwl2-5", "quick", "pgd-5-2runs"])
def test_a_matrix_is_of_one_attack_in_a_ball(attack: str) -> None:
    model, x, y = linear_problem(classes=4, n=8)
    with pytest.raises(ValueError, match=f"attack must be one attack in a ball.*{attack}"):
        transfer_matrix({"a": model, "b": model}, (x, y), attack, **QUIET)
    with pytest.raises(ValueError, match="models must be two or more"):
        transfer_matrix({"a": model}, (x, y), **QUIET)
    with pytest.raises(TypeError, match="attack must be a name or a pair"):
        transfer_matrix({"a": model, "b": model}, (x, y), 20, **QUIET)  # type: ignore[arg-type]
    fewer, _, _ = linear_problem(classes=5, n=1)
    with pytest.raises(ValueError, match="got 4 of a and 5 of b"):
        transfer_matrix({"a": model, "b": fewer}, (x, y), **QUIET)


def test_a_model_of_the_matrix_that_refuses_the_images_is_named() -> None:
    model, data = trained_small_cnn(), digits_test(8)
    models: dict[str, nn.Module] = {
        "a": model,
        "b": nn.Sequential(nn.Flatten(), nn.Linear(256, 10)),
    }
    with pytest.raises(RuntimeError, match=r"model b, on images of 1x8x8: mat1 and mat2 shapes"):
        transfer_matrix(models, data, "pgd-2", **QUIET)
    models["b"] = small_cnn(num_classes=5)
    with pytest.raises(ValueError, match=r"model b, on images of 1x8x8: labels must be below .* 5"):
        transfer_matrix(models, data, "pgd-2", **QUIET)


def test_a_model_of_an_evaluation_that_refuses_the_images_is_named() -> None:
    class OfFixedSize(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert x.shape[-1] == 32, "height of 32 needed"
            return x.flatten(1)

    data, good = digits_test(8), trained_small_cnn()
    linear = nn.Sequential(nn.Flatten(), nn.Linear(256, 10))
    refusing = [
        (linear, "Sequential, on images of 1x8x8: mat1 and mat2 shapes"),
        (OfFixedSize(), "OfFixedSize, on images of 1x8x8: height of 32 needed"),
    ]
    for wrong, said in refusing:
        with pytest.raises(RuntimeError, match=f"^model {said}"):
            evaluate(wrong, data, ["clean"], **QUIET)
        with pytest.raises(RuntimeError, match=f"^model {said}"):
            masking_checks(wrong, data, **QUIET)
        with pytest.raises(RuntimeError, match=f"^surrogate {said}"):
            evaluate(good, data, ["fgsm"], surrogate=wrong, **QUIET)
    with pytest.raises(RuntimeError, match=r"^surrogate theirs, on images of 1x8x8"):
        evaluate(good, data, ["fgsm"], surrogate=Surrogate(linear, "theirs"), **QUIET)
