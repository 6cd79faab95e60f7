"""The model of clean images beside the robust one, in ACT and LBGAT: of which network it is, and how it is run."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from command_helpers import train_quickly
from torch import nn
from training_helpers import (
    copied_state,
    make_batch,
    make_method,
    make_model,
    small_data,
    small_recipe,
    states_equal,
)

from fastadv.models import SmallCNN, WideResNet, create_model
from fastadv.trainers import (
    ActRecipe,
    Attacked,
    LbgatRecipe,
    Runtime,
    find_method,
    load_model,
    train,
)
from fastadv.trainers.checkpoint import find_checkpoint, load_checkpoint, unpack_weights
from fastadv.trainers.phases import PhaseTimer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
CPU = torch.device("cpu")


def run(method: Any, folder: Path, **changes: Any) -> Any:
    stop = changes.pop("on_step", None)
    recipe = small_recipe(method if isinstance(method, str) else "lbgat", **changes)
    common: dict[str, Any] = {"progress": False, "device": "cpu", "resume": folder.exists()}
    data = small_data(48, 16)
    return train(
        method, recipe, data=data, model="small_cnn", run_dir=folder, on_step=stop, **common
    )


class Stop(Exception):
    """Ends a run from outside."""


@pytest.mark.parametrize("name", ["act", "lbgat"])
def test_the_natural_model_is_of_the_network_that_is_named(name: str, tmp_path: Path) -> None:
    seen: list[nn.Module] = []

    class Watched(find_method(name)):  # type: ignore[misc]
        def setup(self) -> None:
            super().setup()
            seen.append(self.natural)

    recipe = small_recipe(name, natural="wrn_10_1", epochs=1)
    folder = tmp_path / "run"
    result = train(
        Watched,
        recipe,
        data=small_data(32, 8),
        model="small_cnn",
        run_dir=folder,
        progress=False,
        device="cpu",
    )
    (natural,) = seen
    assert isinstance(natural, WideResNet) and isinstance(result.model, SmallCNN)
    assert isinstance(load_model(folder), SmallCNN)
    assert json.loads((folder / "run.json").read_text())["recipe"]["natural"] == "wrn_10_1"
    assert result.progress.bad_steps == 0


def test_a_run_with_another_natural_network_is_resumed_bit_for_bit(tmp_path: Path) -> None:
    changes = {"natural": "wrn_10_1", "epochs": 2}
    whole = run("lbgat", tmp_path / "whole", **changes)

    def stop(progress: Any) -> None:
        if progress.step == 4:
            raise Stop

    with pytest.raises(Stop):
        run("lbgat", tmp_path / "parts", on_step=stop, **changes)
    resumed = run("lbgat", tmp_path / "parts", **changes)
    assert states_equal(whole.model.state_dict(), resumed.model.state_dict())
    ends = [load_checkpoint(find_checkpoint(tmp_path / name)) for name in ("whole", "parts")]
    naturals = [unpack_weights(end.weights, "natural") for end in ends]
    assert states_equal(*naturals)


def test_the_natural_networks_weights_follow_the_seed_alone(tmp_path: Path) -> None:
    def drawn(seed: int) -> dict[str, torch.Tensor]:
        def build(name: str) -> nn.Module:
            assert name == "small_cnn"
            return SmallCNN(4, 1)

        runtime = Runtime(CPU, None, PhaseTimer(CPU), build=build)
        recipe = small_recipe("lbgat", natural="small_cnn", seed=seed)
        with torch.random.fork_rng():
            method: Any = find_method("lbgat")(recipe, make_model(0), runtime)
            method.initialise()
        return copied_state(method.natural)

    assert states_equal(drawn(1), drawn(1))
    assert not states_equal(drawn(1), drawn(2))


def test_the_official_natural_model_is_the_authors(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    words = "--preset official --train_images 32 --batch_size 16 --model small_cnn --quiet"
    assert train_quickly("lbgat", run_dir, *words.split()) == 0
    recipe = json.loads((run_dir / "run.json").read_text())["recipe"]
    assert recipe["natural"] == "resnet18_layer2_stride1"
    weights = load_checkpoint(find_checkpoint(run_dir)).weights
    natural = create_model("resnet18_layer2_stride1", 10, 1)
    natural.load_state_dict(unpack_weights(weights, "natural"))


@pytest.mark.parametrize("kind", [ActRecipe, LbgatRecipe])
@pytest.mark.parametrize("name", ["os:getcwd", "stack:2*small_cnn", "timm:a:b"])
def test_code_of_others_is_not_named_in_a_recipe(kind: Any, name: str) -> None:
    with pytest.raises(ValueError, match="natural must be the name of a model of fastadv or 'timm"):
        kind(natural=name)


def test_natural_networks_that_cannot_be_are_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"natural: name must be one of .* got 'small_cn'"):
        run("act", tmp_path / "a", natural="small_cn")
    with pytest.raises(
        ValueError, match=r"Runtime\.build must build natural 'small_cnn', got None"
    ):
        make_method("lbgat", make_model(0), natural="small_cnn")
    with pytest.raises(ValueError, match="natural must be None with fixed"):
        LbgatRecipe(fixed=True, natural="small_cnn")


@pytest.mark.parametrize("numbers", [{}, {"fixed": True}])
def test_clean_images_move_the_statistics_of_lbgat_without_divergence(
    numbers: dict[str, Any],
) -> None:
    """By one plain pass after that over the adversarial images, whose gradients they leave alone."""
    teacher = make_model(1, torch.float64) if numbers else None
    method = make_method("lbgat", make_model(0, torch.float64), teacher, **numbers)
    slow = make_model(0, torch.float64).train()
    batch = make_batch(dtype=torch.float64)
    adv = (batch.x + 0.05).clamp(0, 1)
    method.train_mode()
    method.training_loss(batch, Attacked(adv))
    slow(adv)
    only_adversarial = copied_state(slow)
    slow(batch.x)
    ours = method.model.state_dict()
    for key, value in slow.state_dict().items():
        assert torch.allclose(ours[key], value, rtol=1e-12)
    means = [key for key in ours if key.endswith("running_mean")]
    assert not any(torch.allclose(ours[k], only_adversarial[k], rtol=1e-2) for k in means)


class WithToken(nn.Module):
    """A network with a parameter that belongs to no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.full((16,), 0.5))
        self.fixed = nn.Parameter(torch.ones(16), requires_grad=False)
        self.first, self.last = nn.Linear(64, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x.flatten(1)) + self.token * self.fixed
        return self.last(torch.relu(hidden))


class Redrawn(WithToken):
    """The same network, which draws its parameters itself."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.token)


@pytest.mark.parametrize("name", ["act", "lbgat"])
def test_parameters_that_a_copy_cannot_draw_again_are_named(name: str) -> None:
    method: Any = make_method(name, WithToken())
    with pytest.warns(UserWarning, match=r"the model's own values of token, which") as warned:
        method.initialise()
    assert len(warned) == 1
    assert not torch.equal(method.natural.first.weight, method.model.first.weight)
    redrawn: Any = make_method(name, Redrawn())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        redrawn.initialise()
        make_method(name, make_model(0)).initialise()
    assert not torch.equal(redrawn.natural.token, redrawn.model.token)
