"""The names that torchattacks gives to settings which have another name here."""

from __future__ import annotations

import re
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


# Errors on the arguments of a call begin so: on x or y, or on a model that does not fit x.
_ABOUT_A_CALL = re.compile("(x|y|eps|model) must ")


@contextmanager
def in_names_of_a_call(labels: str, eps: str) -> Iterator[None]:
    """Let an error on an argument of a call name it as torchattacks does: inputs in place of x.

    Args:
        labels: the name of y: "labels", or "targets" where a function chose them.
        eps: the name of the radius: "epsilons" if the call gave it.
    """
    theirs = {"x": "inputs", "y": labels, "eps": eps}
    try:
        yield
    except (TypeError, ValueError) as error:
        if _ABOUT_A_CALL.match(str(error)) is None:
            raise
        told = re.sub(r"\b(x|y|eps)\b", lambda word: theirs[word[0]], str(error))
        raise type(error)(told) from error
