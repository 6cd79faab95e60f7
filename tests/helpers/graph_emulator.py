"""A recorder of work that behaves like a CUDA graph, on the CPU: Python runs while recording, and never again.

A replay repeats the recorded operations on the recorded tensors, in their recorded memory. So numbers that Python
has passed stay what they were, and a tensor that was swapped for another goes unnoticed, as with a graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)


class Operations(TorchDispatchMode):
    """The operations of a block, below autograd."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _READS:
            raise RuntimeError(f"{func} waits for the device, which is not permitted")
        out = func(*args, **kwargs)
        made = _tensors(out)
        if func._schema.is_mutable:
            self._calls.append((func, args, kwargs, []))
        elif not _is_view(made, _tensors((args, kwargs))):
            self._calls.append((func, args, kwargs, made))
        return out

    def forget_values(self) -> None:
        """Leave NaN where the block has made numbers: recording a graph computes nothing."""
        for *_, made in self._calls:
            for tensor in made:
                if tensor.is_floating_point():
                    tensor.data.fill_(torch.nan)  # autograd is not told, as by a graph

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, made in self._calls:
            again = _tensors(func(*args, **kwargs))
            for tensor, value in zip(made, again, strict=False):
                tensor.data.copy_(value)


class Devices(TorchDispatchMode):
    """The types of the devices on which the operations of a block have tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.types: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.types |= {tensor.device.type for tensor in _tensors((args, kwargs, out))}
        return out


class EmulatedRecorder:
    """Takes the place of `fastadv.engine.cuda_graph.CudaRecorder`.

    Attributes:
        count: how many recordings were made.
    """

    def __init__(self) -> None:
        self.count = 0

    def record(self, work: Callable[[], None]) -> Operations:
        self.count += 1
        work()  # warm-up
        operations = Operations()
        with operations:
            work()
        operations.forget_values()
        return operations


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _is_view(made: list[Tensor], given: list[Tensor]) -> bool:
    storages = {tensor.untyped_storage().data_ptr() for tensor in given}
    return any(tensor.untyped_storage().data_ptr() in storages for tensor in made)
