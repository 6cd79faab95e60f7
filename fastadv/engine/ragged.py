"""Sizes that depend on values: how many images a network is not sure of, or how many pixels are bright.

Torch computes them without handing a value to Python, and yet code that reads such a size may do anything with it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastadv.engine.operands import marked_by, tensors_in

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
        return [t for t in tensors_in(args[1:]) if t.dtype in _MASKS]
    if name == "masked_select":
        return tensors_in((*args[1:], *kwargs.values()))
    if name == "where":
        return tensors_in(args) if len(args) + len(kwargs) == 1 else []
    if name == "repeat_interleave":
        fixed = kwargs.get("output_size") is not None
        repeats = args[1] if len(args) > 1 else kwargs.get("repeats", args[0] if args else None)
        return [] if fixed else tensors_in((repeats,))
    if name == "one_hot":
        classes = args[1] if len(args) > 1 else kwargs.get("num_classes", -1)
        return tensors_in(args) if classes == -1 else []
    if name == "unique" or _is_ragged(name):
        return tensors_in((*args, *kwargs.values()))
    return []


def may_decide(name: str) -> bool:
    """Whether `deciding` may find tensors for a function of this name."""
    return name in _DECIDING or _is_ragged(name)


_DECIDING = frozenset(
    ("__getitem__", "index", "masked_select", "where", "repeat_interleave", "one_hot", "unique")
)
# Whether torch marks an operator of a name as having a result whose shape depends on values.
_is_ragged = marked_by(torch.Tag.dynamic_output_shape)
