"""Networks whose halves are not the whole network, or whose features are no maps, in the methods on features."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_helpers import make_model, small_data, small_recipe, states_equal

from fastadv.models import Normalized, SmallCNN, Stack
from fastadv.trainers import Recipe, TrainResult, train
from fastadv.trainers.logs import read_records

pytestmark = pytest.mark.usefixtures("one_thread")
USERS: list[tuple[str, dict[str, Any]]] = [
    ("arrest", {"finetune": False}),
    ("arrest", {"finetune": False, "replay": False}),
    ("arrest", {"finetune": False, "distill": False}),
    ("vfd", {}),
    ("vfd", {"layer": "layer2"}),
    ("tla", {}),
]


class Brightened(SmallCNN):
    """Its own forward normalises the images, which its halves do not."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(2 * x - 1)


class Tokens(SmallCNN):
    """Its features are tokens [B, H * W, C], as in vision transformers."""

    def forward_features(self, x: Tensor) -> Tensor:
        return super().forward_features(x).flatten(2).transpose(1, 2)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        pooled = features.mean(1)
        return pooled if pre_logits else self.linear(pooled)


def like(kind: type[SmallCNN], seed: int) -> SmallCNN:
    """A network of another class with the weights of `make_model`."""
    network = kind(num_classes=4, in_channels=1)
    network.load_state_dict(make_model(seed).state_dict())
    return network


def run(method: str, model: nn.Module, folder: Path, **numbers: Any) -> TrainResult:
    teacher = copy.deepcopy(numbers.pop("teacher", make_model(1)))
    recipe: Recipe = small_recipe(method, **{"epochs": 1, **numbers})
    return train(
        method,
        recipe,
        data=small_data(),
        model=model,
        run_dir=folder,
        teacher=None if method in ("tla", "pgd_at") else teacher,
        progress=False,
    )


@pytest.mark.parametrize(("method", "numbers"), USERS)
def test_a_forward_that_does_more_than_the_halves_is_refused(
    method: str, numbers: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=rf"^model must compute .* which {method} runs"):
        run(method, like(Brightened, 0), tmp_path, **numbers)


@pytest.mark.parametrize(("method", "numbers"), [("arrest", {"finetune": False}), ("vfd", {})])
def test_a_teacher_that_does_more_than_its_halves_is_refused(
    method: str, numbers: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"^teacher must compute .* a Brightened whose logits"):
        run(method, make_model(), tmp_path, teacher=like(Brightened, 1), **numbers)


def test_a_hook_that_halves_pass_by_is_refused(tmp_path: Path) -> None:
    model = make_model()
    model.register_forward_pre_hook(lambda _, args: (args[0] - 0.5,))
    with pytest.raises(ValueError, match="its own forward or a hook does more"):
        run("tla", model, tmp_path)


def test_an_extractor_that_does_more_than_its_halves_is_refused(tmp_path: Path) -> None:
    stack = Stack([like(SmallCNN, 0), like(Brightened, 1)], num_classes=4)
    with pytest.raises(ValueError, match=r"^extractor_2 must compute"):
        train(
            "afs",
            small_recipe("afs", epochs=1),
            data=small_data(),
            model=stack,
            run_dir=tmp_path,
            teacher=[make_model(0), make_model(1)],
            progress=False,
        )


def test_networks_that_are_their_halves_train(tmp_path: Path) -> None:
    calls = itertools.count()

    class Noisy(SmallCNN):  # other logits at every pass, so that nothing can be said
        def forward_features(self, x: Tensor) -> Tensor:
            return super().forward_features(x + 0.1 * next(calls))

    run("tla", Normalized(make_model(), 0.5, 0.25), tmp_path / "normalised")
    run("tla", like(Noisy, 0), tmp_path / "noisy")
    run("pgd_at", like(Brightened, 0), tmp_path / "method without halves")


def test_arrest_without_distillation_and_replay_takes_any_network(tmp_path: Path) -> None:
    def plain(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        layers = [nn.Conv2d(1, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        return nn.Sequential(*layers, nn.Linear(8, 4))

    off = {"distill": False, "replay": False}
    run("arrest", plain(0), tmp_path / "plain", teacher=plain(1), **off)
    with pytest.raises(TypeError, match="has no forward_features"):
        run("arrest", plain(0), tmp_path / "replay", teacher=plain(1), distill=False)


def test_tla_pools_tokens_as_the_network_does(tmp_path: Path) -> None:
    maps = run("tla", make_model(), tmp_path / "maps")
    tokens = run("tla", like(Tokens, 0), tmp_path / "tokens")
    ours, theirs = maps.model.state_dict(), tokens.model.state_dict()
    for name, value in ours.items():
        assert torch.allclose(value, theirs[name], atol=1e-4), name
    one, other = (read_records(tmp_path / kind / "metrics.jsonl") for kind in ("maps", "tokens"))
    assert other[0]["triplet"] == pytest.approx(one[0]["triplet"], rel=1e-3)


def test_attention_maps_are_taken_from_maps_alone(tmp_path: Path) -> None:
    numbers: dict[str, Any] = {
        "finetune": False,
        "distance": "attention",
        "teacher": like(Tokens, 1),
    }
    with pytest.raises(ValueError, match=r"no maps \[B, C, H, W\], got Tokens .* \(16, 16, 64\)"):
        run("arrest", like(Tokens, 0), tmp_path, **numbers)


def test_no_drift_is_measured_where_halves_are_not_the_network(tmp_path: Path) -> None:
    whole = run("hat", make_model(), tmp_path / "whole")
    hidden = run("hat", like(Brightened, 0), tmp_path / "hidden")
    assert "drift" in whole.record and "drift" not in hidden.record


def test_the_check_changes_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked = run("arrest", make_model(), tmp_path / "checked")
    monkeypatch.setattr("fastadv.trainers.loop.check_halves", lambda *_: None)
    unchecked = run("arrest", make_model(), tmp_path / "unchecked")
    assert states_equal(checked.model.state_dict(), unchecked.model.state_dict())
