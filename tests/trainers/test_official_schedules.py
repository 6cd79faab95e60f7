"""Learning rate and momentum of the authors' scripts, epoch by epoch, as the preset "official" has them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from training_helpers import make_model, small_data, small_recipe

from fastadv.trainers import (
    Cyclic,
    DmAtRecipe,
    EpochOneCycle,
    FastRecipe,
    HatRecipe,
    MartRecipe,
    MultiStep,
    OneCycle,
    Recipe,
    find_method,
    method_names,
    train,
)

pytestmark = pytest.mark.usefixtures("one_thread")

# How many epochs in a row each script trains at which rate.
TABLES: dict[str, list[tuple[int, float]]] = {
    # Epochs count from 1; `epoch >= 75` sets a tenth.
    "trades": [(74, 0.1), (2, 0.01)],
    "mart": [(74, 0.01), (15, 0.001), (10, 0.0001), (21, 0.00001)],
    "fat": [(59, 0.1), (30, 0.01), (20, 0.001), (11, 0.0005)],
    "act": [(59, 0.1), (60, 0.02), (40, 0.004), (41, 0.0008)],
    "lbgat": [(1, 0.02), (74, 0.1), (15, 0.01), (10, 0.001)],
    # Epochs count from 0, and the scheduler steps after each: 50 of them come before the first drop.
    "kd_at": [(50, 0.1), (100, 0.01), (50, 0.001)],
    # Piecewise constant in the steps of 50 images, 1,000 for each epoch.
    "tla": [(50, 0.1), (10, 0.01), (20, 0.001)],
    # Stepped after each epoch.
    "sat": [(40, 0.05), (20, 0.005), (20, 0.0005), (20, 0.00005)],
    # Epochs count from 1; `epoch >= 100` sets a tenth.
    # Stepped after each update: milestones at 99/110 and 104/110 of them.
    "las_at": [(99, 0.1), (5, 0.01), (6, 0.001)],
    "s2o": [(99, 0.1), (50, 0.01), (51, 0.001)],
    # Epochs count from 0; those whose number plus 1 is a multiple of 3 and of 6 drop first.
    "afs": [(2, 0.1), (3, 0.01), (2, 0.001)],
    # Piecewise constant in the updates, 8 for each of 390 batches: the 13th epoch begins before the 40,000th, the
    # 20th before the 60,000th.
    "free": [(13, 0.1), (7, 0.01), (6, 0.001)],
}
STEP_BY_STEP = {"hat", "fast", "rst", "n_fgsm", "grad_align", "zero_grad", "dm_at"}


def spelled_out(pieces: list[tuple[int, float]]) -> list[float]:
    return [rate for count, rate in pieces for _ in range(count)]


@pytest.mark.parametrize("name", TABLES)
def test_every_epoch_has_the_rate_of_the_authors_script(name: str) -> None:
    recipe = find_method(name).recipe_class.preset("official")
    rates = [recipe.lr_at(epoch) for epoch in range(recipe.epochs)]
    assert rates == pytest.approx(spelled_out(TABLES[name]), rel=1e-12)
    assert {recipe.momentum_at(epoch) for epoch in range(recipe.epochs)} == {0.9}
    if name != "free":  # within an epoch nothing changes
        ends = [recipe.lr_at(epoch + 389 / 390) for epoch in range(recipe.epochs)]
        assert ends == rates


def test_mart_has_the_rates_of_its_script_for_wide_networks() -> None:
    recipe = MartRecipe.preset("wrn")
    rates = [recipe.lr_at(epoch) for epoch in range(recipe.epochs)]
    assert rates == pytest.approx(spelled_out([(74, 0.1), (15, 0.01), (1, 0.001)]), rel=1e-12)
    assert (recipe.weight_decay, recipe.beta, recipe.code_constants) == (7e-4, 6.0, True)


def test_every_official_preset_is_held_against_its_script() -> None:
    official = {n for n in method_names() if "official" in find_method(n).recipe_class.presets}
    assert official == set(TABLES) | STEP_BY_STEP


@pytest.mark.parametrize("drop", [40_000, 60_000])
def test_frees_drops_come_at_their_updates(drop: int) -> None:
    recipe = find_method("free").recipe_class.preset("official")
    epoch, batch = divmod(drop // 8, 390)
    rates = [recipe.lr_at(epoch + (batch + shift) / 390) for shift in (-1, 1)]
    assert rates[1] == pytest.approx(rates[0] / 10)


def scheduled(
    scheduler_of: Any, lr: float, steps: int, nesterov: bool
) -> list[tuple[float, float]]:
    """Rate and momentum of each step under one of torch's schedulers, which the scripts use."""
    optimizer = torch.optim.SGD(
        [torch.nn.Parameter(torch.zeros(1))], lr=lr, momentum=0.9, nesterov=nesterov
    )
    scheduler = scheduler_of(optimizer)
    seen = []
    for _ in range(steps):
        group = optimizer.param_groups[0]
        seen.append((group["lr"], group["momentum"]))
        optimizer.step()
        scheduler.step()
    return seen


def ours(recipe: Recipe, per_epoch: int) -> list[tuple[float, float]]:
    places = [step / per_epoch for step in range(recipe.epochs * per_epoch)]
    return [(recipe.lr_at(place), recipe.momentum_at(place)) for place in places]


def test_fast_cycles_rate_and_momentum_as_its_script() -> None:
    recipe = FastRecipe.preset("official")
    steps = recipe.epochs * 391
    theirs = scheduled(
        lambda o: torch.optim.lr_scheduler.CyclicLR(
            o, base_lr=0.0, max_lr=0.2, step_size_up=steps / 2, step_size_down=steps / 2
        ),
        0.2,
        steps,
        nesterov=False,
    )
    for mine, other in zip(ours(recipe, 391), theirs, strict=True):
        assert mine == pytest.approx(other, abs=1e-12)
    assert max(rate for rate, _ in theirs) == pytest.approx(0.2, rel=1e-3)


def test_hat_cycles_rate_and_momentum_as_its_script() -> None:
    recipe = HatRecipe.preset("official")
    assert recipe.epochs == 50 and recipe.nesterov
    theirs = scheduled(
        lambda o: torch.optim.lr_scheduler.OneCycleLR(
            o, max_lr=0.21, pct_start=0.25, steps_per_epoch=391, epochs=50
        ),
        0.21,
        50 * 391,
        nesterov=True,
    )
    # Torch's curve is one step short of the run, ours is a function of the part that is done.
    for mine, other in zip(ours(recipe, 391), theirs, strict=True):
        assert mine == pytest.approx(other, abs=1e-4)
    rates = [rate for rate, _ in ours(recipe, 391)]
    assert rates.index(max(rates)) == pytest.approx(0.25 * 50 * 391, abs=1)


@pytest.mark.parametrize("kind", [Cyclic, OneCycle])
def test_momenta_are_both_given_and_in_range(kind: Any) -> None:
    assert kind().momentum(1.0, 10) is None
    for wrong in (
        {"base_momentum": 0.8},
        {"max_momentum": 0.9},
        {"base_momentum": 0.9, "max_momentum": 0.8},
        {"base_momentum": -0.1, "max_momentum": 0.8},
        {"base_momentum": 0.8, "max_momentum": 1.0},
    ):
        with pytest.raises(
            ValueError, match=r"base_momentum (and max_momentum must both be None|must be finite)"
        ):
            kind(**wrong)


def test_a_momentum_that_the_schedule_would_overrule_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"momentum must be left at 0.9 with a OneCycle .* got 0.5"
    ):
        HatRecipe(momentum=0.5)
    plain = HatRecipe(momentum=0.5, schedule=MultiStep())
    assert plain.momentum_at(3) == 0.5
    with pytest.raises(ValueError, match="must be left at"):
        replace(plain, schedule=Cyclic(0.5, 0.8, 0.9))


def test_each_step_is_taken_at_its_momentum(tmp_path: Path) -> None:
    """Three steps an epoch of SGD by hand, whose momentum moves, against a run."""
    recipe = small_recipe(
        "standard", schedule=Cyclic(0.5, 0.2, 0.8), epochs=2, weight_decay=0.0, batch_size=24, pad=0
    )
    seen: list[Any] = []

    class Recording(find_method("standard")):  # type: ignore[misc]
        name = "recording"

        def training_loss(self, batch: Any, adv: Any) -> Any:
            seen.append((batch.x.clone(), batch.y.clone()))
            return super().training_loss(batch, adv)

    model = make_model(0)
    slow = make_model(0).train()
    options: dict[str, Any] = {"run_dir": tmp_path / "run", "progress": False, "device": "cpu"}
    train(Recording, recipe, data=small_data(), model=model, **options)
    velocity = [torch.zeros_like(p) for p in slow.parameters()]
    for step, (x, y) in enumerate(seen):
        height = 1 - abs(step / 3 - 1)  # up to the end of the first of two epochs, then down
        rate, momentum = 0.05 * height, 0.8 - 0.6 * height
        slow.zero_grad()
        torch.nn.functional.cross_entropy(slow(x), y).backward()
        with torch.no_grad():
            for parameter, v in zip(slow.parameters(), velocity, strict=True):
                v.mul_(momentum if step else 0).add_(parameter.grad)
                parameter -= rate * v
    assert len(seen) == 6
    for a, b in zip(model.parameters(), slow.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def test_rsts_cosine_has_the_rate_of_its_script() -> None:
    recipe = find_method("rst").recipe_class.preset("official")
    theirs = [0.1 * 0.5 * (1 + math.cos((epoch - 1) / 200 * math.pi)) for epoch in range(1, 201)]
    for place in (0, 0.5, 195 / 196):  # within an epoch nothing changes
        rates = [recipe.lr_at(epoch + place) for epoch in range(recipe.epochs)]
        assert rates == pytest.approx(theirs, rel=1e-12)
    assert recipe.nesterov and recipe.momentum == 0.9


@pytest.mark.parametrize(
    ("name", "peak", "top"), [("n_fgsm", 15, 0.2), ("grad_align", 12, 0.3), ("zero_grad", 15, 0.2)]
)
def test_one_step_methods_have_the_triangles_of_their_scripts(
    name: str, peak: int, top: float
) -> None:
    recipe = find_method(name).recipe_class.preset("official")
    assert recipe.epochs == 30
    for step in range(30 * 7):
        place = step / 7
        up, down = place / peak, (30 - place) / (30 - peak)
        assert recipe.lr_at(place) == pytest.approx(top * min(up, down), abs=1e-12)
    if name == "n_fgsm":  # CyclicLR's own momenta
        assert [recipe.momentum_at(e) for e in (0, 15, 30)] == pytest.approx([0.9, 0.8, 0.9])
    else:
        assert {recipe.momentum_at(e) for e in range(30)} == {0.9}


def test_dm_ats_cycle_is_that_of_its_script() -> None:
    recipe = DmAtRecipe.preset("official")
    theirs = scheduled(
        lambda o: torch.optim.lr_scheduler.OneCycleLR(
            o, max_lr=0.2, pct_start=0.025, total_steps=400
        ),
        0.2,
        400,
        nesterov=True,
    )
    for epoch, (rate, momentum) in enumerate(theirs):  # the script steps once for each epoch
        for place in (epoch, epoch + 0.99):
            assert recipe.lr_at(place) == pytest.approx(rate, rel=1e-12)
            assert recipe.momentum_at(place) == pytest.approx(momentum, rel=1e-12)
    assert DmAtRecipe().lr_at(10) == pytest.approx(
        0.2
    )  # step by step, the top after .025 of the run


@pytest.mark.parametrize("epochs", [1, 2, 7, 40])
def test_a_cycle_by_epochs_stands_in_short_runs_too(epochs: int) -> None:
    schedule = EpochOneCycle(peak=0.025, base_momentum=0.85, max_momentum=0.95)
    for epoch in range(epochs + 1):
        assert 0 < schedule.factor(epoch, epochs) <= 1
        momentum = schedule.momentum(epoch, epochs)
        assert momentum is not None and 0.85 <= momentum <= 0.95
