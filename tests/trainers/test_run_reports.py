"""What a run reports: its announcement, and the columns of its logs."""

from __future__ import annotations

import copy
import csv
import re
from pathlib import Path

import pytest
import torch
from test_extra_images import extra_data
from test_methods import slow_distance
from test_trainers import run
from test_training_options import tiny_net
from torch import Tensor, nn
from training_helpers import (
    make_model,
    small_data,
    small_recipe,
    states_equal,
)

from fastadv.models import small_cnn
from fastadv.trainers import (
    Attacked,
    Settings,
    Standard,
    TrainBatch,
    announcement,
    train,
)
from fastadv.trainers.logs import MetricsLog, read_records

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
STEPS = 4  # of an epoch of `small_data`


def test_drift_is_the_mean_distance_from_the_teachers_features(tmp_path: Path) -> None:
    teacher, data = make_model(1).eval(), small_data()
    changes = {"monitor_images": 24}
    result = run("arrest", tmp_path, teacher=teacher, data=data, changes=changes)
    x = data.test.images.double() / 255
    model, old = (copy.deepcopy(m).double().eval() for m in (result.model, teacher))
    with torch.no_grad():
        expected = slow_distance(model.forward_features(x), old.forward_features(x)).mean()
    assert result.record["drift"] == pytest.approx(float(expected), rel=1e-4)
    assert "drift" not in run("pgd_at", tmp_path / "other").record


class Masked(nn.Module):
    """A model that sees the upper half of an image only."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x[:, :, :4].flatten(1))


def test_zero_gradients_of_the_attack_are_logged(tmp_path: Path) -> None:
    result = run("pgd_at", tmp_path, model=Masked(), settings=Settings(log_every=2))
    records = read_records(tmp_path / "metrics.jsonl")
    assert [r["zero_gradients"] for r in records] == [0.5] * len(records)
    assert result.record["zero_gradients"] == 0.5
    assert "zero_gradients" not in run("standard", tmp_path / "standard").record


def test_models_without_comparable_features_have_no_drift(tmp_path: Path) -> None:
    cut = run("hat", tmp_path / "cut", teacher=make_model(1), changes={"epochs": 1})
    assert 0 < cut.record["drift"] < 1
    changes = {"epochs": 1, "monitor_steps": 0}
    for name, model, teacher in (
        ("uncut", Masked(), Masked()),
        ("mixed", small_cnn(4, 1), Masked()),
        ("sizes", small_cnn(4, 1), tiny_net()),
    ):
        result = run("hat", tmp_path / name, model=model, teacher=teacher, changes=changes)
        assert "drift" not in result.record


def test_the_summary_has_all_columns_whenever_they_begin(tmp_path: Path) -> None:
    # Looks are at every second epoch, and there is replay in the first alone.
    changes = {"epochs": 3, "monitor_every": 2, "replay_epochs": 1}
    run("arrest", tmp_path, changes=changes)
    with open(tmp_path / "summary.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    filled = lambda name: [row[name] != "" for row in rows]  # noqa: E731
    assert filled("replayed") == [True, False, False]
    assert filled("drift") == filled("robust_accuracy") == [False, True, True]
    assert filled("loss") == [True] * 3
    # A column that begins after the log was opened again.
    log = MetricsLog(tmp_path, 12)
    log.epoch(epoch=4, step=16, late=0.5)
    with open(tmp_path / "summary.csv", encoding="utf-8") as file:
        assert [row["late"] for row in csv.DictReader(file)] == ["", "", "", "0.5"]


def test_the_announcement_estimates_the_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(announcement, "_seconds_of", lambda work: 0.5)
    changes = {"epochs": 3, "replay_epochs": 1}
    run("arrest", tmp_path, progress=True, changes=changes)
    # PGD-3 is 3 steps, a training pass 3 passes, the teacher 1, the drift of the first epoch 1.
    seconds = 0.5 * STEPS * (3 * 3 + 5 + 4 + 4)
    error = capsys.readouterr().err
    assert f"time: about {seconds:.0f} s, going by one batch" in error
    assert re.search(r"up to \d+ forward passes in epoch 1, .* in epochs 2 to 3\n", error)
    assert f"work: 3 epochs of {STEPS} iterations of 16 images;" in error
    whole = {"epochs": 1, "batch_size": 72}
    run("standard", tmp_path / "short", progress=True, changes=whole)
    assert "work: 1 epoch of 1 iteration of 72 images;" in capsys.readouterr().err


def test_the_announcement_changes_nothing(tmp_path: Path) -> None:
    class Dropping(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten())
            self.append(nn.Linear(144, 4))

    ends = []
    for show in (False, True):
        torch.manual_seed(0)
        result = run("pgd_at", tmp_path / str(show), model=Dropping(), progress=show)
        ends.append(result.model.state_dict())
    assert states_equal(*ends)


def test_the_announcement_counts_extra_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"epochs": 1, "extra_fraction": 0.25}
    run("standard", tmp_path, progress=True, extra=extra_data(), changes=changes)
    assert "72 images and 4 of 10 extra images per iteration" in capsys.readouterr().err


def test_some_of_the_training_images(tmp_path: Path) -> None:
    seen: list[Tensor] = []

    class Watching(Standard):
        def attack(self, batch: TrainBatch) -> Attacked:
            seen.append(batch.y)
            return super().attack(batch)

    changes = {"train_images": 32, "holdout": 8, "epochs": 1}
    recipe = small_recipe("standard", **changes)
    data = small_data()
    result = train(
        Watching, recipe, data=data, model=make_model(0), run_dir=tmp_path / "r", progress=False
    )
    assert result.progress.step == 2
    counts = torch.cat(seen).bincount(minlength=4)
    assert counts.sum() == 32 and counts.max() - counts.min() <= 1
    many = small_recipe("standard", train_images=65, holdout=8)
    with pytest.raises(ValueError, match="train_images must be <= 64, the images there, got 65"):
        train(
            "standard", many, data=data, model="small_cnn", run_dir=tmp_path / "q", progress=False
        )
    with pytest.raises(ValueError, match="train_images must be >= 1, got 0"):
        small_recipe("standard", train_images=0)
