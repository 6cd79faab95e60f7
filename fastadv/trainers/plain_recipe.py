"""Recipes as JSON types, for run directories and checkpoints, and for comparing two recipes."""

from __future__ import annotations

import dataclasses
from typing import Any

from fastadv.trainers.recipe import Recipe
from fastadv.trainers.schedules import Schedule


def as_plain(value: Any) -> Any:
    """Return a recipe as JSON types: dicts, lists, numbers, text.

    A schedule becomes a dict of its class name and its fields.
    """
    if isinstance(value, Schedule):
        fields = dataclasses.asdict(value) if dataclasses.is_dataclass(value) else vars(value)
        return {"class": type(value).__name__, **as_plain(fields)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: as_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): as_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_plain(item) for item in value]
    return value


def plain_defaults(kind: type[Recipe]) -> dict[str, Any]:
    """Return the defaults of a recipe's fields, as JSON types."""
    found = ((f.name, f.default) for f in dataclasses.fields(kind))
    return {name: as_plain(value) for name, value in found if value is not dataclasses.MISSING}


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return a text "name: old -> new" for each entry in which two plain recipes differ."""
    missing = "(not there)"
    return [
        f"{name}: {old.get(name, missing)} -> {new.get(name, missing)}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name, missing) != new.get(name, missing)
    ]
