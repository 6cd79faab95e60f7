"""Let one thread at a time attack a network, also where several models share it."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from fastadv.engine.networks import networks_of, parts_of

_changed = threading.Condition()
# For each thread, the ids of the modules that it holds, in a set for each time it has entered.
_held: dict[int, list[set[int]]] = {}


@contextmanager
def locked(*models: object) -> Iterator[None]:
    """Within, no other thread attacks a model that shares a module with one of these.

    All modules are taken at once, so that two threads cannot wait for each other. A thread may enter again.
    """
    # The modules are kept, so that no other object gets their ids.
    parts = parts_of([network for model in models for network in networks_of(model)])
    ids, me = {id(part) for part in parts}, threading.get_ident()

    def are_free() -> bool:
        others = (taken for thread, sets in _held.items() if thread != me for taken in sets)
        return all(ids.isdisjoint(taken) for taken in others)

    with _changed:
        _changed.wait_for(are_free)
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


def _forget_other_threads() -> None:
    """A forked process has one thread; locks that others held stay with the parent."""
    global _changed
    _changed = threading.Condition()
    for thread in [thread for thread in _held if thread != threading.get_ident()]:
        del _held[thread]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_other_threads)
