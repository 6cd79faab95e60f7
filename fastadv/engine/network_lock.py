"""Let one thread at a time attack a network, also where several models share it."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from fastadv.engine.networks import parts_of

_changed = threading.Condition()
# For each thread, the ids of the modules that it holds, in a set for each time it has entered.
_held: dict[int, list[set[int]]] = {}
# For each thread that waits, the ids of the modules that it waits for.
_wanted: dict[int, set[int]] = {}


@contextmanager
def locked(*models: object) -> Iterator[None]:
    """Within, no other thread attacks a model that shares a module with one of these.

    All modules are taken at once. A thread may enter again.

    Raises:
        RuntimeError: two threads would wait for each other, because the forward pass of each one's network attacks
            the other's network.
    """
    # The modules are kept, so that no other object gets their ids.
    parts = [part for model in models for part in parts_of(model)]
    ids, me = {id(part) for part in parts}, threading.get_ident()

    with _changed:
        _wanted[me] = ids
        try:
            while holders := _holders(ids, me):
                if _waits_for(me, holders):
                    raise RuntimeError(
                        "two threads would wait for each other for ever: each attacks a network within an "
                        "attack on a network that the other thread attacks; attack these networks in one thread"
                    )
                _changed.wait()
        finally:
            del _wanted[me]
        _held.setdefault(me, []).append(ids)
    try:
        yield
    finally:
        with _changed:
            mine = _held[me]
            mine.pop()
            if not mine:
                del _held[me]
            _changed.notify_all()


def _holders(ids: set[int], me: int) -> set[int]:
    """The other threads that hold some of these modules."""
    return {
        thread
        for thread, sets in _held.items()
        if thread != me and any(not ids.isdisjoint(taken) for taken in sets)
    }


def _waits_for(me: int, threads: set[int]) -> bool:
    """Whether one of these threads waits for a module that the thread ``me`` holds, or waits for such a thread."""
    seen: set[int] = set()
    while threads:
        if me in threads:
            return True
        seen |= threads
        waiting = [thread for thread in threads if thread in _wanted]
        threads = set().union(*(_holders(_wanted[t], t) for t in waiting)) - seen
    return False


def _forget_other_threads() -> None:
    """A forked process has one thread; locks that others held stay with the parent."""
    global _changed
    _changed = threading.Condition()
    for known in (_held, _wanted):
        for thread in [thread for thread in known if thread != threading.get_ident()]:
            del known[thread]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_other_threads)
