"""One pass of a program (see `fastadv.engine.cpu_program`): the data that its steps share, and their gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from fastadv.engine.buffer_pool import Memory

_OPS = torch.ops.fastadv

Emit = Callable[[Tensor | None, Tensor | None], Tensor]  # (add, mask): a gradient


class Pass:
    """One forward and backward pass: activations and gradients by node.

    Gradients arrive at a node one user at a time, in reverse order. The last to arrive writes their sum, and
    where the node is the result of a fused ReLU also masks it; users' backward steps therefore always find
    the gradient before the ReLU.
    """

    def __init__(self, memory: Memory, masked: set[fx.Node], uses: dict[fx.Node, int]) -> None:
        self.memory = memory
        self.values: dict[fx.Node, Any] = {}
        self.tapes: dict[fx.Node, tuple[tuple[Any, ...], dict[fx.Node, Tensor]]] = {}
        self.kept: dict[fx.Node, Any] = {}  # tensors of a fused step's forward for its backward
        # Values that several steps share, by an object that stands for them.
        self.blocks: dict[Any, Any] = {}
        self._gradients: dict[fx.Node, Tensor] = {}
        self._items: dict[fx.Node, dict[int, Tensor]] = {}
        self._masked = masked
        self._remaining = dict(uses)

    def gradient(self, node: fx.Node) -> Tensor:
        """The whole gradient at a node."""
        return self._gradients[node]

    def has_gradient(self, node: fx.Node) -> bool:
        """Whether any contribution has arrived at a node."""
        return node in self._gradients or node in self._items

    def gradients_of_items(self, node: fx.Node) -> dict[int, Tensor]:
        """The gradient of each result of a node with several, by number; a single result is number 0."""
        return self._items.get(node) or {0: self._gradients[node]}

    def forget(self, node: fx.Node) -> None:
        """Drop the gradient at a node, after it was passed on."""
        gradient, items = self._gradients.pop(node, None), self._items.pop(node, {})
        for gone in (gradient, *items.values()):
            self._give_back(gone)

    def _waiting(self) -> Iterator[Tensor]:
        """The gradients that are still to be passed on."""
        yield from self._gradients.values()
        for items in self._items.values():
            yield from items.values()

    def arrive_item(self, node: fx.Node, number: int, gradient: Tensor) -> None:
        """Add a contribution to one of several results of a node."""
        self._remaining[node] -= 1
        items = self._items.setdefault(node, {})
        items[number] = items[number] + gradient if number in items else gradient

    def arrive_nothing(self, node: fx.Node) -> None:
        """Note that a user of a node, such as one that reads its size, passes no gradient on."""
        mask = self._mask(node)
        if mask is not None and node in self._gradients:
            self._gradients[node] = _merged(self.memory, self._gradients[node], None, mask)

    def arrive(self, node: fx.Node, emit: Emit) -> None:
        """Add a contribution that a fused step can compute together with the sum and the mask."""
        before, mask = self._gradients.get(node), self._mask(node)
        self._gradients[node] = emit(
            None if before is None else as_buffer(before, self.memory.dtype),
            None if mask is None else as_buffer(mask, self.memory.dtype),
        )
        self._give_back(before)

    def arrive_sum(self, node: fx.Node, emit: Callable[[Tensor | None], Tensor]) -> None:
        """Add a contribution that a fused step can compute together with the sum; operands have any layout."""
        before, mask = self._gradients.get(node), self._mask(node)
        total = emit(before)
        self._gradients[node] = _merged(self.memory, total, None, mask)
        self._give_back(before)

    def arrive_tensor(self, node: fx.Node, gradient: Tensor) -> None:
        """Add a contribution that exists already; it is not written to."""
        mask, before = self._mask(node), self._gradients.get(node)
        self._gradients[node] = _merged(self.memory, gradient, before, mask)
        self._give_back(before)

    def _give_back(self, gradient: Tensor | None) -> None:
        """Give back the memory of a gradient that is no longer needed, unless another gradient shares it."""
        if gradient is not None:
            self.memory.give_back(gradient, self._waiting())

    def _mask(self, node: fx.Node) -> Tensor | None:
        """The activation whose sign masks the gradient, when the last contribution arrives; else None."""
        self._remaining[node] -= 1
        last = self._remaining[node] == 0
        return self.values[node] if last and node in self._masked else None


def _merged(memory: Memory, new: Tensor, before: Tensor | None, mask: Tensor | None) -> Tensor:
    """The masked sum of two gradients; ``new`` itself if there is no second gradient and no mask."""
    if before is None and mask is None:
        return new
    operands = [t for t in (new, before, mask) if t is not None]
    if all(is_buffer(t, memory.dtype) for t in operands):
        out = memory.take(new.shape)
        _OPS.merge_gradients_(out, new, before, mask)
        return out
    total = new if before is None else new + before
    # Not a product: behind a ReLU's 0 the gradient may be infinite, as a root's is, and 0 times infinity is NaN.
    return total if mask is None else torch.where(mask > 0, total, 0.0)


def laid_out_like(gradient: Tensor, result: Tensor) -> Tensor:
    """The gradient in the dtype and layout of the result, as autograd itself would have it.

    Some backward functions of torch go by the result's layout alone, such as that of instance_norm at batch 1.
    """
    if gradient.dtype == result.dtype and gradient.stride() == result.stride():
        return gradient
    return torch.empty_like(result).copy_(gradient)


def is_differentiable(t: Tensor) -> bool:
    """Whether a tensor can carry a gradient; complex ones do, between a Fourier transform and its inverse."""
    return t.is_floating_point() or t.is_complex()


def is_buffer(t: Tensor, dtype: torch.dtype = torch.bfloat16) -> bool:
    """Whether a map is in the dtype and layout of a program's buffers."""
    return t.dtype == dtype and t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last)


def as_buffer(t: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A map in the dtype and layout of a program's buffers."""
    return t.to(dtype).contiguous(memory_format=torch.channels_last)
