"""Memory that programs keep between passes."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor


class Memory:
    """Channels-last buffers of one dtype, handed out during a pass and all taken back at its end."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        self.dtype = dtype
        self._free: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
        self._taken: list[tuple[tuple[int, ...], Tensor]] = []
        self._batches: tuple[int, ...] = ()  # of the last two kinds of passes

    def take(self, shape: torch.Size | tuple[int, ...]) -> Tensor:
        """A buffer with arbitrary contents."""
        key = tuple(shape)
        free = self._free[key]
        buffer = free.pop() if free else self._new(key)
        self._taken.append((key, buffer))
        return buffer

    def reset(self, batch: int) -> None:
        """Take every buffer back; keep those of this batch size and of the one before, such as the proof's."""
        for key, buffer in self._taken:
            self._free[key].append(buffer)
        self._taken.clear()
        self._batches = (batch, *[other for other in self._batches if other != batch][:1])
        for key in [key for key in self._free if key[0] not in self._batches]:
            del self._free[key]

    def _new(self, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, memory_format=torch.channels_last, device="cpu")
