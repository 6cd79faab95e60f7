"""Frozen models in runs in bfloat16: their copies serve every method, and a resumed run ends as it would have."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from run_helpers import Interruption, assert_same_end, run
from training_helpers import make_batch, make_model, small_recipe

from fastadv.engine.copy_engines import EngineOnCopy
from fastadv.models import create_model
from fastadv.ops import angular_distance
from fastadv.trainers import Runtime, find_method
from fastadv.trainers.frozen_forward import features_of
from fastadv.trainers.phases import PhaseTimer

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
METHODS: list[tuple[str, dict[str, Any], int]] = [
    ("arrest", {"distance": "logits_mse"}, 1),
    ("vfd", {"base": "hat", "layer": "layer1"}, 2),
    ("kd_at", {"robust_weight": 0.0}, 1),
    ("hat", {}, 1),
    ("lbgat", {"fixed": True}, 1),
]


def method_in(dtype: torch.dtype | None, name: str, changes: dict[str, Any]) -> Any:
    runtime = Runtime(CPU, dtype, PhaseTimer(CPU))
    numbers = {"attack_precision": "fp32", **changes}
    teachers = {"teacher": make_model(1)}
    made = find_method(name)(small_recipe(name, **numbers), make_model(), runtime, teachers)
    made.train_mode()
    return made


def loss_of(method: Any) -> float:
    batch = make_batch()
    with method.autocast():
        return float(method.training_loss(batch, method.attack(batch)).loss.detach())


@pytest.mark.parametrize(("name", "changes", "copies"), METHODS)
def test_methods_run_their_teachers_by_copies(
    name: str, changes: dict[str, Any], copies: int
) -> None:
    narrow = method_in(torch.bfloat16, name, changes)
    assert loss_of(narrow) == pytest.approx(loss_of(method_in(None, name, changes)), rel=0.02)
    assert [frozen.reason for frozen in narrow._frozen.values()] == [None] * copies
    assert all(frozen._copy is not None for frozen in narrow._frozen.values())


def test_afs_runs_its_extractors_by_a_copy() -> None:
    torch.manual_seed(0)
    stack = create_model("stack:2*small_cnn", 4, 1)
    losses = []
    for dtype in (None, torch.bfloat16):
        runtime = Runtime(CPU, dtype, PhaseTimer(CPU))
        teachers = {f"extractor_{i}": make_model(i) for i in (1, 2)}
        method: Any = find_method("afs")(small_recipe("afs"), stack, runtime, teachers)
        method.initialise()
        method.train_mode()
        losses.append(loss_of(method))
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    (frozen,) = method._frozen.values()
    assert frozen._copy is not None


def test_a_resumed_run_with_copies_ends_bit_for_bit_where_it_would_have(tmp_path: Path) -> None:
    changes = {"precision": "bf16", "attack_precision": "bf16", "engine": "compiled"}
    run("arrest", tmp_path / "whole", changes=changes)
    with pytest.raises(Interruption):
        run("arrest", tmp_path / "cut", 2, changes=changes)
    torch.manual_seed(7)
    run("arrest", tmp_path / "cut", resume=True, changes=changes)
    assert_same_end(tmp_path / "whole", tmp_path / "cut")


def test_an_arrest_step_proves_its_copy_once(monkeypatch: pytest.MonkeyPatch) -> None:
    u, v = (features_of(make_model(seed).eval(), make_batch().x) for seed in (0, 1))
    middle = math.degrees(math.acos(1 - float(angular_distance(u, v).detach().median()) - 1e-6))
    changes = {"attack_precision": "bf16", "engine": "compiled", "replay_epochs": 2, "phi": middle}
    method = method_in(torch.bfloat16, "arrest", changes)
    shares: list[float] = []

    def update(result: Any) -> bool:
        shares.append(float(result.metrics["replayed"]))
        with torch.no_grad():
            for parameter in method.model.parameters():
                parameter.mul_(1.0001)
        return True

    refreshed: list[int] = []
    plain = EngineOnCopy.refresh
    monkeypatch.setattr(
        EngineOnCopy, "refresh", lambda self, of: refreshed.append(1) or plain(self, of)
    )
    method.model.eval()  # so that the statistics, and with them the drift, stay
    for _ in range(3):
        refreshed.clear()
        method.step(make_batch(), update)
    assert 0 < shares[-1] < 1  # the attack has another number of images than the drift
    assert len(refreshed) == 1


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_another_teacher_in_the_same_place_is_asked_at_once(dtype: torch.dtype | None) -> None:
    """As a callback does that renews a teacher during training."""
    method = method_in(dtype, "hat", {})
    x = make_batch().x
    first = method.teacher_output("teacher", x)
    other = make_model(7).eval()
    method.teachers["teacher"] = other
    found = method.teacher_output("teacher", x)
    assert not torch.allclose(found.float(), first.float(), rtol=0.05)
    torch.testing.assert_close(found.float(), other(x).detach(), rtol=0.05, atol=0.05)
