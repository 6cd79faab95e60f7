"""What is taken, and what is refused: flags, numbers and words of recipes, attacks, evaluation and training."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, Protocol, Union, get_args, get_origin

import numpy as np
import pytest
import torch
from attack_helpers import digits_test, trained_small_cnn
from torch import Tensor
from training_helpers import small_data, small_recipe

import fastadv
from fastadv.evaluation import autoattack, masking_checks
from fastadv.fields import check_fields, hints_of
from fastadv.models import small_cnn
from fastadv.trainers import (
    AdversarialRecipe,
    ArrestRecipe,
    FastRecipe,
    MultiStep,
    OneCycle,
    Recipe,
    Schedule,
    Settings,
    Step,
    VfdRecipe,
    find_method,
    method_names,
    train,
)

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPES = sorted(
    {find_method(name).recipe_class for name in method_names()}, key=lambda k: k.__name__
)
CHECKED = [*RECIPES, Recipe, Settings, MultiStep, OneCycle, Step]
TEXT_FLAGS = ("false", "True", "no", 0, 1, None, torch.tensor(True))


def wrong_for(hint: Any) -> list[object]:
    """Values that a field of this type must not take; none where any value may do."""
    parts = [part for part in get_args(hint) if part is not type(None)]
    if get_origin(hint) in (Union, types.UnionType):
        return wrong_for(parts[0]) if len(parts) == 1 else [object()]
    if get_origin(hint) is Literal:
        return ["nonsense", f"{parts[0]}s", True, 3]
    if get_origin(hint) is tuple:
        return ["(1, 2)", 5, ("a", "b")]
    if hint is bool:
        return list(TEXT_FLAGS)
    if hint is int:
        return [2.5, 2.0, "2", True, torch.tensor(2)]
    if isinstance(hint, type) and issubclass(hint, float):
        return ["8/255", "0.1", True, torch.tensor(0.1), [0.1]]
    if hint is str:
        return [3, True]
    return [object(), "nonsense"]


FIELDS = [(kind, field.name) for kind in CHECKED for field in fields(kind) if field.init]


def told_by(given: Mapping[str, Any]) -> set[Hashable]:
    """Each field where it is defined; in a class that inherits it, each type of its fields."""
    kind, name = given["kind"], given["name"]
    owner = next(k for k in kind.__mro__ if name in inspect.get_annotations(k))
    return {(owner, name), (kind, str(hints_of(kind)[name]))}


@pytest.mark.covering(facts=told_by)
@pytest.mark.parametrize(("kind", "name"), FIELDS, ids=lambda v: getattr(v, "__name__", v))
def test_a_field_takes_nothing_but_its_type(kind: type[Any], name: str) -> None:
    for value in wrong_for(hints_of(kind)[name]):
        with pytest.raises((TypeError, ValueError), match=rf"\b{name} must be"):
            kind(**{name: value})


def test_every_field_of_every_recipe_has_a_type_that_is_checked() -> None:
    for kind in CHECKED:
        assert set(hints_of(kind)) == {field.name for field in fields(kind)}, kind


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"flip": "no"}, TypeError),
        ({"epochs": 2.5}, TypeError),
        ({"batch_size": True}, TypeError),
        ({"precision": "bf61"}, ValueError),
        ({"pad_mode": "zeros"}, ValueError),
        ({"schedule": "Cosine"}, TypeError),
    ],
)
def test_the_error_is_of_the_usual_type(change: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=f"{next(iter(change))} must be"):
        Recipe(**change)


def test_numbers_of_numpy_and_lists_become_pythons_own() -> None:
    recipe = AdversarialRecipe(
        epochs=np.int64(3),
        lr=np.float32(0.5),
        flip=np.bool_(False),
        eps=np.float64(0.1),
        weight_decay=0,
    )
    assert (recipe.epochs, recipe.lr, recipe.flip, recipe.weight_decay) == (3, 0.5, False, 0.0)
    for name in ("epochs", "lr", "flip", "eps", "weight_decay"):
        assert type(getattr(recipe, name)) in (int, float, bool)
    schedule = MultiStep([np.int64(2), 4], 0.1)  # type: ignore[arg-type]
    assert schedule.milestones == (2, 4) and type(schedule.milestones) is tuple
    attack = fastadv.PGD(small_cnn(), targeted=np.bool_(True), bounds=[0, np.float32(1)])  # type: ignore[arg-type]
    assert attack.targeted is True and attack.bounds == (0.0, 1.0)


@pytest.mark.parametrize("number", [-0.1, float("nan"), float("inf")])
def test_numbers_of_schedules_are_in_range(number: float) -> None:
    for make in (lambda: Step(gamma=number), lambda: OneCycle(floor=number)):
        with pytest.raises(ValueError, match="must be finite and >= 0"):
            make()


def test_a_recipes_radius_is_in_the_units_of_the_images() -> None:
    with pytest.raises(ValueError, match=r"eps must be at most 1 .* units of the images"):
        ArrestRecipe(eps=8)


class Given(Protocol):
    """Of a protocol nothing can be said while the program runs."""


@pytest.mark.parametrize("name", ["pgd_at", "free", "fast", "trades"])
@pytest.mark.parametrize("alpha", [0, 2, 8])
def test_a_recipe_whose_attack_stands_still_or_is_in_other_units_is_refused(
    name: str, alpha: int
) -> None:
    kind = find_method(name).recipe_class
    with pytest.raises(ValueError, match=r"alpha must be (> 0|below 2|at most)"):
        kind(alpha=alpha)
    assert find_method("pgd_at").recipe_class(eps=0, alpha=0).eps == 0  # no attack is meant


@pytest.mark.parametrize("momentum", [1, 1.5])
def test_a_momentum_that_never_fades_is_refused(momentum: float) -> None:
    with pytest.raises(ValueError, match="momentum must be < 1, got"):
        Recipe(momentum=momentum)


def test_a_dataclass_of_ones_own_is_checked_in_the_same_way() -> None:
    @dataclass
    class Mine:
        count: int = 3
        names: tuple[str, ...] = ()
        loss: str | Callable[[Tensor], Tensor] = "ce"
        level: Literal[1, 2] = 1
        given: Given | None = None
        anything: Any = None
        unknown: "NotThere" = 1  # type: ignore[name-defined]  # noqa: F821, UP037

        def __post_init__(self) -> None:
            check_fields(self)

    assert Mine(names=["a"], loss=torch.sum, anything=5).names == ("a",)  # type: ignore[arg-type]
    assert Mine(given=[], level=2).given == []  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="level must be one of 1, 2, got True"):
        Mine(level=True)
    for change in ({"count": "3"}, {"names": "a"}, {"names": (1,)}, {"loss": 3}):
        with pytest.raises(TypeError, match=f"{next(iter(change))} must be"):
            Mine(**change)  # type: ignore[arg-type]


FLAGS = ("targeted", "train_mode", "random_start", "check_inputs")


@pytest.mark.parametrize("flag", TEXT_FLAGS)
@pytest.mark.parametrize("name", FLAGS)
def test_a_flag_of_an_attack_is_no_text_or_number(name: str, flag: Any) -> None:
    with pytest.raises(TypeError, match=f"{name} must be True or False( or 'moving')?, got"):
        fastadv.MIM(small_cnn(), **{name: flag})


def pair() -> tuple[Tensor, Tensor]:
    return digits_test(8)


EVALUATIONS: dict[str, Callable[..., object]] = {
    "evaluate": lambda **change: fastadv.evaluate(
        trained_small_cnn(), pair(), **{"attacks": ("clean",), "progress": False, **change}
    ),
    "masking_checks": lambda **change: masking_checks(
        trained_small_cnn(), pair(), **{"progress": False, "steps": (1,), **change}
    ),
    "autoattack": lambda **change: autoattack(trained_small_cnn(), pair(), **change),
}


@pytest.mark.parametrize("name", list(EVALUATIONS))
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"progress": "no"}, TypeError, "progress must be True or False"),
        ({"eps": "8/255"}, TypeError, "eps must be a number"),
        ({"eps": 8}, ValueError, "eps must be at most 1 in linf"),
        ({"eps": 99, "norm": "L2"}, ValueError, "eps must be at most 8 in l2"),
        ({"batch_size": 2.5}, TypeError, "batch_size must be an integer"),
        ({"batch_size": True}, TypeError, "batch_size must be an integer"),
        ({"max_examples": 2.0}, TypeError, "max_examples must be an integer"),
        ({"seed": "1"}, TypeError, "seed must be an integer"),
        ({"norm": "max"}, ValueError, "norm must be one of linf, l2"),
    ],
)
def test_arguments_of_an_evaluation(
    name: str, change: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        EVALUATIONS[name](**change)


@pytest.mark.parametrize("flag", TEXT_FLAGS)
def test_the_worst_case_is_asked_for_by_a_flag(flag: Any) -> None:
    with pytest.raises(TypeError, match="worst_case must be True or False"):
        EVALUATIONS["evaluate"](worst_case=flag)


def test_an_evaluation_knows_the_norm_by_other_names() -> None:
    report = EVALUATIONS["evaluate"](norm="L2", eps=0.3, attacks=("pgd-2",))
    assert report.norm == "l2"  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["resume", "overwrite", "allow_changes", "progress"])
def test_flags_of_training(name: str, tmp_path: Path) -> None:
    values: tuple[object, ...] = (0, None) if name == "resume" else TEXT_FLAGS
    for value in values:
        with pytest.raises(TypeError, match=f"{name} must be True or False"):
            train(
                "standard",
                small_recipe("standard"),
                data=small_data(),
                model="small_cnn",
                run_dir=tmp_path / "run",
                **{name: value},  # type: ignore[arg-type]
            )
    assert not (tmp_path / "run").exists()


def test_the_types_are_shipped() -> None:
    assert (Path(fastadv.__file__).parent / "py.typed").is_file()


def test_schedules_of_ones_own_need_be_no_dataclass() -> None:
    class Half(Schedule):
        def factor(self, epoch: float, epochs: int) -> float:
            return 0.5

    assert Recipe(schedule=Half()).lr_at(3) == 0.05


@pytest.mark.parametrize(
    ("kind", "name", "meant"),
    [
        (Recipe, "learning_rate", "lr"),
        (AdversarialRecipe, "epsilon", "eps"),
        (AdversarialRecipe, "num_steps", "steps"),
        (ArrestRecipe, "replay_epoch", "replay_epochs"),
        (Recipe, "wd", "weight_decay"),
        (VfdRecipe, "bse", "base"),
    ],
)
def test_a_number_that_a_recipe_does_not_have_is_named(
    kind: type[Recipe], name: str, meant: str
) -> None:
    words = f"{kind.__name__} has no option '{name}'; did you mean '{meant}'"
    for make in (kind, lambda **numbers: kind.preset("paper", **numbers)):
        with pytest.raises(TypeError, match=words):
            make(**{name: 0.1})


@pytest.mark.parametrize(
    ("method", "numbers", "words"),
    [
        ("pgd_at", {"awp_warmup": 3}, "awp_warmup has no effect with awp_gamma 0, got 3"),
        ("standard", {"pad": 0, "pad_mode": "reflect"}, "pad_mode has no effect with pad 0"),
        ("vfd", {"base": "mart", "gamma": 2.0}, "gamma has no effect with another base than hat"),
    ],
)
def test_training_refuses_numbers_without_effect(
    method: str, numbers: dict[str, Any], words: str, tmp_path: Path
) -> None:
    recipe = find_method(method).recipe_class(**numbers)
    with pytest.raises(ValueError, match=words):
        train(method, recipe, data=small_data(), model="small_cnn", run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_step_of_fast_training_fits_its_radius() -> None:
    with pytest.raises(ValueError, match=r"alpha must be below 2 eps, 0\.03.* got 0\.039.*0\.0196"):
        FastRecipe(eps=4 / 255)
    assert FastRecipe(eps=4 / 255, alpha=5 / 255).alpha == 5 / 255
    assert FastRecipe(eps=0.0).eps == 0
