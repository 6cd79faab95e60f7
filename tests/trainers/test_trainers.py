"""The training loop: what a run computes and what it leaves."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import json
import os
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from training_helpers import (
    copied_state,
    make_model,
    small_data,
    small_recipe,
    states_equal,
)

from fastadv.data import Splits, load_dataset, split_validation, subset
from fastadv.losses import cross_entropy
from fastadv.models import Normalized, small_cnn
from fastadv.trainers import (
    ArrestRecipe,
    Attacked,
    Constant,
    Cosine,
    LossResult,
    NonFiniteLossError,
    Recipe,
    Settings,
    Standard,
    TrainBatch,
    load_model,
    train,
)
from fastadv.trainers.checkpoint import find_checkpoint, load_checkpoint
from fastadv.trainers.logs import read_records

pytestmark = pytest.mark.usefixtures("one_thread")
METHODS = ["standard", "pgd_at", "arrest"]


def run(method: Any, folder: Path, **options: Any) -> Any:
    """Train on the small data, silently."""
    name = method if isinstance(method, str) else "standard"
    if name == "arrest":
        options.setdefault("teacher", make_model(1))
    changes = options.pop("changes", {})
    arguments: dict[str, Any] = {
        "data": small_data(),
        "model": "small_cnn",
        "run_dir": folder,
        "progress": False,
        "device": "cpu",
    }
    return train(method, small_recipe(name, **changes), **(arguments | options))


@pytest.mark.parametrize("method", METHODS)
def test_a_run_leaves_what_it_should(method: str, tmp_path: Path) -> None:
    result = run(method, tmp_path / "run")
    recipe = small_recipe(method)
    steps = 2 * (72 // recipe.batch_size)
    assert result.progress.step == steps and result.progress.epoch == 2
    assert result.checkpoint.name == f"step_{steps:06d}"
    assert result.best_checkpoint is not None and result.best_checkpoint.is_dir()
    assert not result.model.training
    assert states_equal(load_model(tmp_path / "run").state_dict(), result.model.state_dict())

    with open(tmp_path / "run" / "summary.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert all(0 <= float(row["clean_accuracy"]) <= 1 for row in rows)
    assert ("robust_accuracy" in rows[0]) == (method != "standard")
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    assert [r["epoch"] for r in records if r["kind"] == "epoch"] == [1, 2]
    places = [r["step"] / (steps / 2) - 0.25 for r in records]  # of the last step of each record
    assert [r["lr"] for r in records] == pytest.approx([recipe.lr_at(p) for p in places])
    if method == "arrest":
        assert "replayed" in records[0] and "seconds_teacher" in records[0]

    meta = json.loads((result.checkpoint / "meta.json").read_text())
    assert meta["method"] == method and meta["epoch"] == 2 and meta["seed"] == recipe.seed
    assert meta["recipe"]["schedule"]["class"] == type(recipe.schedule).__name__
    assert meta["versions"]["torch"] == torch.__version__
    for name in ("progress", "optimizers"):
        assert name in load_checkpoint(result.checkpoint).train_state


def test_runs_repeat_bit_for_bit_and_depend_on_the_seed(tmp_path: Path) -> None:
    first = run("pgd_at", tmp_path / "a").model.state_dict()
    torch.manual_seed(99)  # the caller's random state plays no part
    again = run("pgd_at", tmp_path / "b").model.state_dict()
    other = run("pgd_at", tmp_path / "c", changes={"seed": 4}).model.state_dict()
    assert states_equal(first, again)
    assert not states_equal(first, other)


def test_the_callers_random_state_is_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    run("standard", tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_cudnn_measures_during_training_and_else_is_as_the_caller_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cudnn, seen = torch.backends.cudnn, set()
    monkeypatch.setattr(cudnn, "deterministic", True)

    def look(_: Any) -> None:
        seen.add((cudnn.enabled, cudnn.benchmark, cudnn.deterministic))

    run("standard", tmp_path, on_step=look)
    assert seen == {(True, True, True)} and not cudnn.benchmark


def test_training_learns(tmp_path: Path) -> None:
    changes = {"epochs": 12, "lr": 0.2, "schedule": Cosine()}
    result = run("pgd_at", tmp_path, changes=changes)
    epochs = [r for r in read_records(tmp_path / "metrics.jsonl") if r["kind"] == "epoch"]
    assert epochs[-1]["loss"] < 0.5 * epochs[0]["loss"]
    assert result.record["robust_accuracy"] > 0.7


@pytest.mark.parametrize("averaged", [False, True])
def test_the_average_is_what_counts_when_there_is_one(averaged: bool, tmp_path: Path) -> None:
    result = run("standard", tmp_path, changes={"ema_decay": 0.5 if averaged else None})
    live = load_model(tmp_path, averaged=False).state_dict()
    assert states_equal(live, result.model.state_dict()) != averaged
    assert states_equal(load_model(tmp_path).state_dict(), result.model.state_dict())


def test_best_is_the_checkpoint_with_the_best_look(tmp_path: Path) -> None:
    result = run("pgd_at", tmp_path, changes={"epochs": 4}, settings=Settings(keep=1))
    epochs = [r for r in read_records(tmp_path / "metrics.jsonl") if r["kind"] == "epoch"]
    scores = [r["robust_accuracy"] for r in epochs]
    best = epochs[scores.index(max(scores))]
    assert result.progress.best_score == pytest.approx(max(scores), abs=1e-5)
    assert find_checkpoint(tmp_path, "best").name == f"step_{best['step']:06d}"


def test_held_out_images_are_not_trained_on_and_are_looked_at(tmp_path: Path) -> None:
    data = small_data()
    seen: list[Tensor] = []

    class Watching(Standard):
        def attack(self, batch: TrainBatch) -> Attacked:
            seen.append(batch.x)
            return Attacked(batch.x)

    changes = {"holdout": 24, "pad": 0, "epochs": 3, "monitor_images": 24}
    result = run(Watching, tmp_path, data=data, changes=changes)
    trained = {tuple(image.flatten().tolist()) for image in torch.cat(seen)}
    rest, held = split_validation(data.train, 24, small_recipe("standard").seed)
    as_images = lambda images: {tuple((i.float() / 255).flatten().tolist()) for i in images}  # noqa: E731
    assert trained <= as_images(rest.images)
    assert not trained & as_images(held.images)
    with torch.no_grad():
        right = result.model(held.images.float() / 255).argmax(1) == held.labels
    assert result.record["clean_accuracy"] == pytest.approx(right.double().mean().item())
    number = len(data.train)
    with pytest.raises(ValueError, match=f"holdout must be < {number}, .* got {number}"):
        run("standard", tmp_path / "none", data=data, changes={"holdout": number})


class Failing(Standard):
    """Standard training whose loss goes wrong at some steps."""

    bad: ClassVar[frozenset[int]] = frozenset()
    how = "loss"

    def training_loss(self, batch: TrainBatch, adv: Attacked) -> LossResult:
        logits = self.model(adv.x)
        loss = cross_entropy(logits, batch.y)
        if batch.epoch * 4 + batch.step in self.bad:
            # Finite, but with a gradient that is not: the derivative of sqrt at 0.
            silent = (logits - logits.detach()).square().sum().sqrt()
            loss = loss + (silent if self.how == "gradient" else loss * float("nan"))
        return LossResult(loss)


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_not_taken(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Failing, "bad", frozenset({1, 2, 5}))
    monkeypatch.setattr(Failing, "how", how)
    states: list[dict[str, Tensor]] = []
    model = make_model(0)
    result = run(
        Failing,
        tmp_path,
        model=model,
        changes={"max_bad_steps": 3},  # in a row, which they are not
        on_step=lambda _: states.append(copied_state(model)),
    )
    assert result.progress.bad_steps == 3
    for step in range(1, 8):
        # BatchNorm's statistics, too, are as if the step had not been.
        assert states_equal(states[step - 1], states[step]) == (step in Failing.bad)
    assert result.record["bad_steps"] == 3


def test_several_steps_that_are_not_finite_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Failing, "bad", frozenset({4, 5, 6}))
    with pytest.raises(NonFiniteLossError, match="3 iterations in a row") as caught:
        run(Failing, tmp_path, changes={"max_bad_steps": 3})
    (file,) = tmp_path.glob("nonfinite_step_*.pt")
    assert str(file) in str(caught.value)
    saved = torch.load(file, weights_only=True)
    assert saved["x"].shape == (16, 1, 8, 8) and saved["step"] == 2 and saved["epoch"] == 1
    model = small_cnn(4, 1)
    model.load_state_dict(saved["weights"]["model"])
    assert all(bool(torch.isfinite(v).all()) for v in model.state_dict().values())
    load_checkpoint(find_checkpoint(tmp_path))


def test_gradients_are_clipped(tmp_path: Path) -> None:
    largest = 1e-3
    model = make_model(0)
    before = [p.detach().clone() for p in model.parameters()]
    changes = {"clip_grad_norm": largest, "momentum": 0.0, "weight_decay": 0.0, "lr": 1.0}

    def check(progress: Any) -> None:
        if progress.step == 1:
            moved = [p.detach() - b for p, b in zip(model.parameters(), before, strict=True)]
            norm = torch.cat([m.flatten() for m in moved]).norm()
            assert norm.item() == pytest.approx(largest, rel=1e-3)

    run("standard", tmp_path, model=model, changes=changes, on_step=check)


@pytest.mark.parametrize("kind", ["run", "checkpoint", "safetensors", "pt", "module"])
def test_a_teacher_comes_from_anywhere(kind: str, tmp_path: Path) -> None:
    standard = run("standard", tmp_path / "standard")
    torch.save({"state_dict": standard.model.state_dict()}, tmp_path / "weights.pt")
    source: Any = {
        "run": tmp_path / "standard",
        "checkpoint": standard.checkpoint,
        "safetensors": standard.checkpoint / "model.safetensors",
        "pt": tmp_path / "weights.pt",
        "module": standard.model,
    }[kind]
    result = run("arrest", tmp_path / "arrest", teacher=source)
    kept = small_cnn(4, 1)
    from safetensors.torch import load_file

    kept.load_state_dict(load_file(tmp_path / "arrest" / "teacher.safetensors"))
    assert states_equal(kept.state_dict(), standard.model.state_dict())
    assert result.progress.step == 8


def test_a_normalized_model_can_be_trained_and_be_its_own_teacher(tmp_path: Path) -> None:
    teacher = Normalized(make_model(1), 0.4, 0.3)
    model = Normalized(small_cnn(4, 1), 0.4, 0.3)
    run("arrest", tmp_path, teacher=teacher, model=model)
    fresh = Normalized(small_cnn(4, 1))
    assert states_equal(load_model(tmp_path, fresh).state_dict(), model.state_dict())
    with pytest.raises(ValueError, match="pass model="):
        load_model(tmp_path)


def test_missing_and_superfluous_teachers_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="arrest needs a teacher"):
        run("arrest", tmp_path, teacher=None)
    with pytest.raises(ValueError, match="standard with this recipe takes no frozen model"):
        run("standard", tmp_path, teacher=make_model(1))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pt"):
        run("arrest", tmp_path, teacher="nowhere.pt")
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_of_another_method_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="recipe of arrest must be an ArrestRecipe, got Recipe"):
        train("arrest", Recipe(), data=small_data(), model="small_cnn", run_dir=tmp_path)


def test_data_too_few_for_a_batch_are_named_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch_size must be <= 72"):
        run("standard", tmp_path, changes={"batch_size": 100})
    assert list(tmp_path.iterdir()) == []


def test_a_run_directory_that_cannot_be_written_is_named_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="run_dir"):
        run("standard", tmp_path / "file")
    with pytest.raises(OSError, match=r"run_dir .*file/run cannot be written"):
        run("standard", tmp_path / "file" / "run")
    if os.geteuid() != 0:
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(PermissionError, match="cannot be written"):
            run("standard", tmp_path / "locked" / "run")


@pytest.mark.slow
@pytest.mark.processes
def test_arrest_learns_on_real_images(cifar10_root: Path, tmp_path: Path) -> None:
    everything = load_dataset("cifar10", cifar10_root)
    data = Splits(subset(everything.train, 256), subset(everything.test, 64))
    recipe = Recipe(epochs=3, batch_size=64, lr=0.05, monitor_images=64, precision="fp32")
    standard = train(
        "standard", recipe, data=data, model="small_cnn", run_dir=tmp_path / "std", progress=False
    )
    changes: dict[str, Any] = {"steps": 3, "replay_epochs": 2, "lr": 0.01, "monitor_steps": 3}
    fine = ArrestRecipe(**(dataclasses.asdict(recipe) | changes | {"schedule": Constant()}))
    train(
        "arrest",
        dataclasses.replace(fine, epochs=4),
        data=data,
        model="small_cnn",
        run_dir=tmp_path / "arrest",
        teacher=standard.run_dir,
        progress=False,
    )
    epochs = [
        r for r in read_records(tmp_path / "arrest" / "metrics.jsonl") if r["kind"] == "epoch"
    ]
    assert epochs[-1]["loss"] < epochs[0]["loss"]
    assert epochs[-1]["distance"] < epochs[0]["distance"]


def test_tensorboard_is_optional(tmp_path: Path) -> None:
    settings = Settings(tensorboard=True)
    if importlib.util.find_spec("tensorboard") is None:
        with pytest.raises(ImportError, match=r"pip install 'fastadv\[tensorboard\]'"):
            run("standard", tmp_path, settings=settings)
        assert list(tmp_path.iterdir()) == []
    else:
        run("standard", tmp_path, settings=settings)
        assert list((tmp_path / "tensorboard").glob("events*"))
