"""The state of a method between batches, as checkpoints hold it: the parts of all processes together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fastadv.data import Batches
from fastadv.ranks import Ranks
from fastadv.trainers.method import Method
from fastadv.trainers.returns import described


def checked_state(method: Method[Any, Any]) -> dict[str, Tensor]:
    """Return the result of a method's `state`, checked before a checkpoint that cannot be read is written.

    Raises:
        TypeError: if it is not a mapping of names to tensors.
    """
    where, found = f"{type(method).__name__}.state", method.state()
    if not isinstance(found, Mapping):
        raise TypeError(f"{where} must return a dict of tensors by name, got {described(found)}")
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise TypeError(
                f"{where} must return tensors by name, such as torch.tensor(3) for a number and the entries of a "
                f"state dict for a model, got {described(value)} under {name!r}"
            )
    return dict(found)


def gather_state(method: Method[Any, Any], ranks: Ranks) -> dict[str, Tensor]:
    """Return a method's state: the parts of all processes one after the other, and of a scalar the first's."""
    state = checked_state(method)
    return {
        name: value if value.dim() == 0 else ranks.gather(value) for name, value in state.items()
    }


def shard_state(state: Mapping[str, Tensor], loader: Batches) -> dict[str, Tensor]:
    """Return this process's part of a state that `gather_state` returned."""
    return {k: value if value.dim() == 0 else loader.shard(value) for k, value in state.items()}
