"""The tensors among the arguments of a function, facts about each tensor, and torch's tags of operators."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import Node, increment_version

from fastadv.engine.watched_size import WatchedSize


def broadcast_shapes(*shapes: tuple[int, ...]) -> torch.Size:
    """As `torch.broadcast_shapes`, whose first call imports sympy, which takes about a second.

    Raises:
        ValueError: the shapes do not fit.
    """
    return torch.Size(np.broadcast_shapes(*shapes))


def tensors_in(values: Any) -> list[Tensor]:
    """The tensors in nested arguments."""
    found: list[Tensor] = []
    for value in values:
        if value.__class__ in _PLAIN:
            continue  # most arguments
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found.extend(tensors_in(value))
        elif isinstance(value, dict):
            found.extend(tensors_in(value.values()))
        elif isinstance(value, slice):
            found.extend(tensors_in((value.start, value.stop, value.step)))
    return found


_PLAIN = frozenset((int, float, bool, str, type(None), torch.dtype, torch.Size, WatchedSize))


def version_of(tensor: Tensor) -> int:
    """Rises with every write to a tensor; 0 for tensors that do not count their writes."""
    return 0 if tensor.is_inference() else tensor._version


def count_write(tensor: Tensor) -> None:
    """Let a tensor that counts its writes count one more."""
    if not tensor.is_inference():
        increment_version(tensor)


def storage_of(tensor: Tensor) -> int:
    """The key of the memory that tensors share."""
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse and other tensors without one
        return id(tensor)


def leads_to(tensor: Tensor, leaf: Tensor) -> bool:
    """Whether a tensor's autograd graph reaches the images."""
    if tensor.grad_fn is None:  # as of most weights
        return False
    seen: set[Node] = set()
    waiting: list[Node | None] = [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if getattr(node, "variable", None) is leaf:
            return True
        waiting.extend(following for following, _ in node.next_functions)
    return False


def marked_by(tag: torch.Tag) -> Callable[[str], bool]:
    """Return a function that tells whether torch marks an operator of a name by a tag."""

    @cache
    def is_marked(name: str) -> bool:
        packet: Any = getattr(torch.ops.aten, name, None)
        is_operator = isinstance(packet, torch._ops.OpOverloadPacket)
        return is_operator and any(tag in getattr(packet, o).tags for o in packet.overloads())

    return is_marked
