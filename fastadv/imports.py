"""Importing code that the user names, such as `package.module:Class`."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any


@contextmanager
def working_directory_kept() -> Iterator[None]:
    """Within, code of the user's may change the working directory, to which relative paths of a command belong."""
    before = os.getcwd()
    try:
        yield
    finally:
        with suppress(OSError):  # if the directory is gone
            os.chdir(before)


def import_named(label: str, kind: str, what: str) -> Any:
    """Import the object that a label names.

    The module is looked for where Python looks, and then in the current directory. That stays the last place
    where Python looks, so that the module can import its neighbours later.

    Args:
        label: "package.module:name", as the user gives it. A label that a file holds must not come here.
        kind: the kind of the object, for messages, such as "model".
        what: the kind that the name must have, for messages, such as "function".

    Returns:
        The object.

    Raises:
        ImportError: if there is no such module, it fails while it is imported, or it has no such name.
    """
    module_name, _, name = label.partition(":")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    # A file that was written since the last import is seen, too.
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{kind} {label!r}: no module named {error.name!r}; is its folder on PYTHONPATH, or the current one?"
        ) from error
    except Exception as error:  # the module's own code can raise anything
        raise ImportError(
            f"{kind} {label!r}: importing {module_name} failed ({type(error).__name__}: {error})"
        ) from error
    try:
        return getattr(module, name)
    except AttributeError:
        where = getattr(module, "__file__", None) or "no file"
        raise ImportError(
            f"{kind} {label!r}: {module_name} ({where}) has no {what} {name!r}"
        ) from None
