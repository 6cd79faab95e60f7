"""A whole attack as one CUDA graph: recorded once per batch size, and from then on only replayed.

A step of an attack launches some hundred kernels. For small images each takes the GPU hardly longer than the host
needs to launch it; a recorded graph is launched as a whole. It reads and writes memory at fixed addresses: what
changes from call to call (starting points, images, labels, radii, step sizes) is copied there before a replay, and
weights stay at their addresses in the attack copy, which is refreshed before.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

# Recordings kept: all sizes of batches of up to 128. They share the memory of their intermediate results.
CAPACITY = 16
SMALLEST_STEP = 8  # between batch sizes; above 128 it is an eighth of the power of two below
MOST_GRADIENTS = 50  # in one graph; every kernel of every step takes memory of its own there
_WARM_UPS = 2

# (inputs with a batch axis each, bool [B]: which samples count) -> outputs, the first with a batch axis
Loop = Callable[[tuple[Tensor, ...], Tensor], tuple[Tensor, ...]]


class ReplayableWork(Protocol):
    """Work that can be done again on the memory on which it was recorded."""

    def replay(self) -> None:
        """Do the work, in the order of the current stream."""


class WorkRecorder(Protocol):
    """Records work."""

    def record(self, work: Callable[[], None]) -> ReplayableWork:
        """Record the operations of ``work`` on tensors that exist before it; it may run many times, or never."""


class CudaRecorder:
    """Records the kernels that a function launches as a CUDA graph.

    All graphs are recorded on one stream and share a pool of memory: every replay overwrites the
    intermediate results of its loop, and may overwrite the intermediate results of other loops. After a failure
    the next ones share a new pool.

    Args:
        device: the CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, work: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """Record a function's kernels.

        It runs before: kernels are compiled, convolution algorithms chosen and workspaces made on first use,
        which waits for the device, and that is not allowed while recording.
        """
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            try:
                # Puts the current stream back also where the end of a failed recording does not.
                with torch.cuda.stream(self._stream):
                    return self._warmed_up(work)
            finally:  # after a failure kernels may still run, in memory that is about to be freed
                current.wait_stream(self._stream)

    def _warmed_up(self, work: Callable[[], None]) -> torch.cuda.CUDAGraph:
        for _ in range(_WARM_UPS):
            work()
        try:
            return self._record(work, self._pool)
        except Exception:
            self._recover()
            raise

    def _record(self, work: Callable[[], object], pool: Any) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # "thread_local": other threads, such as those of a data loader, may go on using the device.
        with torch.cuda.graph(  # waits for the device first
            graph, pool, self._stream, capture_error_mode="thread_local"
        ):
            work()
        return graph

    def _recover(self) -> None:
        """Undo the traces of a failed recording.

        Where its end fails, in torch before 2.12 (pytorch#180395), the allocator believes that it still records,
        and the generator of random numbers refuses to draw, which it does until a recording succeeds.

        Where its end succeeds, as after an error of Python's, it is gone, and with it perhaps the last recording
        of its pool. Such a pool takes no other recording while some of its memory is in use, and the traceback
        uses it.
        """
        with suppress(RuntimeError):  # where it does not record any more
            torch._C._cuda_endAllocateToPool(self._device.index, self._pool)
        self._pool = torch.cuda.graph_pool_handle()
        self._record(lambda: torch.zeros(1, device=self._device, dtype=torch.float32), None)


class _Inputs:
    """Memory for the inputs of a loop over batches of up to ``size`` samples, in the layout of attacked images."""

    def __init__(self, like: tuple[Tensor, ...], size: int) -> None:
        self.tensors = tuple(zeros_like_images(t, size) for t in like)
        self.active = torch.zeros(size, dtype=torch.bool, device=like[0].device)

    def load(self, inputs: tuple[Tensor, ...]) -> None:
        """Copy a batch in; rows beyond it keep an earlier batch's values, and are not active."""
        count = inputs[0].shape[0]
        for own, given in zip(self.tensors, inputs, strict=True):
            own[:count].copy_(given)
        self.active[:count].fill_(True)
        self.active[count:].fill_(False)


def zeros_like_images(t: Tensor, size: int) -> Tensor:
    """Memory for ``size`` samples as those of ``t``, images in the layout in which they are attacked."""
    zeros = t.new_zeros((size, *t.shape[1:]))
    return zeros.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else zeros


@dataclass(frozen=True)
class _Recorded:
    inputs: _Inputs
    outputs: tuple[Tensor, ...]
    recording: ReplayableWork


class GraphCache:
    """The recorded loops of one engine, the least recently used dropped.

    Args:
        recorder: records loops; `CudaRecorder` but in tests.
        classes: number of the model's logits, which a recorded graph does not show.
        required: record at the first call, and raise an error if this fails. Otherwise the first call of a size
            runs without a graph, so that a single call does not pay for a recording, and a failure gives one
            warning.
        around: makes the context in which a loop is recorded.
    """

    def __init__(
        self,
        recorder: WorkRecorder,
        classes: int,
        required: bool,
        around: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.classes = classes
        self._around = around
        self.refusal = ""  # why the last `run` returned None
        self._recorder, self._required = recorder, required
        self._failure = ""
        self._seen: dict[Hashable, None] = {}
        self._recorded: dict[Hashable, _Recorded] = {}

    def run(
        self, key: Hashable, inputs: tuple[Tensor, ...], loop: Loop
    ) -> tuple[Tensor, ...] | None:
        """The result of ``loop`` for the inputs, filled up to a size for which there is, or will be, a recording.

        Args:
            key: all that the loop depends on besides the inputs, but for tensors that keep their addresses.
            inputs: tensors with a batch axis of one length B.
            loop: a function of such inputs, and of a bool tensor that tells which samples count. It may not wait
                for the device nor depend on the inputs in any other way.

        Returns:
            The loop's outputs; of the first the B samples. They are valid until the next call. None where the
            loop is to be run as it is, for the reason in `refusal`.

        Raises:
            ValueError: if the loop cannot be recorded although this is required.
        """
        count = inputs[0].shape[0]
        size = padded_size(count)
        place = (key, size, *((t.shape[1:], t.dtype) for t in inputs))
        found = self._recorded.pop(place, None)
        if found is None and self._is_due(place):
            found = self._recorded_now(size, inputs, loop)
        if found is None:
            return None
        self._recorded[place] = found  # the last is the latest used
        found.inputs.load(inputs)
        found.recording.replay()
        first, *others = found.outputs
        return (first[:count], *others)

    def _is_due(self, place: Hashable) -> bool:
        """Whether to record now; notes the first call of a size."""
        if self._required:
            return True
        if self._failure:
            self.refusal = self._failure
            return False
        if place in self._seen:
            return True
        if len(self._seen) >= 8 * CAPACITY:  # more sizes than that are not worth keeping
            del self._seen[next(iter(self._seen))]
        self._seen[place] = None
        self.refusal = "the first call of a batch size runs without a graph"
        return False

    def _recorded_now(self, size: int, inputs: tuple[Tensor, ...], loop: Loop) -> _Recorded | None:
        try:
            with self._around():
                made = self._record(size, inputs, loop)
        except Exception as error:  # a model's own code may do anything that a graph cannot
            self.refusal = self._failure = f"recording a CUDA graph failed: {error}"
            if self._required:
                raise ValueError(
                    "engine must be 'auto', 'eager' or 'compiled' for this model, got 'graph': "
                    f"{self._failure}"
                ) from error
            warnings.warn(f"fastadv attacks without a CUDA graph: {self._failure}", stacklevel=10)
            return None
        while len(self._recorded) >= CAPACITY:  # the device is done with it: recording has waited
            del self._recorded[next(iter(self._recorded))]
        return made

    def _record(self, size: int, inputs: tuple[Tensor, ...], loop: Loop) -> _Recorded:
        own = _Inputs(inputs, size)
        own.load(inputs)
        outputs = tuple(torch.empty_like(out) for out in loop(own.tensors, own.active))

        def work() -> None:
            for to, out in zip(outputs, loop(own.tensors, own.active), strict=True):
                to.copy_(out)

        return _Recorded(own, outputs, self._recorder.record(work))


def padded_size(count: int) -> int:
    """The batch size to which ``count`` samples are filled up: a multiple of 8, above 128 of 16, and so on."""
    step = max(SMALLEST_STEP, 1 << max((count - 1).bit_length() - 4, 0))
    return -(-count // step) * step
