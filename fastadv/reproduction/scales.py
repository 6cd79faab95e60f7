"""The scales of a reproduction: the paper's own settings, real CIFAR-10 on a processor, or digits in seconds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from fastadv.ops.values import check_choice
from fastadv.trainers import AdversarialRecipe, FreeRecipe, Recipe

_EPS = 8 / 255
# Fields of AWP's and SAT's recipes that count epochs from the start of a run.
_EPOCH_FIELDS = ("awp_warmup", "gap_start", "gap_end")
_NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Scale:
    """The numbers in which a reproduction differs from the papers.

    Attributes:
        name: the scale's name on the command line.
        data: the data set, if the user names no data set.
        seeds: the number of trainings of each row, if the user does not give it.
        network: the network in place of every network of the papers; None for the papers' networks.
        epochs: epochs by method, and under "" for all other methods; empty for the papers' numbers.
        numbers: fields of every recipe.
        attacked: fields of the recipes with an attack.
        steps: the largest number of steps of an attack in training. With fewer steps the step size is larger.
        radius: the factor of every radius of the papers.
        attacks: for an attack that costs too much, the attack in its place.
        test_images: the number of test images that are attacked; None for all.
        fewer_images: the number of test images for single attacks.
    """

    name: str
    data: str
    seeds: int
    network: str | None = None
    epochs: Mapping[str, int] = field(default_factory=lambda: _NOTHING)
    numbers: Mapping[str, Any] = field(default_factory=lambda: _NOTHING)
    attacked: Mapping[str, Any] = field(default_factory=lambda: _NOTHING)
    steps: int | None = None
    radius: float = 1.0
    attacks: Mapping[str, str] = field(default_factory=lambda: _NOTHING)
    test_images: int | None = None
    fewer_images: Mapping[str, int] = field(default_factory=lambda: _NOTHING)

    def with_network(self, name: str) -> Scale:
        """The same scale with another network in place of the papers' networks."""
        return replace(self, network=name)

    def network_for(self, name: str) -> str:
        """The network in place of a network of the papers."""
        return self.network or name

    def eps(self, of_255: float) -> float:
        """The radius at this scale for a radius of the papers in units of 1/255."""
        return self.radius * of_255 / 255

    def attack(self, name: str) -> str:
        """The attack in place of an attack of the papers."""
        return self.attacks.get(name, name)

    def images_for(self, attack: str) -> int | None:
        """The number of test images for an attack; None for all."""
        return self.fewer_images.get(attack, self.test_images)

    def numbers_for(self, method: str, recipe: Recipe) -> dict[str, Any]:
        """Fields in which a recipe differs at this scale."""
        numbers: dict[str, Any] = dict(self.numbers)
        if self.epochs:
            epochs = self.epochs.get(method, self.epochs[""])
            numbers["epochs"] = epochs
            numbers["schedule"] = recipe.schedule.scaled(recipe.epochs, epochs)
            for name in _epoch_fields(recipe):
                numbers[name] = _fewer(getattr(recipe, name), epochs / recipe.epochs)
        if self.network and hasattr(recipe, "strategy"):  # LAS-AT's second network
            numbers["strategy"] = self.network
        if isinstance(recipe, AdversarialRecipe):
            steps = recipe.steps if self.steps is None else min(self.steps, recipe.steps)
            numbers["eps"], numbers["steps"] = recipe.eps * self.radius, steps
            numbers["alpha"] = recipe.alpha * self.radius
            # Free's steps are replays, and its attack is part of the training passes.
            if not isinstance(recipe, FreeRecipe):
                numbers["alpha"] *= recipe.steps / steps
                numbers.update(self.attacked)
            if getattr(recipe, "eps_low", None) is not None:  # radii drawn from there to eps
                numbers["eps_low"] = recipe.eps_low * self.radius  # type: ignore[attr-defined]
            for name in ("eps_choices", "alpha_choices"):  # LAS-AT's, in 255ths
                if hasattr(recipe, name):
                    numbers[name] = tuple(round(c * self.radius) for c in getattr(recipe, name))
        return numbers


def _epoch_fields(recipe: Recipe) -> list[str]:
    """Fields of a recipe that count epochs from the start of a run, where they have an effect."""
    fields = ["replay_epochs"] if getattr(recipe, "replay", False) else []
    friendly = getattr(recipe, "friendly", True)  # an option of TRADES and MART; FAT is always so
    fields += ["tau_epochs"] if hasattr(recipe, "tau_epochs") and friendly else []
    return fields + [name for name in _EPOCH_FIELDS if getattr(recipe, name, 0)]


def _fewer(epochs: int | tuple[int, ...], ratio: float) -> int | tuple[int, ...]:
    if isinstance(epochs, tuple):
        return tuple(math.ceil(epoch * ratio) for epoch in epochs)
    return math.ceil(epochs * ratio)


PAPER = Scale("paper", "cifar10", 3)  # the papers' own settings
# Real CIFAR-10 on a processor of 2 cores: a part of the images, a small network, few epochs.
SMALL = Scale(
    "small",
    "cifar10",
    1,
    "small_cnn",
    {"": 6, "standard": 30, "arrest": 6, "afs": 2},
    {"train_images": 5000, "batch_size": 64, "monitor_images": 200, "monitor_steps": 5},
    steps=5,
    test_images=1000,
    fewer_images={"autoattack": 300, "min-pgd-20": 300, "cwl2-1000": 200},
)
# Digits of 8x8 pixels in seconds, to see that everything works. The figures say nothing.
TINY = Scale(
    "tiny",
    "digits",
    1,
    "small_cnn",
    {"": 2, "standard": 10, "arrest": 3, "afs": 1},
    {
        "train_images": 200,
        "batch_size": 50,
        "pad": 1,
        "flip": False,  # a mirrored digit is no digit
        "precision": "fp32",
        "monitor_images": 20,
        "monitor_steps": 0,
        "monitor_every": 100,
    },
    {"attack_precision": "fp32", "engine": "eager"},  # nothing to prepare for runs this short
    steps=2,
    radius=0.1 / _EPS,  # digits bear larger perturbations; see `fastadv.demo`
    attacks={
        "autoattack": "apgd-ce-5",
        "cwl2-1000": "cwl2-50",
        "min-pgd-20": "min-pgd-2",
        "pgd-100": "pgd-25",
    },
    test_images=30,
)
SCALES = {scale.name: scale for scale in (PAPER, SMALL, TINY)}


def find_scale(name: str) -> Scale:
    """Return a scale by its name.

    Args:
        name: "paper", "small" or "tiny".

    Raises:
        ValueError: for an unknown name.
    """
    check_choice("scale", name, list(SCALES))
    return SCALES[name]
