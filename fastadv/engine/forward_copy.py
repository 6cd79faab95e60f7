"""The forward pass of a frozen model, by a copy: BatchNorm folded, weights narrow and packed once, no autograd.

A copy is made for one result of a model, such as its logits or the map before pooling. It is made once, from
recordings of the model, and proven against the model on images made up for this. So the outcome depends only on
the model and the shape of the images, and is the same when a run is resumed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastadv.engine import proof
from fastadv.engine.cached_recording import CachedRecording
from fastadv.engine.callers_modes import callers_change
from fastadv.engine.compiled_parts import unwrapped
from fastadv.engine.content import content
from fastadv.engine.copy import AttackCopy
from fastadv.engine.counters import plain_state
from fastadv.engine.engines import channels_last
from fastadv.engine.errors import Unrecordable
from fastadv.engine.first_recordings import is_steady, repeats, tape_now
from fastadv.engine.forward_pass import ForwardPass
from fastadv.engine.layers import CopiedConv2d
from fastadv.engine.network_lock import locked
from fastadv.engine.operands import version_of
from fastadv.engine.precision import COMPUTE_DTYPES
from fastadv.engine.recorder import record
from fastadv.float32 import full_float32

Output = Callable[[nn.Module, Tensor], Tensor]  # a model and images [B, ...] -> one result [B, ...]
_PROVEN = 4  # images on which a copy is compared with its model
_SEED = 20
_PACKED_ON = ("cpu",)  # devices with kernels of our own for convolutions in bfloat16


class ForwardCopy:
    """Computes one result of a model whose weights do not change.

    Args:
        model: the model, in evaluation mode.
        output: the function of the model and the images that gives the result.
        x: images [B, ...] with the shape, dtype and device of later images; their values are not used.
        dtype: dtype of the copy's passes, bfloat16 or float16.

    Raises:
        Unrecordable: if no copy computes this result; the message says why.
    """

    def __init__(self, model: nn.Module, output: Output, x: Tensor, dtype: torch.dtype) -> None:
        change = callers_change()
        if change is not None:
            raise Unrecordable(f"{change} may change what torch's functions compute")
        self._model = model
        self._whole = _OutputOf(unwrapped(model), output)
        self._sizes: dict[int, bool] = {}
        with _own_context(x.device), locked(model), full_float32():
            self._snapshot = _ModelSnapshot(model)
            images = probe_images(x)
            try:
                self._tape, recording = tape_now(self._whole, images)
            except Unrecordable:
                raise
            except Exception as error:
                raise Unrecordable(f"recording it fails: {error}") from error
            if self._tape.only_batch is not None or self._tape.decides_by_batch:
                raise Unrecordable("what it does depends on the number of images")
            if self._tape.autocast:
                raise Unrecordable("its forward enters autocast")
            cached = CachedRecording.of(recording, self._tape.warmup)
            if cached is not None:
                steady = is_steady(self._whole, self._tape, cached)
            else:
                steady = repeats(self._whole, self._tape, recording, recording)
            if not steady:
                raise Unrecordable("its operations change from call to call")
            pack = dtype == torch.bfloat16 and x.device.type in _PACKED_ON
            try:
                self._copy = AttackCopy(self._tape, recording, dtype, pack=pack)
                self._run = ForwardPass(self._copy) if pack else self._under_torch
                found = self._run(channels_last(recording.images.detach()))
            except Exception as error:  # the model's own code may fail in any way
                raise Unrecordable(f"its copy fails: {error}") from error
            precision = next(name for name, own in COMPUTE_DTYPES.items() if own == dtype)
            fault = proof.difference_of_results(found, recording.logits.detach(), precision)
            if fault is not None:
                raise Unrecordable(fault)
            _without_gradients(self._copy)
            self._sizes[x.shape[0]] = True
            self._numbers = plain_state(self._whole)  # now, since recordings may count
            if plain_state(self._whole) != self._numbers:
                raise Unrecordable("it holds an iterator, whose state cannot be seen")

    @property
    def is_current(self) -> bool:
        """Whether the model still has the weights, modes, hooks and settings that were copied."""
        same = callers_change() is None and self._snapshot.matches(self._model)
        return same and plain_state(self._whole) == self._numbers

    def serves(self, x: Tensor) -> bool:
        """Whether the model does the same with this number of images, which is recorded once for each number."""
        size = x.shape[0]
        if size not in self._sizes:
            with _own_context(x.device), locked(self._model), full_float32():
                images = probe_images(x)
                warmup = self._tape.warmup
                recording = record(
                    self._whole, images, careful=False, gradients=False, warmup=warmup
                )
            self._sizes[size] = self._tape.describes(recording)
        return self._sizes[size]

    def __call__(self, x: Tensor) -> Tensor:
        """The result for images [B, ...]; maps are in the copy's dtype and channels-last."""
        with torch.no_grad(), _own_context(x.device):
            found: Tensor = self._run(channels_last(x.detach().float()))
        return found

    def _under_torch(self, x: Tensor) -> Tensor:
        with torch.no_grad(), self._copy.autocast(x.device):
            found: Tensor = self._copy.graph_module(x)
        return found


class _OutputOf(nn.Module):
    """A model that returns another result than its own."""

    def __init__(self, model: nn.Module, output: Output) -> None:
        super().__init__()
        self.model = model
        self._output = output

    def forward(self, x: Tensor) -> Tensor:
        """The result."""
        return self._output(self.model, x)


def probe_images(x: Tensor) -> Tensor:
    """Images of a shape, dtype and device, in 0..1: four different ones by turns, coarse and fine noise.

    Args:
        x: images [B, ...] of which only these are taken.
    """
    generator = torch.Generator("cpu").manual_seed(_SEED)
    shape = (_PROVEN, *x.shape[1:])
    images = torch.rand(shape, generator=generator, device="cpu", dtype=torch.float32)
    if len(shape) == 4:
        height, width = (max(1, size // 8) for size in shape[2:])
        coarse = torch.rand(
            (*shape[:2], height, width), generator=generator, device="cpu", dtype=torch.float32
        )
        coarse = F.interpolate(coarse, shape[2:], mode="bilinear", align_corners=False)
        images[::2] = coarse[::2]
    rows = torch.arange(x.shape[0], device="cpu") % _PROVEN
    return channels_last(images[rows].to(x.device, torch.float32))


class _ModelSnapshot:
    """The weights, buffers, modes, hooks and classes of a model at one moment, to see later whether they changed.

    Torch counts the changes of a tensor, but not those through ``tensor.data``, as averages of weights are often
    written. On the CPU a hash of all weights shows them. Buffers are compared as well, since processes that train
    together write into them what is there already.
    """

    def __init__(self, model: nn.Module) -> None:
        self._content = _content_of(model)
        self._parameters = [(p, version_of(p)) for p in model.parameters()]
        self._buffers = [(b, version_of(b), b.clone()) for b in model.buffers()]
        self._modes = _modes_of(model)

    def matches(self, model: nn.Module) -> bool:
        """Whether the model is as it was when the snapshot was made."""
        parameters, buffers = list(model.parameters()), list(model.buffers())
        if len(parameters) != len(self._parameters) or len(buffers) != len(self._buffers):
            return False
        if _modes_of(model) != self._modes:
            return False
        if self._content is not None and _content_of(model) != self._content:
            return False
        return all(
            p is then and version_of(p) == version
            for p, (then, version) in zip(parameters, self._parameters, strict=True)
        ) and all(
            b is then and (version_of(b) == version or torch.equal(b, value))
            for b, (then, version, value) in zip(buffers, self._buffers, strict=True)
        )


def _content_of(model: nn.Module) -> tuple[Any, ...] | None:
    return content([*model.parameters(), *model.buffers()])


def _modes_of(model: nn.Module) -> list[tuple[Any, ...]]:
    """The hooks for all modules; of each module its mode, hooks and class, and the forward methods of both."""
    everywhere = nn.modules.module
    hooks = (everywhere._global_forward_pre_hooks, everywhere._global_forward_hooks)
    return [
        tuple(hook for kind in hooks for hook in kind.values()),
        *(
            (
                module,
                module.training,
                (*module._forward_pre_hooks.values(), *module._forward_hooks.values()),
                vars(module).get("forward"),
                type(module),
                type(module).forward,
            )
            for module in model.modules()
        ),
    ]


def _without_gradients(copy: AttackCopy) -> None:
    """Free the filters of the gradients' convolutions, which no forward pass reads."""
    for module in copy.graph_module.modules():
        if isinstance(module, CopiedConv2d) and module.packed is not None:
            module.packed.backward = None


@contextmanager
def _own_context(device: torch.device) -> Iterator[None]:
    """Leave the caller's autocast and inference mode: recordings and copies have their own precision."""
    with torch.inference_mode(False), torch.autocast(device.type, enabled=False):
        yield
