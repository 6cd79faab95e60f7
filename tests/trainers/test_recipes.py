"""Recipes, schedules and methods by name, and the formulas of the optimizer and the average."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from training_helpers import (
    copied_state,
    make_model,
)

from fastadv.trainers import (
    AdversarialRecipe,
    ArrestRecipe,
    Constant,
    Cosine,
    Cyclic,
    MultiStep,
    OneCycle,
    Piecewise,
    Recipe,
    Settings,
    Standard,
    Step,
    find_method,
    method_names,
)
from fastadv.trainers.number import parse_number
from fastadv.trainers.optim import WeightAverage, build_optimizer, load_optimizer_state

pytestmark = pytest.mark.usefixtures("one_thread")


def test_arrest_has_the_learning_rates_of_its_paper() -> None:
    recipe = ArrestRecipe()
    rates = [recipe.lr_at(epoch) for epoch in range(recipe.epochs)]
    later = [0.02, 0.02, 0.01, 0.01, 0.005, 0.005, 0.0025, 0.0025, 0.00125, 0.00125]
    assert rates == pytest.approx([0.025] * 10 + later)


def test_standard_training_has_the_learning_rates_of_its_paper() -> None:
    recipe = Recipe()
    rates = [recipe.lr_at(epoch) for epoch in (0, 74, 75, 89, 90, 99)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_recipes_have_the_numbers_of_the_papers() -> None:
    arrest, at = ArrestRecipe(), AdversarialRecipe()
    assert (arrest.epochs, arrest.lam, arrest.replay_epochs, arrest.steps) == (20, 50, 10, 10)
    assert arrest.tau == pytest.approx(0.13397, abs=1e-5)
    assert ArrestRecipe(phi=45).tau == pytest.approx(0.29289, abs=1e-5)
    for recipe in (arrest, at):
        assert (recipe.eps * 255, recipe.alpha * 255) == pytest.approx((8, 2))
        assert (recipe.momentum, recipe.weight_decay, recipe.batch_size) == (0.9, 5e-4, 128)
    assert at.epochs == 100


@pytest.mark.parametrize(
    ("schedule", "epochs", "factors"),
    [
        (Constant(), (0, 5), (1, 1)),
        (Step(2, 0.5), (0, 1.9, 2, 4), (1, 1, 0.5, 0.25)),
        (MultiStep((2, 4), 0.1), (1.99, 2, 4.5), (1, 0.1, 0.01)),
        (Piecewise((0, 3), (1.0, 0.3)), (2.9, 3), (1, 0.3)),
        (Cosine(), (0, 5, 10), (1, 0.5, 0)),
        (Cosine(floor=0.1), (10,), (0.1,)),
        (Cyclic(0.4), (0, 2, 4, 7, 10), (0, 0.5, 1, 0.5, 0)),
        (OneCycle(0.4, start=0.2, floor=0.0), (0, 2, 4, 7, 10), (0.2, 0.6, 1, 0.5, 0)),
    ],
)
def test_schedules(schedule: Any, epochs: tuple[float, ...], factors: tuple[float, ...]) -> None:
    assert [schedule.factor(e, 10) for e in epochs] == pytest.approx(factors, abs=1e-12)


def test_a_warm_up_goes_on_top_of_the_schedule() -> None:
    recipe = Recipe(epochs=10, lr=0.2, warmup=2.0, schedule=MultiStep((1, 4), 0.1))
    rates = [recipe.lr_at(epoch) for epoch in (0, 0.5, 1, 2, 3, 4)]
    assert rates == pytest.approx([0, 0.05, 0.01, 0.02, 0.02, 0.002])
    with pytest.raises(ValueError, match="warmup must be >= 0, got -1"):
        Recipe(warmup=-1)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Recipe(epochs=0), "epochs must be >= 1, got 0"),
        (lambda: Recipe(lr=float("nan")), "lr must be finite and >= 0, got nan"),
        (lambda: AdversarialRecipe(eps=float("inf")), "eps must be finite and >= 0, got inf"),
        (lambda: Recipe(ema_decay=1.0), "ema_decay must be"),
        (lambda: Recipe(clip_grad_norm=0.0), "clip_grad_norm must be > 0"),
        (lambda: AdversarialRecipe(eps=-0.1), "eps must be >= 0, got -0.1"),
        (lambda: ArrestRecipe(phi=91), "phi must be between 0 and 90"),
        (lambda: ArrestRecipe(distance="cosine"), "distance must be one of angular, mse, att"),
        (lambda: ArrestRecipe(distance="logits"), "attention, logits_mse, logits_kl, got 'logits'"),
        (lambda: ArrestRecipe(replay_with="x"), "replay_with must be one of noise, clean, got 'x'"),
        (lambda: ArrestRecipe(temperature=0), "temperature must be >= 0.001, got 0"),
        (lambda: MultiStep((90, 75)), "milestones must be ascending"),
        (lambda: Piecewise((0, 5), (1.0,)), "factors must have one number"),
        (lambda: Settings(keep=0), "keep must be >= 1"),
    ],
)
def test_numbers_out_of_range_are_named(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    ("text", "number"), [("8/255", 8 / 255), ("-1/2", -0.5), ("1e-3", 1e-3), (3, 3.0), ("2", 2.0)]
)
def test_numbers_may_be_fractions(text: Any, number: float) -> None:
    assert parse_number(text) == number


@pytest.mark.parametrize("text", ["8/0", "x", "", "1/2/3", "nan", None, True, "inf"])
def test_what_is_no_number_is_refused(text: Any) -> None:
    with pytest.raises(ValueError, match="a number or a fraction such as 8/255"):
        parse_number(text)


def test_methods_are_found_by_name() -> None:
    later = ["trades", "mart", "alp", "hat", "vfd", "act", "lbgat", "afs", "fast"]
    later += ["free", "fat", "kd_at", "tla", "s2o", "las_at", "sat", "rst"]
    later += ["n_fgsm", "grad_align", "zero_grad", "dm_at"]
    assert method_names() == ["standard", "pgd_at", "arrest", *later]
    assert find_method("PGD-AT") is find_method("pgd_at")
    assert find_method(Standard) is Standard
    with pytest.raises(ValueError, match="did you mean 'arrest'"):
        find_method("arest")


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_equals_its_formula(channels_last: bool, nesterov: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    if channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    recipe = Recipe(lr=0.3, momentum=0.8, weight_decay=0.01, nesterov=nesterov)
    optimizer = build_optimizer(model, recipe)
    expected = [p.detach().double().clone() for p in model.parameters()]
    momenta = [torch.zeros_like(p) for p in expected]
    for _ in range(3):
        loss = model(torch.randn(2, 3, 6, 6)).square().mean() + sum(
            p.square().sum() for p in model.parameters()
        )
        optimizer.zero_grad()
        loss.backward()
        for i, parameter in enumerate(model.parameters()):
            gradient = parameter.grad.double() + 0.01 * expected[i]
            momenta[i] = 0.8 * momenta[i] + gradient
            step = gradient + 0.8 * momenta[i] if nesterov else momenta[i]
            expected[i] = expected[i] - 0.3 * step
        optimizer.step()
        # A saved state, here in another memory layout, goes on the same way.
        state = copy.deepcopy(optimizer.state_dict())
        for entry in state["state"].values():
            entry["momentum_buffer"] = entry["momentum_buffer"].contiguous()
        optimizer = build_optimizer(model, recipe)
        load_optimizer_state(optimizer, state)
    for parameter, value in zip(model.parameters(), expected, strict=True):
        assert torch.allclose(parameter.double(), value, rtol=1e-5, atol=1e-6)


def test_weight_average_equals_its_formula() -> None:
    model = make_model(0)
    average = WeightAverage(model, 0.9)
    expected = {n: v.double().clone() for n, v in model.state_dict().items()}
    for step in range(1, 40):
        with torch.no_grad():
            for value in model.state_dict().values():
                value += 1
        average.update(model, step)
        decay = min(0.9, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            kept = decay if value.is_floating_point() else 0.0
            expected[name] = kept * expected[name] + (1 - kept) * value.double()
    for name, value in average.model.state_dict().items():
        assert torch.allclose(value.double(), expected[name], rtol=1e-4), name


@pytest.mark.parametrize("frozen", ["weights", "weights and statistics"])
def test_an_average_is_of_what_training_moves(frozen: str) -> None:
    model: Any = make_model(0)
    for part in (model.conv1, model.bn1):
        part.requires_grad_(False)
    model.bn1.train(frozen == "weights")
    average = WeightAverage(model, 0.5)
    moving = set(model.state_dict()) - {"conv1.weight", "bn1.weight", "bn1.bias"}
    if frozen != "weights":
        moving -= {"bn1.running_mean", "bn1.running_var", "bn1.num_batches_tracked"}
    assert average.state().keys() == moving
    before = copied_state(average.model)
    with torch.no_grad():
        for name in moving:
            model.state_dict()[name].add_(1)
    average.update(model, 100)
    after = average.model.state_dict()
    assert {name for name in after if not torch.equal(after[name], before[name])} == moving
