"""What users of other libraries type: understood, or refused with the word that they are looking for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastadv
from fastadv import compat, evaluation
from fastadv.cli import main
from fastadv.cli.parsing import with_norms
from fastadv.data import Loader, Splits, from_dataset, from_tensors, load_cifar10
from fastadv.evaluation import load_results
from fastadv.models import small_cnn
from fastadv.ops.values import norm_name, shown
from fastadv.trainers import AdversarialRecipe, Cosine, Recipe, find_method, train
from fastadv.trainers.run_directory import RunDirectory

pytestmark = pytest.mark.usefixtures("one_thread")
X, Y = torch.rand(4, 3, 8, 8), torch.arange(4)


def net() -> nn.Module:
    return small_cnn(10, 3).eval()


@pytest.mark.parametrize("word", ["Linfty", "infinity", "l_inf", "Inf"])
def test_linf_has_many_names(word: str) -> None:
    assert norm_name(word) == "linf"


def test_recipes_and_commands_take_the_norms_that_attacks_take(tmp_path: Path) -> None:
    recipe = find_method("pgd_at").recipe_class
    for word in ("L2", "l_2", 2):
        assert recipe(norm=word) == recipe.preset("paper", norm=word) == recipe(norm="l2")
    assert recipe(norm="Linf").norm == "linf"
    with pytest.raises(ValueError, match="norm must be one of linf, l2, got 'l3'"):
        recipe(norm="l3")
    assert with_norms(["train", "--norm", "Linf", "L2", "--norm=L2"]) == [
        *("train", "--norm", "linf", "L2", "--norm=l2")
    ]
    run = str(tmp_path / "run")
    images = ("--data", "digits", "--epochs", "1", "--train_images", "128", "--monitor_images", "8")
    assert main(["train", "pgd_at", *images, "--run", run, "--norm", "L2", "--quiet"]) == 0
    assert RunDirectory(run).read().recipe["norm"] == "l2"
    words = ["--attacks", "clean", "fgsm", "--max_examples", "20", "--quiet"]
    assert main(["eval", run, *words, "--norm", "Linf"]) == 0
    assert {one.norm for one in load_results(tmp_path / "run" / "eval.json")} == {"linf"}


ARGUMENTS: list[tuple[Callable[[], object], str]] = [
    (lambda: fastadv.PGD(net(), perturb_steps=10), "'perturb_steps'; did you mean 'steps'"),
    (lambda: fastadv.PGD(net(), distance="l_inf"), "'distance'; did you mean 'norm'"),
    (lambda: fastadv.PGD(net(), device="cpu"), "'device'; there are model, eps, alpha, steps"),
    (lambda: fastadv.PGD(net())(X, labels=Y), "'labels'; did you mean 'y'"),
    (lambda: fastadv.PGD(net())(images=X, labels=Y), "'images'; did you mean 'x'"),
    (lambda: fastadv.CW(net(), confidence=10), "'confidence'; CWL2 has one"),
    (lambda: fastadv.pgd_fused(net(), X, Y, 8 / 255), r"takes 3 .*\(model, x, y\), got 4; .* eps"),
    (lambda: fastadv.AutoAttack(net(), epsilon=0.1), "AutoAttack has no argument 'epsilon'.*'eps'"),
    (lambda: fastadv.AutoAttack(net(), attacks_to_run=["square"]), "did you mean 'version'"),
    (lambda: fastadv.evaluate(net(), (X, Y), max_images=3), "did you mean 'max_examples'"),
    (lambda: compat.PGD(net(), epsilon=0.1), "PGD has no argument 'epsilon'; did you mean 'eps'"),
    (lambda: compat.PGD(net(), norm="L2"), "'norm'; APGD, APGDT, FAB, Square have one"),
    (lambda: compat.PGD(net())(X, Y, eps=0.1), "'eps'; there are inputs, labels, epsilons"),
    (lambda: AdversarialRecipe(perturb_steps=10), "'perturb_steps'; did you mean 'steps'"),
    (lambda: Loader(from_tensors(X, Y), 2, train=True, shuffle=True), "^Loader: .*'shuffle'"),
    (lambda: Loader(from_tensors(X, Y), 2), "^Loader: .*'train'"),
]


@pytest.mark.parametrize(("call", "words"), ARGUMENTS)
def test_an_argument_of_another_name_is_told_the_name(
    call: Callable[[], object], words: str
) -> None:
    with pytest.raises(TypeError, match=words):
        call()


@pytest.mark.parametrize(
    ("setting", "word", "meant"),
    [
        ("loss", "CE", "ce"),
        ("loss", "cross-entropy", "ce"),
        ("loss", "CrossEntropyLoss", "ce"),
        ("loss", "margin", "cw"),
        ("precision", "float32", "fp32"),
        ("precision", torch.bfloat16, "bf16"),
    ],
)
def test_a_word_of_another_spelling_is_told_the_word(setting: str, word: Any, meant: str) -> None:
    with pytest.raises(ValueError, match=f"{setting} must be one of .*; did you mean '{meant}'"):
        fastadv.PGD(net(), **{setting: word})


def test_a_loss_is_called_with_logits_and_labels() -> None:
    with pytest.raises(
        TypeError, match=r"got the class CrossEntropyLoss; pass CrossEntropyLoss\(\)"
    ):
        fastadv.PGD(net(), loss=nn.CrossEntropyLoss)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="loss must be a callable of 2 arguments"):
        fastadv.PGD(net(), loss=lambda logits: logits.sum())  # type: ignore[arg-type,misc]
    fastadv.PGD(net(), loss=nn.CrossEntropyLoss())


@pytest.mark.parametrize("make", [fastadv.PGD, fastadv.Square, fastadv.AutoAttack])
@pytest.mark.parametrize(
    ("model", "words"),
    [(None, "got NoneType"), ("resnet18", "got str"), (type(net()), "make the module first")],
)
def test_a_model_is_a_module_from_the_start(make: Any, model: Any, words: str) -> None:
    with pytest.raises(TypeError, match=f"model must be a module or a callable, .*{words}"):
        make(model)
    attack = make(net())
    with pytest.raises(TypeError, match="model must be"):
        attack.model = model


def test_a_state_dict_is_no_model_and_is_not_printed() -> None:
    with pytest.raises(TypeError, match=r"model must be .*load_state_dict") as told:
        fastadv.evaluate(net().state_dict(), (X, Y))  # type: ignore[arg-type]
    assert len(str(told.value)) < 200
    assert shown(net()) == "a SmallCNN"
    assert len(shown(list(range(1000)))) < 210


def test_one_image_is_no_batch() -> None:
    with pytest.raises(ValueError, match=r"x must have shape \[B, \.\.\.\].*x\.unsqueeze\(0\)"):
        fastadv.PGD(net())(X[0], Y[0])


@pytest.mark.parametrize(
    ("argument", "value"),
    [("eps", 8), ("version", "custom"), ("engine", "fast"), ("batch_size", 0), ("norm", "L0")],
)
def test_autoattack_is_checked_when_it_is_made(argument: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{argument} must be"):
        fastadv.AutoAttack(net(), **{argument: value})


def test_an_attribute_that_autoattack_does_not_have_is_refused() -> None:
    attack = fastadv.AutoAttack(net())
    with pytest.raises(AttributeError, match="no setting 'epsilon'; did you mean 'eps'"):
        attack.epsilon = 4 / 255  # type: ignore[attr-defined]
    attack.eps = 4 / 255
    assert "eps=0.0156" in repr(attack)


def test_names_that_there_are_not() -> None:
    with pytest.raises(AttributeError, match="did you mean 'PGD'"):
        fastadv.PDG  # noqa: B018
    with pytest.raises(AttributeError, match=r"fastadv\.AutoAttack is one"):
        compat.AutoAttack  # noqa: B018
    assert not hasattr(compat, "DeepFool")


def test_an_attack_among_the_attacks_of_an_evaluation() -> None:
    attack: Any = fastadv.PGD(net())
    for choice in (attack, ("mine", attack)):
        with pytest.raises(TypeError, match=r"pass \(name, lambda model, x, y: attack\(x, y\)\)"):
            fastadv.evaluate(net(), (X, Y), attacks=[choice])
    with pytest.raises(ValueError, match="not one word with commas"):
        fastadv.evaluate(net(), (X, Y), attacks="clean,fgsm")


@pytest.mark.parametrize("schedule", ["cosine", Cosine])
def test_a_schedule_by_its_name(schedule: Any) -> None:
    with pytest.raises(
        TypeError, match=r"must be a Schedule, .*MultiStep.*did you mean Cosine\(\)"
    ):
        Recipe(schedule=schedule)


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        (TensorDataset(X), r"item 0 of dataset must be a pair \(image, label\), got 1 values"),
        (X, r"item 0 of dataset must be a pair .*a tensor of shape \(3, 8, 8\)"),
        (DataLoader(TensorDataset(X, Y)), "dataset must be .*, got DataLoader; pass its dataset"),
        (iter([]), "dataset must be a map-style Dataset"),
    ],
)
def test_a_dataset_of_other_items(dataset: Any, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        from_dataset(dataset)


def test_labels_below_zero_are_named() -> None:
    with pytest.raises(ValueError, match="the label of item 1 of dataset must be >= 0, got -100"):
        from_dataset([(X[0], 0), (X[1], -100)])  # type: ignore[arg-type]


def test_the_folder_of_data_is_a_path() -> None:
    with pytest.raises(TypeError, match="root must be the path of a folder, got None"):
        load_cifar10(None)  # type: ignore[arg-type]


def test_a_device_that_there_is_not() -> None:
    with pytest.raises(ValueError, match=r"device must be one that there is, got 'cuda:99'"):
        fastadv.evaluate(net(), (X, Y), device="cuda:99")


def test_points_of_a_plot_are_in_percent() -> None:
    with pytest.raises(TypeError, match="clean must be a number"):
        evaluation.TradeOffPoint("a", "90", 50)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"robust must be in 0\.\.100, got 150"):
        evaluation.TradeOffPoint("a", 90, 150)
    with pytest.raises(TypeError, match="points must be TradeOffPoints"):
        evaluation.plot_trade_off([("a", 90, 50)], "x.png")  # type: ignore[list-item]


def test_one_hot_labels_are_told_what_to_do() -> None:
    soft = torch.eye(10)[Y]
    for call in (
        lambda: fastadv.evaluate(net(), (X, soft), attacks=["clean"]),
        lambda: from_tensors(X, soft),
        lambda: compat.PGD(net())(X, soft),
    ):
        with pytest.raises(TypeError, match=r"labels must be integers.*pass labels\.argmax\(1\)"):
            call()


def test_the_version_of_autoattack_is_spelled_in_small_letters() -> None:
    with pytest.raises(ValueError, match=r"version must be .*; did you mean 'standard'"):
        fastadv.AutoAttack(net(), version="Standard")
    with pytest.raises(ValueError, match=r"did you mean \['square'\]"):
        fastadv.AutoAttack(net(), version="square")


def test_models_of_a_transfer_have_names() -> None:
    models: Any = {1: net(), 2: net()}
    with pytest.raises(TypeError, match="models must have names that are text, got 1"):
        evaluation.transfer_matrix(models, (X, Y), "pgd-2")


def test_the_cost_is_of_a_module_and_a_shape() -> None:
    with pytest.raises(TypeError, match="model must be a module, got 'resnet18'"):
        evaluation.multiply_adds("resnet18", (3, 8, 8))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"shape must be \[C, H, W\], got 8"):
        evaluation.multiply_adds(net(), 8)  # type: ignore[arg-type]


def test_training_has_no_numbers_of_its_own_and_no_folder_of_given_images(tmp_path: Path) -> None:
    images = from_tensors(X, Y)
    given: dict[str, Any] = {
        "data": Splits(images, images),
        "model": "small_cnn",
        "run_dir": tmp_path / "run",
    }
    with pytest.raises(TypeError, match="train has no argument 'lr'; there are method, recipe,"):
        train("standard", lr=0.1, **given)
    with pytest.raises(ValueError, match="root must be left out with Splits"):
        train("standard", root="DATA", **given)
