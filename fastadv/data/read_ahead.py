"""The batches of a DataLoader, with an error in words where one of its worker processes is killed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

_LOST = "DataLoader worker (pid"  # torch's message begins so


def read_ahead(loader: DataLoader[Any]) -> Iterator[Any]:
    """Yield the batches of a loader.

    Raises:
        RuntimeError: if a worker process has ended without an exception.
    """
    batches = iter(loader)
    try:
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except RuntimeError as error:
                if not str(error).startswith(_LOST):
                    raise
                raise RuntimeError(
                    f"one of the {loader.num_workers} processes that read data was killed, as happens where "
                    f"memory is short ({error}); give fewer workers"
                ) from error
            yield batch
    finally:
        del batches  # a traceback that keeps this frame would keep the workers alive
