"""What somebody may have meant who mistyped a word."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def suggestion(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the known word that is most like a word, else nothing."""
    by_key = {_key(one): one for one in known}
    close = difflib.get_close_matches(_key(word), by_key, n=1)
    return f"; did you mean {by_key[close[0]]!r}?" if close else ""


def check_known(name: str, word: str, known: Iterable[str]) -> None:
    """Require one of several words.

    Raises:
        ValueError: naming the words, and the one that may have been meant.
    """
    words = list(known)
    if word not in words:
        raise ValueError(
            f"{name} must be one of {', '.join(words)}, got {word!r}{suggestion(word, words)}"
        )


def _key(word: str) -> str:
    """The word without what does not count: case, and how its parts are joined."""
    return word.lower().replace("-", "_")
