"""Single passes of a copy as CUDA graphs, for the attacks that are not recorded as a whole.

A pass launches some hundred kernels, and for small images the host is slower than the GPU. PGD and its relatives
are recorded as a whole, see `fastadv.engine.cuda_graph`. Auto-PGD, FAB, Square and C&W decide from step to step
how to go on, and so do all attacks with a loss that is a user's function. Their passes are recorded one by one:
the forward pass, and the backward pass from the logits to the images. The loss between the two is computed as
without a graph, on [B, C] numbers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from fastadv.engine.cuda_graph import ReplayableWork, WorkRecorder, padded_size, zeros_like_images

# Calls of one size in one session before it is recorded. The proof of a copy makes fewer. So does an attack that
# is recorded as a whole, when it runs without its graph for the first time.
LONG = 64
# Recordings kept, the latest used. One with a backward pass holds all that the forward pass saves for it.
CAPACITY = {"logits": 8, "gradient": 4}
# Largest error of a replay, relative to the norm of a pass without a graph, by the bytes of the dtype. Only the
# order in which numbers are added may differ.
_TOLERANCE = {2: 2e-2, 4: 1e-4}

Kind = Literal["logits", "gradient"]


@dataclass
class _RecordedPass:
    """The passes of one batch size.

    Attributes:
        images: the tensor that the passes read, [size, ...].
        logits: the tensor that the forward pass writes, [size, C].
        forward: the recorded forward pass.
        at_logits: the tensor that the backward pass reads, [size, C].
        gradient: the tensor that the backward pass writes, [size, ...].
        backward: the recorded backward pass; None if only the logits are wanted.
        graph: autograd's record of the forward pass, whose saved tensors the backward pass reads.
    """

    images: Tensor
    logits: Tensor
    forward: ReplayableWork
    at_logits: Tensor
    gradient: Tensor
    backward: ReplayableWork | None = None
    graph: list[Tensor] = field(default_factory=list)

    def run_forward(self, x: Tensor) -> Tensor:
        self.images[: len(x)].copy_(x)
        self.forward.replay()
        return self.logits[: len(x)]

    def run_backward(self, at_logits: Tensor) -> Tensor:
        assert self.backward is not None
        count = len(at_logits)
        self.at_logits[:count].copy_(at_logits)
        self.at_logits[count:].zero_()
        self.backward.replay()
        return self.gradient[:count]


class GraphedPasses:
    """The recorded passes of one engine.

    A size is recorded once `LONG` calls in one session have shown that it is worth it. A new recording is held
    against the pass itself. If recording fails, or if the two differ, a warning says so, and no pass is recorded
    any more.

    Args:
        forward: images [B, ...] -> logits [B, C], differentiable; weights keep their addresses.
        recorder: records passes; `CudaRecorder` but in tests.
        any_batch: images do not depend on one another, so that batches may be filled up with other images.

    Attributes:
        turn: number of forward passes so far.
    """

    def __init__(
        self, forward: Callable[[Tensor], Tensor], recorder: WorkRecorder, any_batch: bool
    ) -> None:
        self._forward, self._recorder, self._any_batch = forward, recorder, any_batch
        self._calls: dict[object, int] = {}
        self._recorded: dict[Kind, dict[object, _RecordedPass]] = {"logits": {}, "gradient": {}}
        self._last: _RecordedPass | None = None
        self._resting = False
        self.failure, self.turn = "", 0

    def begin(self) -> None:
        """A session begins, in which calls are counted anew."""
        self._calls.clear()

    @contextmanager
    def resting(self) -> Iterator[None]:
        """While an attack is recorded as a whole, its passes are kernels of that recording."""
        before, self._resting = self._resting, True
        try:
            yield
        finally:
            self._resting = before

    def logits(self, x: Tensor) -> Tensor | None:
        """Logits [B, C], valid until the next call; None where the pass is to be made without a graph."""
        found = self._find("logits", x)
        return None if found is None else found.run_forward(x)

    def forward(self, x: Tensor) -> Tensor | None:
        """As `logits`, of a pass that `backward` goes back through."""
        self._last = self._find("gradient", x)
        return None if self._last is None else self._last.run_forward(x)

    def backward(self, at_logits: Tensor) -> Tensor:
        """The gradient with respect to the images of the last `forward`, valid until the next call.

        Args:
            at_logits: the gradient with respect to its logits, [B, C].
        """
        assert self._last is not None, "backward needs a recorded forward pass"
        return self._last.run_backward(at_logits)

    def _find(self, kind: Kind, x: Tensor) -> _RecordedPass | None:
        self.turn += 1
        if self._resting or self.failure or not len(x) or x.dtype == torch.float64:
            return None
        size = padded_size(len(x)) if self._any_batch else len(x)
        place = (kind, size, x.shape[1:], x.dtype)
        kept = self._recorded[kind]
        found = kept.pop(place, None)
        if found is None:
            self._calls[place] = self._calls.get(place, 0) + 1
            if self._calls[place] <= LONG:
                return None
            del self._calls[place]
            while len(kept) >= CAPACITY[kind]:  # the device is done with it: recording waits
                del kept[next(iter(kept))]
            found = self._record(kind, x, size)
        if found is not None:
            kept[place] = found  # the last is the latest used
        return found

    def _record(self, kind: Kind, x: Tensor, size: int) -> _RecordedPass | None:
        """Record a size and compare; a failure is told once."""
        try:
            made = self._made(kind, x, size)
            self._compare(made)
        except Exception as error:  # a model's own code may do anything that a graph cannot
            self.failure = f"recording a pass as a CUDA graph failed: {error}"
            for kept in self._recorded.values():
                kept.clear()
            warnings.warn(f"fastadv attacks without a CUDA graph: {self.failure}", stacklevel=10)
            return None
        return made

    def _made(self, kind: Kind, x: Tensor, size: int) -> _RecordedPass:
        images = zeros_like_images(x, size)
        images[: len(x)].copy_(x)
        with torch.no_grad():
            logits = torch.empty_like(self._forward(images))
        wants_gradient = kind == "gradient"
        leaf = images.detach().requires_grad_(wants_gradient)
        graph: list[Tensor] = []

        def forward() -> None:
            with torch.set_grad_enabled(wants_gradient):
                out = self._forward(leaf)
            graph[:] = [out]
            logits.copy_(out.detach())

        made = _RecordedPass(
            images,
            logits,
            self._recorder.record(forward),
            at_logits=torch.zeros_like(logits),
            gradient=torch.empty_like(images),
            graph=graph,
        )
        # Before the first replay the tensors that the forward pass has saved have no values. Among them may be
        # indices, for example of a pooling layer, with which the backward pass would read outside of its memory.
        made.forward.replay()
        if wants_gradient:

            def backward() -> None:
                (found,) = torch.autograd.grad(graph[0], leaf, made.at_logits, retain_graph=True)
                made.gradient.copy_(found)

            made.backward = self._recorder.record(backward)
        return made

    def _compare(self, made: _RecordedPass) -> None:
        """Hold a recording against the pass itself, on the images that it holds.

        Raises:
            RuntimeError: if they differ by more than the order of additions explains.
        """
        made.forward.replay()
        leaf = made.images.detach().clone().requires_grad_(made.backward is not None)
        with torch.set_grad_enabled(made.backward is not None):
            logits = self._forward(leaf)
        _check_close("logits", made.logits, logits.detach())
        if made.backward is None:
            return
        made.at_logits.copy_(_uneven_like(made.at_logits))
        made.backward.replay()
        (gradient,) = torch.autograd.grad(logits, leaf, made.at_logits)
        _check_close("gradients", made.gradient, gradient)


def _uneven_like(t: Tensor) -> Tensor:
    """Numbers that differ from place to place, without a draw of random numbers."""
    return torch.arange(t.numel(), device=t.device).view(t.shape).float().sin().to(t.dtype)


def _check_close(name: str, replayed: Tensor, expected: Tensor) -> None:
    allowed = _TOLERANCE[expected.element_size()]
    wide, truth = replayed.double(), expected.double()
    error = (wide - truth).norm() / truth.norm().clamp_min(torch.finfo(torch.float32).tiny)
    if not bool(error <= allowed):
        raise RuntimeError(f"the {name} of a replay are off by {float(error):.2g} of their norm")
