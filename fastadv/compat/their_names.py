"""The names that torchattacks gives to settings which have another name here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

THEIR_NAMES = {
    "n_restarts": "restarts",
    "n_queries": "queries",
    "eot_iter": "passes",
    "resc_schedule": "rescale_schedule",
}


@contextmanager
def in_their_names() -> Iterator[None]:
    """Let an error on an argument name it as torchattacks does."""
    try:
        yield
    except (TypeError, ValueError) as error:
        name, _, rest = str(error).partition(" ")
        theirs = next((their for their, ours in THEIR_NAMES.items() if ours == name), None)
        if theirs is None:
            raise
        raise type(error)(f"{theirs} {rest}") from None
