"""Memory that programs keep between passes."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor


class Memory:
    """Channels-last bfloat16 buffers, handed out during a pass and all taken back at its end.

    A pass of fewer images uses the first part of each buffer. So the two images of a proof do not cost the attack
    its buffers.
    """

    def __init__(self) -> None:
        self._free: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
        self._taken: list[tuple[tuple[int, ...], Tensor]] = []
        self._most = 0  # images of a pass

    def take(self, shape: torch.Size | tuple[int, ...]) -> Tensor:
        """A buffer with arbitrary contents."""
        key = tuple(shape[1:])
        free = self._free[key]
        while free and free[-1].shape[0] < shape[0]:
            free.pop()
        buffer = free.pop() if free else _new_buffer(tuple(shape))
        self._taken.append((key, buffer))
        return buffer if buffer.shape[0] == shape[0] else buffer[: shape[0]]

    def reset(self, batch: int) -> None:
        """Take every buffer back; drop them if they are for fewer images."""
        for key, buffer in self._taken:
            self._free[key].append(buffer)
        self._taken.clear()
        if batch > self._most:
            self._free.clear()
            self._most = batch


def _new_buffer(shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, memory_format=torch.channels_last, device="cpu")
