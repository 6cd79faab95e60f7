"""Importing and checking a user's own method, which is named as `package.module:Class`."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any

from fastadv.imports import import_named, working_directory_kept
from fastadv.trainers.method import Method
from fastadv.trainers.recipe import Recipe

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*")


def own_method(label: str, taken: tuple[str, ...]) -> type[Method[Any, Any]]:
    """Import a method that the user names.

    Args:
        label: "package.module:Class". Its code runs, so the label must come from the user, and not from a file.
        taken: names of other methods.

    Raises:
        ImportError: if there is no such class, or its module cannot be imported.
        TypeError: if it is not a subclass of `Method`, or abstract methods are missing.
        ValueError: if its name is missing, or another method has this name.
    """
    with working_directory_kept():
        found = import_named(label, "method", "class")
    if not isinstance(found, type) or not issubclass(found, Method):
        raise TypeError(
            f"method {label!r} must be a subclass of fastadv.trainers.Method, got {_described(found)}"
        )
    check_method(found)
    if found.name in taken:
        raise ValueError(
            f'method {label!r} must have a name of its own, such as name = "{_suggested(found)}" in its class, '
            f"got {found.name!r}, which is fastadv's"
        )
    return found


def check_method(method: type[Method[Any, Any]]) -> None:
    """Check that a class can be used as a method.

    Raises:
        TypeError: if abstract methods are missing, or its recipe is not a `Recipe`.
        ValueError: if it has no name, or a name that a run cannot record.
    """
    label = method.__qualname__
    missing = sorted(getattr(method, "__abstractmethods__", ()))
    if missing:
        raise TypeError(f"method {label} must define {', '.join(missing)}")
    name = getattr(method, "name", None)
    if name is None:
        raise ValueError(
            f'method {label} must have a name: write name = "{_suggested(method)}" in its class'
        )
    if not isinstance(name, str) or _NAME.fullmatch(name) is None:
        raise ValueError(
            f"name of method {label} must be a word of letters, digits, '_', '.' and '-', got {name!r}"
        )
    recipe = getattr(method, "recipe_class", None)
    if not isinstance(recipe, type) or not issubclass(recipe, Recipe):
        raise TypeError(
            f"recipe_class of method {label} must be Recipe, AdversarialRecipe or a subclass of these, "
            f"got {_described(recipe)}"
        )
    _check_recipe(recipe)


def _check_recipe(recipe: type[Recipe]) -> None:
    """Check that all annotated fields of a recipe are dataclass fields, and that each field has a default."""
    own = [
        field
        for field, kind in inspect.get_annotations(recipe).items()
        if "ClassVar" not in str(kind)
    ]
    known = {field.name: field for field in dataclasses.fields(recipe)}
    if "__dataclass_fields__" not in vars(recipe) and own:
        raise TypeError(
            f"recipe {recipe.__qualname__} must be decorated with @dataclass(frozen=True, kw_only=True): it has "
            f"{', '.join(own)}, which no dataclass has"
        )
    for field in known.values():
        if field.default is field.default_factory is dataclasses.MISSING:
            raise TypeError(
                f"field {field.name} of recipe {recipe.__qualname__} must have a default"
            )


def label_of(method: type[Method[Any, Any]]) -> str | None:
    """Return "package.module:Class" for a method's class; None if it cannot be imported by such a name."""
    module, name = method.__module__, method.__qualname__
    return None if module == "__main__" or "." in name else f"{module}:{name}"


def _suggested(method: type) -> str:
    """A class name in the form of method names: SmoothAT becomes smooth_at."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", method.__name__).lower()


def _described(found: object) -> str:
    if isinstance(found, type):
        return f"the class {found.__qualname__}"
    return f"{found!r}" if found is None else f"a {type(found).__name__}"
