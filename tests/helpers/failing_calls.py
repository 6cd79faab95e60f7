"""Let one call of the operating system fail, as on a full disk."""

from __future__ import annotations

import builtins
import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

_CALLS = ("replace", "fsync", "mkdir", "symlink")


class FailingCall:
    """The call of a number that writes or renames files: it fails, and the calls before and after it work.

    Attributes:
        failed: the call that failed; empty if there were fewer calls.
    """

    def __init__(self, number: int) -> None:
        self._left = number
        self.failed = ""

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Count the calls in the with statement, and let one of them fail."""
        with pytest.MonkeyPatch.context() as patch:
            for name in _CALLS:
                patch.setattr(os, name, self._counted(name, getattr(os, name)))
            patch.setattr(builtins, "open", self._counted("open", open))
            yield

    def _counted(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            reads = name == "open" and not set("".join(map(str, args[1:2]))) & set("wax+")
            self._left -= not reads
            if self._left == 0 and not reads:
                self.failed = f"{name} {args[0]}"
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args, **kwargs)

        return call


def each_call_failing() -> Iterator[FailingCall]:
    """The first call, the second, and so on, until there were fewer calls."""
    number = 1
    while True:
        call = FailingCall(number)
        yield call
        if not call.failed:
            assert number > 1, "there was no call"
            return
        number += 1
