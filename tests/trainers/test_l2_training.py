"""Training in l2: what recipes begin with, and attacks, starts, noise and looks against plain loops."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from command_helpers import train_quickly
from test_baselines import SlowSGD, updating
from test_methods import take_step
from test_pair_methods import ce, kl
from test_recipe_starts import printed
from torch import Tensor
from training_helpers import (
    CPU,
    copied_state,
    make_batch,
    make_method,
    make_model,
    small_data,
    small_recipe,
    states_equal,
)

from fastadv.attacks import PGD, uniform_radius_start
from fastadv.cli import main
from fastadv.evaluation import load_results
from fastadv.ops import random_start
from fastadv.seeding import derive_seed
from fastadv.trainers import (
    AdversarialRecipe,
    ArrestRecipe,
    LbgatRecipe,
    Runtime,
    TradesRecipe,
    VfdRecipe,
    find_method,
    method_names,
    train,
)
from fastadv.trainers.fast import FastRecipe
from fastadv.trainers.free import FreeRecipe
from fastadv.trainers.monitor import Monitor
from fastadv.trainers.phases import PhaseTimer

pytestmark = pytest.mark.usefixtures("one_thread")
DOUBLE = torch.float64
L2: dict[str, Any] = {"norm": "l2", "eps": 0.8, "alpha": 0.3}


def make(name: str, dtype: torch.dtype = torch.float32, **numbers: Any) -> Any:
    """Any method but AFS in l2, with the frozen models that it needs."""
    kind, recipe = find_method(name), small_recipe(name, **{**L2, **numbers})
    teachers = {
        role: make_model(i, dtype) for i, role in enumerate(kind.teachers_needed(recipe), 1)
    }
    return kind(recipe, make_model(0, dtype), Runtime(CPU, None, PhaseTimer(CPU)), teachers)


def slow_pgd(start: Tensor, x: Tensor, value: Any, steps: int, eps: float, alpha: float) -> Tensor:
    """The steps of robust_overfitting's loop in l2, one image at a time."""
    points = []
    for i, point in enumerate(start):
        for _ in range(steps):
            leaf = point.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(value(leaf[None], i), leaf)
            delta = point + alpha * gradient / gradient.square().sum().sqrt() - x[i]
            delta = delta * min(1.0, eps / float(delta.square().sum().sqrt()))
            point = (x[i] + delta).clamp(0, 1)
        points.append(point)
    return torch.stack(points)


@pytest.mark.parametrize("start", ["ball", "radius"])
def test_pgd_at_attacks_as_a_plain_loop_in_l2(start: str) -> None:
    method = make("pgd_at", DOUBLE, l2_start=start)
    batch, model = make_batch(dtype=DOUBLE), copy.deepcopy(method.model).eval()
    seed = batch.seed("attack")
    if start == "ball":
        begin = random_start(batch.x, 0.8, "l2", seed=seed, sample_ids=batch.ids)
    else:
        begin = uniform_radius_start(batch.x, 0.8, seed=seed, sample_ids=batch.ids)
    slow = slow_pgd(
        begin, batch.x, lambda z, i: ce(model(z), batch.y[i : i + 1]).sum(), 3, 0.8, 0.3
    )
    assert torch.allclose(method.attack(batch).x, slow, rtol=0, atol=1e-9)
    rows = torch.tensor([5, 2])  # some of the images start where they would among all
    some = method.perturb(batch, rows)
    assert torch.allclose(some[rows], slow[rows], rtol=0, atol=1e-9)
    assert torch.equal(some[[0, 1]], batch.x[[0, 1]])


@pytest.mark.parametrize(("name", "objective"), [("trades", "kl"), ("mart", "ce"), ("hat", "kl")])
def test_pair_methods_attack_as_a_plain_loop_in_l2(name: str, objective: str) -> None:
    method = make(name, DOUBLE)
    batch, model = make_batch(dtype=DOUBLE), copy.deepcopy(method.model).eval()
    clean = model(batch.x).detach()

    def value(z: Tensor, i: int) -> Tensor:
        logits = model(z)
        both = ce(logits, batch.y[i : i + 1]), kl(clean[i : i + 1], logits)
        return both[objective == "kl"].sum()

    slow = slow_pgd(method.start_of(batch), batch.x, value, 3, 0.8, 0.3)
    assert torch.allclose(method.attack(batch).x, slow, rtol=0, atol=1e-8)


def methods_in_l2() -> list[str]:
    names = sorted(set(method_names()) - {"standard", "afs", "free"})
    return [name for name in names if "l2" in find_method(name).recipe_class.norms]  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", methods_in_l2())
@pytest.mark.parametrize("numbers", [{}, {"awp_gamma": 0.01}])
def test_every_method_stays_in_the_l2_ball(name: str, numbers: dict[str, Any]) -> None:
    method, batch = make(name, **numbers), make_batch()
    adv = method.attack(batch).x
    moved = (adv - batch.x).flatten(1).norm(dim=1)
    assert float(moved.max()) <= 0.8 * (1 + 1e-5) and float(moved.mean()) > 0.2
    assert float(adv.min()) >= 0 and float(adv.max()) <= 1
    before = copied_state(method.model)
    take_step(method, batch)
    after = method.model.state_dict()
    assert not states_equal(before, after)
    assert all(bool(value.isfinite().all()) for value in after.values())


def test_free_equals_a_plain_loop_in_l2() -> None:
    model = make_model(0, DOUBLE)
    slow_models = {"model": copy.deepcopy(model).train()}
    method: Any = make_method("free", model, steps=3, **L2)
    method.train_mode()
    optimizer, batch = SlowSGD(), make_batch(dtype=DOUBLE)
    delta = torch.zeros_like(batch.x)
    method.step(batch, updating(method))
    for _ in range(3):
        leaf = (batch.x + delta).clamp(0, 1).requires_grad_()
        inside = (batch.x + delta >= 0) & (batch.x + delta <= 1)
        loss = ce(slow_models["model"](leaf), batch.y).mean()
        (gradient,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        optimizer.step(slow_models, loss)
        gradient = gradient * inside
        delta = delta + 0.3 * gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        length = delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        delta = delta * (0.8 / length).clamp(max=1)
    assert torch.allclose(method.state()["delta"], delta, rtol=0, atol=1e-12)
    assert float(delta.flatten(1).norm(dim=1).max()) == pytest.approx(0.8)
    assert float(delta.abs().max()) < 0.79


@pytest.mark.parametrize("start", ["ball", "radius"])
def test_arrests_noise_is_in_the_l2_ball(start: str) -> None:
    method, batch = make("arrest", DOUBLE, phi=0.0, l2_start=start), make_batch(dtype=DOUBLE)
    out = method.attack(batch)
    assert float(out.replayed) == 1
    seed = batch.seed("replay")
    if start == "ball":
        noise = random_start(batch.x, 0.8, "l2", seed=seed, sample_ids=batch.ids)
    else:
        noise = uniform_radius_start(batch.x, 0.8, seed=seed, sample_ids=batch.ids)
    assert torch.equal(out.x, noise)
    assert float((out.x - batch.x).flatten(1).norm(dim=1).max()) <= 0.8


def test_the_uniform_radius_is_uniform_and_the_direction_that_of_the_ball() -> None:
    x = torch.full((4000, 1, 6, 6), 0.5, dtype=DOUBLE)
    eps = torch.linspace(0.2, 0.4, 4000, dtype=DOUBLE)
    noise = (uniform_radius_start(x, eps, (-9.0, 9.0), seed=4) - x).flatten(1)
    share = noise.norm(dim=1) / eps
    spread = (share.sort().values - torch.arange(4000, dtype=DOUBLE) / 4000).abs().max()
    assert float(spread) < 1.63 / math.sqrt(4000)  # Kolmogorov and Smirnov's bound at 1 %
    ball = (random_start(x, 1.0, "l2", (-9.0, 9.0), 4) - x).flatten(1)
    unit = noise / noise.norm(dim=1, keepdim=True)
    assert torch.allclose(unit, ball / ball.norm(dim=1, keepdim=True), atol=1e-6)
    correlation = torch.corrcoef(torch.stack((share, ball.norm(dim=1))))[0, 1]
    assert abs(float(correlation)) < 0.06  # the radius has numbers of its own


def test_a_start_depends_on_seed_and_sample_alone() -> None:
    x, ids = torch.rand(6, 2, 5, 5), torch.tensor([7, 3, 9, 1, 0, 5])
    all_of_them = uniform_radius_start(x, 0.5, seed=2, sample_ids=ids)
    some = uniform_radius_start(x[[4, 1]], 0.5, seed=2, sample_ids=ids[[4, 1]])
    assert torch.equal(some, all_of_them[[4, 1]])
    assert not torch.equal(uniform_radius_start(x, 0.5, seed=3, sample_ids=ids), all_of_them)
    assert float(all_of_them.min()) >= 0 and float(all_of_them.max()) <= 1
    layout = x.to(memory_format=torch.channels_last)
    assert torch.equal(uniform_radius_start(layout, 0.5, seed=2, sample_ids=ids), all_of_them)
    with pytest.raises(TypeError, match="x must be float32"):
        uniform_radius_start(torch.zeros(2, 3, dtype=torch.int64), 0.5, seed=1)


def test_the_run_is_watched_in_l2(tmp_path: Path) -> None:
    recipe: Any = small_recipe("pgd_at", **L2, monitor_images=24)
    model, data = make_model(), small_data()
    found = Monitor(model, data.test, recipe, Runtime(CPU, None, PhaseTimer(CPU))).validate()
    x, y = data.test.images.float() / 255, data.test.labels
    adv = PGD(model, 0.8, 0.2, 2, norm="l2", precision="fp32")(
        x, y, seed=derive_seed(recipe.seed, "monitor")
    )
    with torch.no_grad():
        correct = (model.eval()(adv).argmax(1) == y).double().mean()
    assert found.robust == pytest.approx(float(correct))


def test_recipes_begin_with_the_usual_radius_in_l2() -> None:
    usual = (128 / 255, 15 / 255)
    for recipe in (
        AdversarialRecipe(norm="l2"),
        ArrestRecipe(norm="l2"),
        TradesRecipe.preset("official", norm="l2"),
        VfdRecipe(base="hat", norm="l2"),
        LbgatRecipe(fixed=True, norm="l2"),
        LbgatRecipe.preset("paper", fixed=True, norm="l2"),
    ):
        assert (recipe.eps, recipe.alpha, recipe.norm) == (*usual, "l2")
    assert VfdRecipe(base="hat", norm="l2").epochs == 50
    assert (FastRecipe(norm="l2").alpha, FreeRecipe(norm="l2").alpha) == (160 / 255, 128 / 255)
    given = AdversarialRecipe(norm="l2", eps=1.0)
    assert (given.eps, given.alpha) == (1.0, 15 / 255)
    assert dataclasses.replace(given, steps=3) == AdversarialRecipe(norm="l2", eps=1.0, steps=3)
    assert AdversarialRecipe().eps == 8 / 255
    assert AdversarialRecipe(norm="l2", eps=2.5).eps == 2.5  # beyond what linf allows
    with pytest.raises(ValueError, match=r"norm must be one of linf, l2"):
        AdversarialRecipe(norm="l1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"norm must be chosen .* write VfdRecipe\(norm='l2'"):
        dataclasses.replace(VfdRecipe(), norm="l2")


def test_the_command_line_begins_with_the_usual_radius_in_l2(
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = printed(capsys, "mart", "--norm", "l2", "--data", "digits", "--run", "x")
    assert (options["eps"], options["alpha"]) == (128 / 255, 15 / 255)
    options = printed(
        capsys, "pgd_at", "--norm=l2", "--eps", "1/2", "--data", "digits", "--run", "x"
    )
    assert (options["eps"], options["alpha"]) == (0.5, 15 / 255)


@pytest.mark.parametrize(
    ("name", "numbers", "words"),
    [
        ("pgd_at", {"l2_start": "radius"}, "l2_start has no effect with norm linf"),
        ("trades", {**L2, "l2_start": "radius"}, "l2_start has no effect beside start_std"),
        (
            "pgd_at",
            {**L2, "l2_start": "radius", "random_start": False},
            "l2_start has no effect with random_start false",
        ),
    ],
)
def test_a_start_that_nothing_uses_is_refused(
    name: str, numbers: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        train(
            name,
            small_recipe(name, **numbers),
            data=small_data(),
            model=make_model(),
            run_dir=tmp_path / "run",
        )


def test_a_radius_beyond_all_images_is_refused() -> None:
    for name in ("pgd_at", "free"):
        with pytest.raises(ValueError, match="eps must be at most 8 in l2"):
            make(name, eps=9.0).attack(make_batch())


def test_a_run_in_l2_is_judged_in_l2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert train_quickly("pgd_at", run, "--norm", "l2", "--train_images", "128") == 0
    err = capsys.readouterr().err
    assert "attack: PGD-2 in l2 on 0.1 = 25.5/255, steps of 12.75/255" in err
    assert "best checkpoint: by accuracy under PGD-2 in l2 of" in err
    words = ["eval", str(run), "--attacks", "pgd-2", "--max_examples", "20", "--quiet"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "Judged at 0.1 l2, where the run was trained. --norm linf judges it in linf." in out
    assert main([*words, "--norm", "linf"]) == 0
    out = capsys.readouterr().out
    assert "Judged at 8/255 linf, the default." in out
    assert "The run was trained at 0.1 l2: --eps 0.1 --norm l2 judges it there." in out
    found = [(result.norm, result.row.eps) for result in load_results(run / "eval.json")]
    assert found == [("l2", 0.1), ("linf", 8 / 255)]
    assert main([*words, "--bounds", "-1", "1"]) == 2
    assert "eps must be given with norm l2" in capsys.readouterr().err


@pytest.mark.parametrize("l2_start", ["ball", "radius"])
def test_noise_that_replaces_images_stays_in_0_to_1(l2_start: str) -> None:
    method, batch = make("arrest", l2_start=l2_start), make_batch()
    batch = dataclasses.replace(batch, x=batch.x.round())
    clipped, free = (method.random_point(batch, "replay", clip) for clip in (True, False))
    assert torch.equal(clipped, free.clamp(0, 1)) and not torch.equal(clipped, free)


def test_dm_at_begins_in_l2_with_the_noise_of_trades() -> None:
    batch = make_batch()
    starts = [make(name).start_of(batch) for name in ("dm_at", "trades")]
    assert torch.equal(*starts) and not torch.equal(starts[0], batch.x)
    assert make_method("dm_at", make_model(0)).start_of(batch) is None  # in linf PGD's own
