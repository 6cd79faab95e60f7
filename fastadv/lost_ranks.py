"""Errors of communication between ranks, with a message that names the ranks that are lost."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

_TIMEOUT = 10.0  # seconds in which all ranks that are alive should have noticed
_POLL_SECONDS = 0.1


class LostRanksError(RuntimeError):
    """Processes that work together did not hear from each other any more: one hangs, or has ended."""


@contextmanager
def communicating() -> Iterator[None]:
    """Raise every `RuntimeError` of a with statement as a `LostRanksError`: the statement only communicates.

    Raises:
        LostRanksError: in place of a RuntimeError.
    """
    try:
        yield
    except LostRanksError:
        raise
    except RuntimeError as error:
        raise LostRanksError(" ".join(str(error).split())) from error


@contextmanager
def naming_lost_ranks(
    store: dist.Store, rank: int, count: int, timeout: float, remedy: str
) -> Iterator[None]:
    """Name the lost ranks in a `LostRanksError`.

    Each rank that has lost others leaves a mark in the store. The ranks without a mark are lost.

    Args:
        store: the store by which the ranks have found each other.
        rank: rank of this process.
        count: the number of ranks.
        timeout: seconds after which a rank counts as lost, for the message.
        remedy: how the work of the ranks goes on, for the message.
    """
    try:
        yield
    except LostRanksError as error:
        lost = _without_mark(store, rank, count)
        if not lost:
            raise LostRanksError(
                f"rank {rank} lost the connection to other ranks, all of which noticed: {error}"
            ) from error
        which = f"rank{'s' if len(lost) > 1 else ''} {', '.join(map(str, lost))}"
        raise LostRanksError(
            f"rank {rank} got no answer from {which} of 0 to {count - 1}, for which it waits {timeout:g} s: "
            f"such a rank hangs or has ended. {remedy} ({error})"
        ) from error


def _without_mark(store: dist.Store, rank: int, count: int) -> list[int]:
    """The ranks that leave no mark within `_TIMEOUT`; empty if the store is gone."""
    try:
        store.set_timeout(timedelta(seconds=_TIMEOUT))
        store.set(f"noticed_{rank}", "")
        deadline = time.monotonic() + _TIMEOUT
        missing = set(range(count))
        while missing and time.monotonic() < deadline:
            missing = {other for other in missing if not store.check([f"noticed_{other}"])}
            time.sleep(_POLL_SECONDS)
        return sorted(missing)
    except RuntimeError:  # the store has gone with the process that held it
        return []
