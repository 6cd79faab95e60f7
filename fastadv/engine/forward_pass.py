"""The forward pass of a copy on the CPU as far as one of its results, without gradients and in little memory.

The passes of an attack keep every activation for the gradient. Here memory is used again as soon as its last
reader has run, so that a few maps, which mostly stay in the caches, are enough.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from fastadv.engine.buffer_pool import Memory
from fastadv.engine.copy import AttackCopy
from fastadv.engine.cpu_pass import Pass
from fastadv.engine.cpu_program import fused_steps
from fastadv.engine.cpu_steps import ProgramStep
from fastadv.engine.operands import storage_of


class ForwardPass:
    """The steps that lead to one node of a copy's graph.

    Args:
        copy: made with ``pack=True``. Its weights are read at every pass.
        wanted: the node; None is the copy's own result.

    Raises:
        ValueError: no step computes the node, as where it is fused into another one.
    """

    def __init__(self, copy: AttackCopy, wanted: fx.Node | None = None) -> None:
        nodes = list(copy.graph_module.graph.nodes)
        result = next(node for node in nodes if node.op == "output").args[0]
        self._wanted = result if wanted is None else wanted
        self._module = copy.graph_module
        self._input = next(node for node in nodes if node.op == "placeholder")
        self._constants = {node: str(node.target) for node in nodes if node.op == "get_attr"}
        self._steps = _leading_to(self._wanted, fused_steps(copy))
        if not self._steps or self._steps[-1].node is not self._wanted:
            raise ValueError("no step computes the node")
        self._last_uses = {
            source: number for number, step in enumerate(self._steps) for source in step.inputs
        }
        self._memory = _RecycledMemory(copy.dtype)

    def __call__(self, x: Tensor) -> Any:
        """The node's value for images in the copy's layout; it is the caller's own."""
        memory = self._memory
        memory.begin(x.shape[0])
        run = Pass(memory, set(), {})
        run.values[self._input] = x
        for node, name in self._constants.items():
            run.values[node] = getattr(self._module, name)
        kept = {self._input, self._wanted, *self._constants}
        with torch.no_grad():
            for number, step in enumerate(self._steps):
                step.forward(run)
                run.tapes.clear()
                run.kept.clear()
                memory.hold(run.values[step.node])
                for source in dict.fromkeys(step.inputs):
                    if self._last_uses[source] == number and source not in kept:
                        memory.drop(run.values.pop(source))
        value = run.values[self._wanted]
        memory.forget()
        return value


def _leading_to(wanted: fx.Node, steps: list[ProgramStep]) -> list[ProgramStep]:
    """The steps that a node needs, in their order."""
    needed, chosen = {wanted}, []
    for step in reversed(steps):
        if step.node in needed:
            chosen.append(step)
            needed.update(step.inputs)
    return chosen[::-1]


class _RecycledMemory(Memory):
    """Buffers that are handed out again once no value lies in them any more."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self._batch = 0
        self._spare: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
        self._handed: dict[int, Tensor] = {}  # by storage
        self._values: Counter[int] = Counter()  # how many live values share a storage

    def begin(self, batch: int) -> None:
        """Start a pass; buffers for another number of images are freed."""
        self.forget()
        if batch != self._batch:
            self._spare.clear()
        self._batch = batch

    def take(self, shape: torch.Size | tuple[int, ...]) -> Tensor:
        """A buffer with arbitrary contents."""
        spare = self._spare[tuple(shape)]
        buffer = spare.pop() if spare else super().take(shape)
        self._taken.clear()
        self._handed[storage_of(buffer)] = buffer
        return buffer

    def hold(self, value: Any) -> None:
        """Note a value, which may lie in a buffer, or share one with other values."""
        self._values.update(storage_of(part) for part in _tensors(value))

    def drop(self, value: Any) -> None:
        """Note that nobody reads a value any more."""
        for storage in [storage_of(part) for part in _tensors(value)]:
            self._values[storage] -= 1
            buffer = self._handed.get(storage)
            if buffer is not None and self._values[storage] == 0:
                del self._handed[storage]
                self._spare[tuple(buffer.shape)].append(buffer)

    def forget(self) -> None:
        """Leave the buffers that are still in use to whoever has them."""
        self._handed.clear()
        self._values.clear()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)
