"""Schedules of runs of another length than the recipe's own."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from test_recipe_starts import printed

from fastadv import trainers
from fastadv.trainers import (
    ActRecipe,
    AdversarialRecipe,
    ArrestRecipe,
    Constant,
    Cosine,
    Cyclic,
    EpochCosine,
    EpochOneCycle,
    Interpolated,
    LbgatRecipe,
    MultiStep,
    OneCycle,
    Piecewise,
    Recipe,
    Schedule,
    Step,
    VfdRecipe,
    find_method,
    method_names,
)
from fastadv.trainers.announcement import _schedule_line

PRESETS = [
    (name, preset) for name in method_names() for preset in find_method(name).recipe_class.presets
]


@pytest.mark.parametrize(("name", "preset"), PRESETS)
@pytest.mark.parametrize("times", [0.5, 3])
def test_a_run_of_another_length_has_the_same_rates_at_the_same_parts(
    name: str, preset: str, times: float
) -> None:
    kind = find_method(name).recipe_class
    own = kind.preset(preset)
    if isinstance(own.schedule, EpochCosine | EpochOneCycle):
        pytest.skip("the rate is constant in an epoch, and the epochs are other parts of the run")
    other = kind.preset(preset, epochs=int(own.epochs * times))
    ratio = other.epochs / own.epochs
    for part in range(1000):
        place = own.epochs * (part + 0.5) / 1000
        assert other.lr_at(place * ratio) == pytest.approx(own.lr_at(place), rel=1e-9)


def test_every_schedule_with_places_in_epochs_is_scaled() -> None:
    schedules: list[Schedule] = [
        Step(30, 0.5),
        MultiStep((75, 90), 0.1),
        Piecewise((0, 1, 75), (0.2, 1.0, 0.1)),
        Interpolated((0, 1, 12.5, 100), (0.0, 1.0, 0.1, 0.0)),
        Constant(),
        Cosine(0.1),
        EpochCosine(0.1),
        Cyclic(0.5),
        OneCycle(0.3),
        EpochOneCycle(0.3),
    ]
    classes = {one for one in vars(trainers).values() if isinstance(one, type)}
    names = {one.__name__ for one in classes if issubclass(one, Schedule)} - {"Schedule"}
    assert {type(one).__name__ for one in schedules} == names
    for one in schedules:
        for to in (10, 300):
            scaled = one.scaled(100, to)
            if "Epoch" in type(one).__name__:  # its rate changes only when an epoch begins
                assert scaled == one
                continue
            for part in range(200):
                place = (part + 0.5) / 200
                expected = one.factor(place * 100, 100)
                assert scaled.factor(place * to, to) == pytest.approx(expected, rel=1e-9)


def test_places_in_epochs_are_whole_where_they_can_be() -> None:
    assert AdversarialRecipe(epochs=40).schedule == MultiStep((30, 36), 0.1)
    assert AdversarialRecipe(epochs=np.int64(40)).schedule == MultiStep((30, 36), 0.1)  # type: ignore[arg-type]
    assert Recipe(epochs=3).schedule == MultiStep((2.25, 2.7), 0.1)
    assert ArrestRecipe(epochs=10).schedule == Piecewise(
        (0, 5, 6, 7, 8, 9), (1.0, 0.8, 0.4, 0.2, 0.1, 0.05)
    )
    assert Step(30, 0.5).scaled(90, 30) == Step(10, 0.5)
    assert [Step(2.5, 0.5).factor(epoch, 10) for epoch in (2.4, 2.5, 5)] == [1, 0.5, 0.25]
    halves = Piecewise((0, 1.5), (1.0, 0.1))
    assert [halves.factor(epoch, 3) for epoch in (0, 1.49, 1.5, 2.9)] == [1, 1, 0.1, 0.1]
    assert Cosine(0.1).scaled(10, 20) == Cosine(0.1) and Constant().scaled(1, 9) == Constant()


def test_what_the_recipe_begins_with_is_scaled() -> None:
    assert ActRecipe.preset("official", epochs=100).schedule == MultiStep((29.5, 59.5, 79.5), 0.2)
    assert VfdRecipe(base="alp", epochs=50).schedule == MultiStep((37.5, 45), 0.1)
    assert LbgatRecipe(fixed=True, epochs=38).schedule == MultiStep((37, 44.5, 49.5), 0.1)
    assert VfdRecipe(base="mart").schedule == MultiStep((74, 89, 99), 0.1)


def test_a_schedule_that_is_given_or_kept_stays() -> None:
    given = MultiStep((5,), 0.1)
    assert Recipe(epochs=40, schedule=given).schedule == given
    assert dataclasses.replace(Recipe(), epochs=40).schedule == Recipe().schedule
    assert dataclasses.replace(Recipe(epochs=40), lr=0.2).schedule == MultiStep((30, 36), 0.1)


def test_the_command_line_scales_the_default_alone(capsys: pytest.CaptureFixture[str]) -> None:
    def schedule(*words: str) -> Any:
        options = printed(capsys, "pgd_at", "--data", "digits", "--run", "x", *words)
        return options["schedule"]["init_args"]

    assert schedule("--epochs", "40")["milestones"] == [30, 36]
    partly = schedule("--epochs=40", "--schedule.gamma", "0.2")
    assert (partly["milestones"], partly["gamma"]) == ([30, 36], 0.2)
    own = schedule("--epochs", "40", "--schedule", "MultiStep", "--schedule.milestones", "[20]")
    assert own["milestones"] == [20]
    assert schedule("--config", '{"epochs": 20}')["milestones"] == [15, 18]


def test_the_announcement_says_what_was_scaled() -> None:
    (line,) = _schedule_line(ActRecipe.preset("official", epochs=100))
    assert line == (
        "  schedule: MultiStep, 200 epochs scaled to 100: milestones 29.5, 59.5, 79.5, gamma 0.2"
    )
    (line,) = _schedule_line(VfdRecipe(base="alp", epochs=50, norm="l2"))
    assert "100 epochs scaled to 50: milestones 37.5, 45" in line
    for recipe in (
        Recipe(),
        Recipe(epochs=40, schedule=Cosine()),
        Recipe(epochs=40, schedule=MultiStep((20,), 0.1)),
    ):
        assert _schedule_line(recipe) == []


def test_wrong_numbers_of_epochs_are_named() -> None:
    with pytest.raises(TypeError, match="epochs must be an integer"):
        Recipe(epochs="40")  # type: ignore[arg-type]
    for epochs in (0, -3):
        with pytest.raises(ValueError, match=f"epochs must be >= 1, got {epochs}"):
            Recipe(epochs=epochs)
    with pytest.raises(ValueError, match="every must be > 0 epochs, got 0"):
        Step(0)
