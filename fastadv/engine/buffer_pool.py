"""The pool of buffers that programs keep between passes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

from fastadv.engine.operands import storage_of
from fastadv.engine.operator_calls import unrecorded


class Memory:
    """Channels-last buffers of one dtype, handed out during a pass and all taken back at its end.

    Activations stay until then, since the backward pass reads them. A gradient's buffer can be taken back earlier.
    A pass of fewer images uses the first part of each buffer. So the two images of a proof do not cost the attack
    its buffers.
    """

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        self.dtype = dtype
        self._free: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
        self._taken: list[tuple[tuple[int, ...], Tensor]] = []
        self._most = 0  # largest number of images of a pass
        # The buffers of gradients, by the key of their storage.
        self._gradients: dict[int, tuple[tuple[int, ...], Tensor]] = {}
        self._is_backward = False

    def take(self, shape: torch.Size | tuple[int, ...]) -> Tensor:
        """A buffer with arbitrary contents."""
        key = tuple(shape[1:])
        free = self._free[key]
        while free and free[-1].shape[0] < shape[0]:
            free.pop()
        buffer = free.pop() if free else self._new(shape)
        if self._is_backward:
            self._gradients[storage_of(buffer)] = key, buffer
        else:
            self._taken.append((key, buffer))
        return buffer if buffer.shape[0] == shape[0] else buffer[: shape[0]]

    def begin_backward(self) -> None:
        """Buffers taken from now on hold gradients."""
        self._is_backward = True

    def give_back(self, gradient: Tensor, others: Iterable[Tensor]) -> None:
        """Take back the buffer of a gradient that is no longer read; a buffer that others share stays taken.

        Args:
            gradient: any tensor.
            others: all gradients that will be read.
        """
        storage = storage_of(gradient)
        if storage in self._gradients and all(storage_of(other) != storage for other in others):
            key, buffer = self._gradients.pop(storage)
            self._free[key].append(buffer)

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in one of the buffers."""
        lists = (self._taken, self._gradients.values())
        buffers = [buffer for taken in lists for _, buffer in taken]
        for free in self._free.values():
            buffers += free
        return storage_of(tensor) in map(storage_of, buffers)

    def reset(self, batch: int) -> None:
        """Take every buffer back; drop them if they are for fewer images."""
        for key, buffer in (*self._taken, *self._gradients.values()):
            self._free[key].append(buffer)
        self._taken.clear()
        self._gradients.clear()
        self._is_backward = False
        if batch > self._most:
            self._free.clear()
            self._most = batch

    def _new(self, shape: torch.Size | tuple[int, ...]) -> Tensor:
        with unrecorded():  # a replay of the pass writes to the same buffer
            return torch.empty(
                tuple(shape), dtype=self.dtype, memory_format=torch.channels_last, device="cpu"
            )
