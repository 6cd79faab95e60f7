"""Recipes as JSON types, for run directories and checkpoints, and for comparing two recipes."""

from __future__ import annotations

import dataclasses
from typing import Any

from fastadv.trainers.recipe import Recipe
from fastadv.trainers.schedules import Schedule


def as_plain(value: Any, name: str = "recipe") -> Any:
    """Return a recipe as JSON types: dicts, lists, numbers, text.

    A schedule becomes a dict of its class name and its fields.

    Args:
        value: the recipe, or a part of it.
        name: the name of the part, for messages.

    Raises:
        TypeError: if it holds a value of another type, which a run could not record.
    """
    if isinstance(value, Schedule):
        fields = dataclasses.asdict(value) if dataclasses.is_dataclass(value) else vars(value)
        return {"class": type(value).__name__, **as_plain(fields, name)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: as_plain(getattr(value, f.name), f.name) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): as_plain(item, f"{name}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_plain(item, name) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(
        f"{name} must be a number, text, a flag or None, or a tuple, dict or dataclass of these, for the run to "
        f"record it, got {value!r}"
    )


def plain_defaults(kind: type[Recipe]) -> dict[str, Any]:
    """Return the defaults of a recipe's fields, as JSON types."""
    found = ((f.name, f.default) for f in dataclasses.fields(kind))
    return {
        name: as_plain(value, name) for name, value in found if value is not dataclasses.MISSING
    }


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return a text "name: old -> new" for each entry in which two plain recipes differ."""
    missing = "(not there)"
    return [
        f"{name}: {old.get(name, missing)} -> {new.get(name, missing)}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name, missing) != new.get(name, missing)
    ]
