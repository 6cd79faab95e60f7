"""Sizes that depend on values: how many images a network is not sure of, or how many pixels are bright.

Torch computes them without handing a value to Python, and yet code that reads such a size may do anything with it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Functions that read a size, and functions with as many results as a size says.
SIZES = frozenset(("size", "shape", "numel", "nelement", "__len__", "stride"))
CUTS = frozenset(("unbind", "split", "split_with_sizes", "chunk", "tensor_split"))
# They write into a tensor of the shape of their first argument.
KEEPS_SHAPE = frozenset(
    ("index_put", "index_copy", "index_add", "index_fill", "scatter", "scatter_add", "masked_scatter",
     "masked_fill")
)  # fmt: skip
_MASKS = (torch.bool, torch.uint8)


def deciding(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors whose values decide the shape of a function's result; empty for most functions."""
    if name in ("__getitem__", "index"):
        return [t for t in _tensors(args[1:]) if t.dtype in _MASKS]
    if name == "masked_select":
        return _tensors((*args[1:], *kwargs.values()))
    if name == "where":
        return _tensors(args) if len(args) + len(kwargs) == 1 else []
    if name == "repeat_interleave":
        fixed = kwargs.get("output_size") is not None
        repeats = args[1] if len(args) > 1 else kwargs.get("repeats", args[0] if args else None)
        return [] if fixed else _tensors((repeats,))
    if name == "one_hot":
        classes = args[1] if len(args) > 1 else kwargs.get("num_classes", -1)
        return _tensors(args) if classes == -1 else []
    if name == "unique" or _is_tagged(name):
        return _tensors((*args, *kwargs.values()))
    return []


def _tensors(values: tuple[Any, ...]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found.extend(_tensors(tuple(value)))
    return found


_tagged: dict[str, bool] = {}


def _is_tagged(name: str) -> bool:
    """Whether torch marks an operator of this name as having a result whose shape depends on values."""
    known = _tagged.get(name)
    if known is None:
        packet: Any = getattr(torch.ops.aten, name, None)
        is_operator = isinstance(packet, torch._ops.OpOverloadPacket)
        overloads = [getattr(packet, o) for o in packet.overloads()] if is_operator else []
        known = any(torch.Tag.dynamic_output_shape in o.tags for o in overloads)
        _tagged[name] = known
    return known
