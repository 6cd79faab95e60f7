"""The training of a row of a paper's table: a method, its numbers, its network, and the networks it needs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from fastadv.data.training_folders import FOLDER
from fastadv.models import create_model
from fastadv.reproduction.scales import Scale
from fastadv.trainers import Recipe, find_method, method_names
from fastadv.trainers.checkpoint import BEST, LATEST
from fastadv.trainers.methods import MethodClass
from fastadv.trainers.plain_recipe import as_plain

_DIGITS = 12  # of a digest in a name
_SEED_OFFSET = 1000  # difference of the seeds of a training and its repetition


class CannotRun(Exception):
    """A row or a cell cannot be reproduced here. The message says the reason."""


@dataclass(frozen=True)
class RunSpec:
    """A training of the paper, independent of the scale.

    Attributes:
        method: name of the method.
        changes: fields of its recipe that differ from the defaults, with their values.
        network: the paper's network, a name for `create_model`.
        teachers: by name, the trainings of the networks that are offered to the method. The method chooses by
            `teachers_needed`.
        repetition: 0, or the number of a further training that differs in its random numbers alone.
        checkpoint: the checkpoint that is judged or used as a teacher: "latest", or "best" where the paper stops
            early.
    """

    method: str
    changes: tuple[tuple[str, Any], ...] = ()
    network: str = "resnet18"
    teachers: tuple[tuple[str, RunSpec], ...] = ()
    repetition: int = 0
    checkpoint: str = LATEST

    def on(self, network: str) -> RunSpec:
        """The same training on another network, for its teachers as well."""
        teachers = tuple((name, teacher.on(network)) for name, teacher in self.teachers)
        return dataclasses.replace(self, network=network, teachers=teachers)

    def at_best(self) -> RunSpec:
        """The same training with its best checkpoint."""
        return dataclasses.replace(self, checkpoint=BEST)

    def changed(self, **changes: Any) -> RunSpec:
        """The same training with further fields of the recipe changed."""
        return dataclasses.replace(
            self, changes=tuple(sorted({**dict(self.changes), **changes}.items()))
        )


def spec(method: str, network: str = "resnet18", **changes: Any) -> RunSpec:
    """A training without teachers."""
    return RunSpec(method, tuple(sorted(changes.items())), network)


def spec_with_teachers(method: str, *teachers: RunSpec, **changes: Any) -> RunSpec:
    """A training with a "teacher" and optionally a "robust_teacher", on the network of the first teacher."""
    names = ("teacher", "robust_teacher")
    offered = tuple(zip(names, teachers, strict=False))
    return RunSpec(method, tuple(sorted(changes.items())), teachers[0].network, offered)


def stack(extractors: list[RunSpec], **changes: Any) -> RunSpec:
    """A training of AFS over extractors, with the network of the first one."""
    names = [f"extractor_{number}" for number in range(1, len(extractors) + 1)]
    offered = tuple(zip(names, extractors, strict=True))
    return RunSpec("afs", tuple(sorted(changes.items())), extractors[0].network, offered)


@dataclass(frozen=True)
class ResolvedRun:
    """A training at one scale, with one seed.

    Attributes:
        method: the class of its method.
        recipe: all its numbers.
        network: name for `create_model`.
        data: name of the data set.
        teachers: by name, the trainings of the networks that it takes.
        extra: SHA-256 of the further images that it takes; empty without any.
        checkpoint: the checkpoint that is judged. `name` does not depend on it.
    """

    method: MethodClass
    recipe: Recipe
    network: str
    data: str
    teachers: tuple[tuple[str, ResolvedRun], ...]
    extra: str = ""
    checkpoint: str = LATEST

    @property
    def name(self) -> str:
        """A name with a hash of everything that the training depends on, so that items share equal trainings."""
        content = {
            "method": self.method.name,
            "recipe": as_plain(self.recipe),
            "network": self.network,
            "data": self.data,
            "teachers": {name: teacher.relative_path for name, teacher in self.teachers},
            **({"extra": self.extra} if self.extra else {}),
        }
        text = json.dumps(content, sort_keys=True)
        return f"{self.method.name}-{hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]}"

    @property
    def relative_path(self) -> str:
        """The path of the network in the folder of runs: the name, and the checkpoint if it is not the latest."""
        return self.name if self.checkpoint == LATEST else f"{self.name}/{self.checkpoint}"

    def with_teachers(self) -> Iterator[ResolvedRun]:
        """All trainings that this one needs, and this one last. Each comes after its teachers."""
        for _, teacher in self.teachers:
            yield from teacher.with_teachers()
        yield self


def resolve(run: RunSpec, scale: Scale, data: str, seed: int, extra: str = "") -> ResolvedRun:
    """Return the details of a training at a scale.

    Args:
        run: the training.
        scale: the scale.
        data: name of the data set, or folder:PATH.
        seed: the seed of the training.
        extra: SHA-256 of the file of further images; empty where there are no further images.

    Raises:
        CannotRun: if a method, an option, a value or a network does not exist here.
    """
    if run.method not in method_names():
        raise CannotRun(f"there is no method {run.method}")
    method = find_method(run.method)
    seed += _SEED_OFFSET * run.repetition
    recipe = _recipe(method, dict(run.changes), scale, seed)
    if data.startswith(FOLDER):  # pictures are read one by one, and cropped as they are read
        recipe = dataclasses.replace(recipe, train_images=None, pad=0)
    teachers = dict(run.teachers)
    needed = tuple(teachers) if run.method == "afs" else method.teachers_needed(recipe)
    if missing := [name for name in needed if name not in teachers]:
        raise CannotRun(f"method {run.method} takes {', '.join(missing)}, which this row lacks")
    found = tuple((name, resolve(teachers[name], scale, data, seed, extra)) for name in needed)
    network = scale.network_for(run.network)
    if not _is_model(network):
        raise CannotRun(f"there is no model {network}")
    if run.method == "afs":
        network = "stack:" + "+".join(teacher.network for _, teacher in found)
    if recipe.extra_fraction > 0 and not extra:
        raise CannotRun(f"method {run.method} needs further images: --extra FILE")
    taken = extra if recipe.extra_fraction > 0 else ""
    return ResolvedRun(method, recipe, network, data, found, taken, run.checkpoint)


@lru_cache
def _is_model(name: str) -> bool:
    """Whether a network can be made by its name. It is made on "meta", where weights take no memory."""
    try:
        with torch.device("meta"):
            create_model(name)
    except (ValueError, ImportError):
        return False
    return True


def _recipe(method: MethodClass, changes: dict[str, Any], scale: Scale, seed: int) -> Recipe:
    known = {field.name for field in dataclasses.fields(method.recipe_class)}
    for name in changes:
        if name not in known:
            raise CannotRun(f"method {method.name} has no option {name}")
    try:
        recipe = method.recipe_class(**{**changes, "seed": seed})
    except (ValueError, TypeError) as error:
        raise CannotRun(f"method {method.name} takes no such option: {error}") from error
    numbers = scale.numbers_for(method.name, recipe)
    return method.recipe_class(**{**changes, "seed": seed, **numbers})
