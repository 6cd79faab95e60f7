"""Training on a CUDA device: every method begins with the loss that it has on the CPU, runs, and resumes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from training_helpers import make_model, small_data, small_recipe

from fastadv.models import create_model
from fastadv.trainers import Settings, find_method, load_model, method_names, train
from fastadv.trainers.logs import read_records

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
STEPS = 8  # two epochs of the small data
CASES: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in method_names()]
CASES.append(("pgd_at", {"awp_gamma": 0.01, "awp_warmup": 0}))


class Interruption(Exception):
    """Ends a run."""


def run(method: str, folder: Path, stop_after: int = 0, **options: Any) -> Any:
    """Train on the small data; optionally stop after so many steps."""
    model = "stack:2*small_cnn" if method == "afs" else "small_cnn"
    recipe = small_recipe(method, ema_decay=0.8, **options.pop("changes", {}))
    needed = find_method(method).teachers_for(recipe, create_model(model, 4, 1))

    def stop(progress: Any) -> None:
        if progress.step == stop_after:
            raise Interruption

    arguments: dict[str, Any] = {
        "data": small_data(),
        "model": model,
        "run_dir": folder,
        "teacher": [make_model(i) for i in range(1, len(needed) + 1)] or None,
        "settings": Settings(checkpoint_every=3, log_every=1),
        "progress": False,
        "device": DEVICE,
        "on_step": stop,
    }
    return train(method, recipe, **(arguments | options))


def losses(folder: Path) -> list[float]:
    return [r["loss"] for r in read_records(folder / "metrics.jsonl") if "loss" in r]


@pytest.mark.parametrize("method", method_names())
def test_the_first_loss_is_that_on_the_cpu(method: str, tmp_path: Path) -> None:
    """The images, the noise and the starting weights are the same."""
    found = []
    for device in (DEVICE, "cpu"):
        with pytest.raises(Interruption):
            run(method, tmp_path / device, 2, device=device)
        found.append(losses(tmp_path / device)[0])
    assert found[0] == pytest.approx(found[1], rel=0.03)


@pytest.mark.parametrize(("method", "changes"), CASES)
def test_a_run_in_bfloat16_is_resumed(method: str, changes: dict[str, Any], tmp_path: Path) -> None:
    changes = {**changes, "precision": "auto"}
    if method != "standard":
        changes["attack_precision"] = "auto"
    with pytest.raises(Interruption):
        run(method, tmp_path, 5, changes=changes)
    result = run(method, tmp_path, changes=changes, teacher=None, resume=True)
    assert (result.progress.step, result.progress.bad_steps) == (STEPS, 0)
    assert {p.device.type for p in result.model.parameters()} == {DEVICE}
    assert all(map(math.isfinite, losses(tmp_path)))
    images = small_data().test.images.float() / 255
    assert load_model(tmp_path)(images).isfinite().all(), "also where there is no GPU"


def test_a_compiled_model_is_trained(tmp_path: Path) -> None:
    result = run("arrest", tmp_path, changes={"precision": "auto", "compile": True})
    assert result.progress.bad_steps == 0 and all(map(math.isfinite, losses(tmp_path)))
