"""Details of the authors' scripts besides their schedules: starts of attacks, and what decays."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_afs import make_afs, make_stack, slow_logits
from test_methods import take_step
from test_pair_methods import ce, kl
from torch import Tensor, nn
from training_helpers import CPU, make_batch, make_method, make_model, small_recipe

from fastadv.models import create_model
from fastadv.ops import random_start
from fastadv.trainers import (
    AfsRecipe,
    Attacked,
    FastRecipe,
    FreeRecipe,
    Recipe,
    Runtime,
    find_method,
    method_names,
)
from fastadv.trainers.optim import build_optimizer
from fastadv.trainers.phases import PhaseTimer
from fastadv.trainers.unused import check_all_used

pytestmark = pytest.mark.usefixtures("one_thread")
DOUBLE = torch.float64


def ascend(x: Tensor, point: Tensor, value: Any, lowest: float, highest: float) -> Tensor:
    """Three steps of .05 in a ball of .1."""
    for _ in range(3):
        leaf = point.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(value(leaf).sum(), leaf)
        point = point + 0.05 * gradient.sign()
        point = torch.minimum(torch.maximum(point, x - 0.1), x + 0.1).clamp(lowest, highest)
    return point


def test_afs_with_triangular_noise_clips_its_images_at_the_end() -> None:
    stack = make_stack(2, DOUBLE)
    method = make_afs(stack, noise="triangular", eps=0.1, alpha=0.05)
    method.train_mode()
    batch = make_batch(dtype=DOUBLE)
    start = method.start_of(batch)
    assert start is not None and float((start - batch.x).abs().max()) <= 0.1
    free = ascend(batch.x, start, lambda z: ce(slow_logits(stack, z), batch.y), -9, 9)
    assert float(free.min()) < -0.01 and float(free.max()) > 1.01  # so that it shows when one clips
    assert torch.allclose(method.attack(batch).x, free.clamp(0, 1), rtol=0, atol=1e-12)


def test_triangular_noise_is_distributed_as_the_difference_of_two_uniform_draws() -> None:
    method = make_afs(make_stack(1, DOUBLE), noise="triangular", eps=0.1, alpha=0.05)
    batch = make_batch(400, DOUBLE)
    start = method.start_of(batch)
    assert start is not None
    noise = (start - batch.x).flatten() / 0.1
    assert float(noise.mean()) == pytest.approx(0, abs=0.01)
    assert float(noise.var()) == pytest.approx(1 / 6, abs=0.005)
    assert float((noise.abs() < 0.5).double().mean()) == pytest.approx(0.75, abs=0.01)
    assert AfsRecipe.preset("official").noise == "triangular" and AfsRecipe().noise == "uniform"
    with pytest.raises(ValueError, match="noise must be 'uniform' with norm 'l2'"):
        AfsRecipe(norm="l2", noise="triangular")


def test_dm_at_starts_from_uniform_noise_as_its_script() -> None:
    method: Any = make_method("dm_at", make_model(0, DOUBLE))
    batch = make_batch(dtype=DOUBLE)
    model = method.model.eval()
    clean = model(batch.x).detach()
    start = random_start(batch.x, 0.1, seed=batch.seed("attack"), sample_ids=batch.ids)
    adv = ascend(batch.x, start, lambda z: kl(clean, model(z)), 0, 1)
    method.train_mode()
    assert torch.allclose(method.attack(batch).x, adv, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="start_std has no effect with dm_at in linf"):
        check_all_used(find_method("dm_at"), small_recipe("dm_at", start_std=0.01))


@pytest.mark.parametrize(("name", "moves"), [("n_fgsm", 2), ("grad_align", 3), ("dm_at", 2)])
def test_official_presets_move_statistics_as_often_as_their_scripts(name: str, moves: int) -> None:
    mode = find_method(name).recipe_class.preset("official").attack_mode  # type: ignore[attr-defined]
    method: Any = make_method(name, make_model(0), attack_mode=mode, steps=1)
    before = int(method.model.bn1.num_batches_tracked)
    take_step(method, make_batch())
    assert int(method.model.bn1.num_batches_tracked) - before == moves == method.bn_updates


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_norms_do_not_decay_where_the_recipe_says_so(optimizer: Any) -> None:
    def moved(norm_decay: bool) -> dict[str, Tensor]:
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4))
        model.append(nn.Sequential(nn.Flatten(), nn.LayerNorm(4), nn.Linear(4, 2)))
        for parameter in model.parameters():
            nn.init.ones_(parameter)
            parameter.grad = torch.zeros_like(parameter)
        recipe = Recipe(optimizer=optimizer, lr=0.5, weight_decay=0.1, norm_decay=norm_decay)
        build_optimizer(model, recipe).step()
        return dict(model.named_parameters())

    for name, parameter in moved(True).items():
        assert torch.allclose(parameter, torch.full_like(parameter, 0.95)), name
    norms = {f"{norm}.{kind}" for norm in ("1", "2", "3.1") for kind in ("weight", "bias")}
    for name, parameter in moved(False).items():
        wanted = 1.0 if name in norms else 0.95
        assert torch.allclose(parameter, torch.full_like(parameter, wanted)), name


# Padding of the random crop, and whether weights and biases of norms decay. All others: 4 black pixels, and yes.
# Free and TLA have Madry's TensorFlow code. It enlarges images by 4 pixels in all, and only kernels decay.
AUGMENTATION = {
    "act": (4, "reflect", True),
    "dm_at": (4, "constant", False),
    "free": (2, "constant", False),
    "tla": (2, "constant", False),
    "zero_grad": (4, "reflect", True),
}


def test_official_presets_crop_and_decay_as_their_scripts() -> None:
    for name in method_names():
        kind = find_method(name).recipe_class
        assert kind().norm_decay, name
        if "official" in kind.presets:
            recipe = kind.preset("official")
            found = (recipe.pad, recipe.pad_mode, recipe.norm_decay)
            assert found == AUGMENTATION.get(name, (4, "constant", True)), name
            assert recipe.flip, name


def test_presets_for_imagenet_train_as_their_scripts() -> None:
    fast = FastRecipe.preset("imagenet")
    assert (fast.attack_mode, fast.norm_decay) == ("moving", False)
    assert FreeRecipe.preset("imagenet").norm_decay
    for name in method_names():
        kind = find_method(name).recipe_class
        if "imagenet" in kind.presets:
            assert kind.preset("imagenet").pad == 0, name


def test_las_ats_probe_decays_as_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = {}
    for norm_decay in (True, False):
        numbers = {"weight_decay": 0.1, "norm_decay": norm_decay}
        method: Any = make_method("las_at", make_model(0, DOUBLE), **numbers)
        batch = make_batch(dtype=DOUBLE)
        ends[norm_decay] = method._trained_copy(batch, batch.x)[0].state_dict()
    before = dict(make_model(0, DOUBLE).named_parameters())
    for name, value in before.items():
        step = ends[False][name] - ends[True][name]
        wanted = 0.05 * 0.1 * value if name.startswith("bn") else torch.zeros_like(value)
        assert torch.allclose(step, wanted, rtol=1e-9, atol=1e-12), name


def test_a_natural_copy_draws_its_weights_as_its_network_does() -> None:
    """Of the networks that are built by name, none begins with another spread than the robust model beside it."""
    for network in ("resnet18_imagenet", "wrn_10_1", "preact_resnet18", "vgg16_bn", "resnet18"):
        torch.manual_seed(0)
        model = create_model(network, 4, 1)
        runtime = Runtime(CPU, None, PhaseTimer(CPU))
        method: Any = find_method("act")(small_recipe("act"), model, runtime)
        method.initialise()
        drawn = dict(method.natural.named_parameters())
        for name, ours in model.named_parameters():
            theirs = drawn[name]
            if ours.numel() > 2000:
                assert not torch.equal(ours, theirs), (network, name)
                assert float(theirs.detach().std()) == pytest.approx(
                    float(ours.detach().std()), rel=0.1
                ), name
            elif float(ours.detach().std(correction=0)) == 0:
                assert torch.equal(ours, theirs), (network, name)


def test_a_network_of_others_is_built_anew_beside_the_robust_one() -> None:
    built: list[str] = []

    def build(name: str) -> nn.Module:
        built.append(name)
        return make_model(7)

    for network, wanted in (("timm:resnet18", ["timm:resnet18"]), ("small_cnn", []), (None, [])):
        built.clear()
        runtime = Runtime(CPU, None, PhaseTimer(CPU), build=build, network=network)
        method: Any = find_method("act")(small_recipe("act"), make_model(0), runtime)
        method.initialise()
        assert built == wanted
        if wanted:  # its own weights stay
            assert torch.equal(method.natural.conv1.weight, make_model(7).conv1.weight)


@pytest.mark.parametrize(("name", "last"), [("rst", "clean"), ("trades", "adversarial")])
def test_statistics_move_in_the_order_of_the_authors_passes(name: str, last: str) -> None:
    method: Any = make_method(name, make_model(0, DOUBLE))
    method.train_mode()
    batch = make_batch(dtype=DOUBLE)
    adv = (batch.x + 0.1 * batch.x.mul(50).sin().sign()).clamp(0, 1)
    model = copy.deepcopy(method.model)
    method.training_loss(batch, Attacked(adv))
    for x in (adv, batch.x) if last == "clean" else (batch.x, adv):
        model(x)
    for ours, expected in zip(method.model.buffers(), model.buffers(), strict=True):
        assert torch.allclose(ours, expected, rtol=1e-12, atol=0)
