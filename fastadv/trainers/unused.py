"""Finding the numbers of a recipe that have no effect, because of its other numbers or of its method."""

from __future__ import annotations

import warnings
from typing import Any, TypeAlias

from fastadv.trainers.bases import unused_of_base
from fastadv.trainers.methods import MethodClass
from fastadv.trainers.recipe import Recipe
from fastadv.trainers.schedules import MultiStep, Piecewise, Schedule, Step

_GROWING_TAU = ("fat", "trades", "mart", "rst", "dm_at")

# Whether some fields have no effect, the reason, and the names of the fields.
_Condition: TypeAlias = tuple[bool, str, list[str]]


def check_all_used(method: MethodClass, recipe: Recipe, preset: str | None = None) -> None:
    """Refuse a number that the caller chose and that has no effect.

    Args:
        method: the training method.
        recipe: the method's recipe.
        preset: the preset of the recipe. A number that equals the preset's number was not chosen by the caller.
            For None all presets are compared.

    Raises:
        ValueError: if there is such a number; the message names the first and the reason.
    """
    decided = {name: getattr(recipe, name) for name in method.recipe_class.deciders()}
    presets = method.recipe_class.presets if preset is None else (preset,)
    defaults = [method.recipe_class.preset(name, **decided) for name in presets]
    for name, reason in _without_effect(method.name, recipe).items():
        value = getattr(recipe, name, None)
        if all(value != getattr(default, name, None) for default in defaults):
            raise ValueError(f"{name} has no effect {reason}, got {value}")


def warn_of_late_drop(recipe: Recipe) -> None:
    """Warn of a schedule that leaves the learning rate as it is until the end of the run.

    This is no error, because a short trial of a long run is usual. The warning is shown for the caller's caller.
    """
    if _first_drop(recipe.schedule) >= recipe.epochs:
        warnings.warn(
            f"schedule does not change the learning rate within {recipe.epochs} epochs, got {recipe.schedule}",
            stacklevel=3,
        )


def _without_effect(method: str, recipe: Recipe) -> dict[str, str]:
    """The fields that have no effect, each with the reason."""

    def value(name: str) -> Any:
        return getattr(recipe, name, None)

    conditions: list[_Condition] = [
        (not value("pad"), "with pad 0", ["pad_mode"]),
        (not value("weight_decay"), "with weight_decay 0", ["norm_decay"]),
        (
            value("extra_fraction") == 1,
            "with extra_fraction 1, where all images have the same weight",
            ["extra_weight"],
        ),
        (value("optimizer") == "sgd", "with optimizer sgd", ["betas"]),
        (value("optimizer") == "adamw", "with optimizer adamw", ["momentum", "nesterov"]),
        (not value("awp_gamma"), "with awp_gamma 0", ["awp_warmup"]),
        (
            (value("awp_warmup") or 0) >= recipe.epochs,
            f"with an awp_warmup that lasts all {recipe.epochs} epochs",
            ["awp_gamma"],
        ),
        (
            method in _GROWING_TAU and min(value("tau_epochs"), default=0) >= recipe.epochs,
            f"with {recipe.epochs} epochs, before the end of which tau does not grow",
            ["tau_epochs"],
        ),
        (value("norm") == "linf", "with norm linf", ["l2_start"]),
        (value("friendly") is False, "with friendly false", ["tau", "tau_epochs"]),
        (
            value("random_start") is False and not _replays_noise(recipe),
            "with random_start false",
            ["l2_start"],
        ),
        (value("random_start") is False, "with random_start false", ["start_std"]),
        (
            value("start_std") is not None and value("base") != "pgd_at",
            "beside start_std, by which the attack starts",
            ["l2_start"],
        ),
        *_conditions_of_method(method, recipe),
    ]
    return {name: reason for holds, reason, names in conditions if holds for name in names}


def _conditions_of_method(method: str, recipe: Recipe) -> list[_Condition]:
    """The conditions on fields that only this method has, or that it alone does not use."""

    def value(name: str) -> Any:
        return getattr(recipe, name, None)

    if method == "free":
        fields = ["attack_mode", "attack_precision", "engine"]
        return [(True, "with free, which attacks in its training passes", fields)]
    if method == "arrest":
        distils_divergence = value("distill") and value("distance") == "logits_kl"
        return [
            (not distils_divergence, "without distance logits_kl", ["temperature"]),
            (not value("distill"), "with distill false", ["distance", "lam"]),
            (not value("replay"), "with replay false", ["replay_with", "phi", "replay_epochs"]),
            (not value("replay_epochs"), "with replay_epochs 0", ["replay_with", "phi"]),
            (
                value("phi") == 90,
                "with phi 90, the largest angle there is",
                ["replay_with", "replay_epochs"],
            ),
        ]
    if method == "act":
        # Where the attack has one term, its scale changes nothing.
        alone = value("weight") in (0, 1)
        return [
            (alone, f"with weight {value('weight'):g}", ["attack_divergence"]),
            (value("weight") == 0, "with weight 0", ["temperature"]),
        ]
    if method == "vfd":
        alone = value("base_weight") == 0
        return [
            (value("base") != "hat", "with another base than hat", ["gamma", "reach"]),
            (alone, "with beta 0", ["weight", "code_constants"]),
        ]
    if method == "afs":
        clean = value("mix") == "batch" and value("weight") == 1
        fields = ["noise", "eps_low", "random_start", "l2_start"]
        return [(clean, "with mix batch and weight 1, which attacks no image", fields)]
    if method == "las_at":
        fields = ["robust_weight", "clean_weight"]
        return [(value("strategy_lr") == 0, "with strategy_lr 0", fields)]
    if method in ("kd_at", "lbgat"):
        unused = unused_of_base(value("base"))
        if method == "lbgat" and value("base") is None:
            unused = [name for name in unused if name not in ("beta", "start_std")]
        conditions: list[_Condition] = [(True, f"with base {value('base')}", unused)]
        if method == "kd_at":
            distils = value("standard_weight") or value("robust_weight")
            # Not "reach": BatchNorm sees the helper examples.
            fields = ["beta", "weight", "code_constants", "gamma", "label_smoothing"]
            conditions += [
                (not distils, "with standard_weight 0 and robust_weight 0", ["temperature"]),
                (value("label_weight") == 0, "with label_weight 0", fields),
            ]
        return conditions
    if method == "dm_at":
        reason = "with dm_at in linf, whose attack starts from uniform noise"
        return [(value("norm") == "linf", reason, ["start_std"])]
    if method == "sat":
        reason = f"with {recipe.epochs} epochs, before the end of which the gap does not grow"
        return [
            (value("gap_start") >= recipe.epochs, reason, ["final_gap", "gap_end"]),
            (value("gap") == value("final_gap"), "with gap = final_gap", ["gap_start", "gap_end"]),
        ]
    if method == "s2o":
        reason = "with another base than trades"
        return [
            (value("base") != "trades", reason, ["beta", "start_std"]),
            (value("term_weight") == 0, "with weight 0", ["own"]),
        ]
    return []


def _replays_noise(recipe: Recipe) -> bool:
    """Whether images may be replaced by random points, as by ARREST, which `l2_start` draws as well."""
    replays = getattr(recipe, "replay", False) and getattr(recipe, "replay_epochs", 0)
    return bool(replays) and getattr(recipe, "replay_with", None) == "noise"


def _first_drop(schedule: Schedule) -> float:
    """The epoch after which a schedule in pieces first changes the learning rate; 0 for all other schedules."""
    if isinstance(schedule, Step):
        return schedule.every
    if isinstance(schedule, MultiStep) and schedule.milestones:
        return schedule.milestones[0]
    if isinstance(schedule, Piecewise) and len(schedule.starts) > 1 and schedule.factors[0] == 1:
        return schedule.starts[1]
    return 0
