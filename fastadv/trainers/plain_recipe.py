"""Recipes as JSON types, in which run directories and checkpoints keep them and by which they are compared."""

from __future__ import annotations

import dataclasses
from typing import Any

from fastadv.trainers.recipe import Recipe
from fastadv.trainers.schedules import Schedule


def as_plain(value: Any, name: str = "recipe") -> Any:
    """Turn a recipe into JSON types: dicts, lists, numbers, text.

    A dataclass inside, such as the schedule, becomes its class name and its fields.

    Args:
        value: the recipe, or a part of it.
        name: the name of the part in messages.

    Raises:
        TypeError: if it holds something else, which a run could not record.
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
    """Return the default of each field that has one, as JSON types."""
    found = ((f.name, f.default) for f in dataclasses.fields(kind))
    return {
        name: as_plain(value, name) for name, value in found if value is not dataclasses.MISSING
    }


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return one "name: old -> new" for each entry in which two plain recipes differ."""
    missing = "(not there)"
    return [
        f"{name}: {old.get(name, missing)} -> {new.get(name, missing)}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name, missing) != new.get(name, missing)
    ]
