"""The operations of the live model as it is now: recordings of images of a batch, and their common tape."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastadv.engine.counters import plain_state
from fastadv.engine.errors import DependsOnBatch, Unrecordable
from fastadv.engine.holding import held
from fastadv.engine.recorder import record, recorded
from fastadv.engine.recording import Recording
from fastadv.engine.remembered import Remembered
from fastadv.engine.tape import Tape, same_tensors, tape_for_one_size, tape_of

SIZES = (3, 4)  # of the two batches of which a copy is made
PROBES = 2  # images that prove a copy at every use
_CALLS = 8  # in which a model must do the same, to be copied
_COUNTED_CALLS = 64  # if it counts them


def tape_now(model: nn.Module, x: Tensor) -> tuple[Tape, Recording]:
    """The model's operations, and a recording to compare gradients with.

    Raises:
        Unrecordable: no copy can be made.
    """
    try:
        # Held once for both, so that a model which counts its calls, and acts on it, shows that.
        with held(model):
            first, second = (recorded(model, _some(x, size), careful=True) for size in SIZES)
        tape = tape_of(first, second)
        if tape.describes(whole_recorded(model, x, tape.own_functions)):
            return tape, second
    except DependsOnBatch:
        pass
    except Unrecordable:
        raise
    except Exception:
        pass  # the model may take batches of one size alone; if not, its own error comes now
    others = 0.9 * finite(x) + 0.1 * finite(x).flip(0, -1)
    with held(model):
        first, second = (recorded(model, images, careful=True) for images in (others, finite(x)))
    tape = tape_for_one_size(first)
    if not (tape.describes(second) and same_tensors(first, second)):
        raise Unrecordable("its operations change from call to call")
    return tape, second


def few_recorded(model: nn.Module, x: Tensor, tape: Tape) -> Recording | None:
    """A recording of the images with which every later use begins.

    So a copy that is right on them now is found right later, too.

    None where the model does something else with so few images.

    Raises:
        Unrecordable: these are all images of the batch.
    """
    recording = record(model, finite(x[:PROBES]), careful=tape.own_functions)
    if tape.describes(recording):
        return recording
    if x.shape[0] <= PROBES:
        raise Unrecordable(f"it does something else for {x.shape[0]} images")
    return None


def is_steady(model: nn.Module, tape: Tape, remembered: Remembered) -> bool:
    """Whether a model does the same in each of several calls, as one does not that takes turns or counts."""
    with held(model):
        before, calls, done = plain_state(model), _CALLS, 0
        while done < calls:
            recording = remembered.again(model)
            if recording is None or not tape.describes(recording):
                return False
            done += 1
            if done == 1 and plain_state(model) != before:
                calls = _COUNTED_CALLS
    return True


def whole_recorded(model: nn.Module, x: Tensor, careful: bool) -> Recording:
    """A recording of the whole batch, whose graph would be large; of half of it where memory does not suffice."""
    try:
        return record(model, finite(x), careful=careful, gradients=False)
    except torch.OutOfMemoryError:
        if x.shape[0] <= SIZES[-1]:
            raise
        return whole_recorded(model, x[: x.shape[0] // 2], careful)


def _some(x: Tensor, size: int) -> Tensor:
    """``size`` images, by turns from the batch; two sizes have no image in common."""
    rows = torch.arange(size, device=x.device) % x.shape[0]
    images = finite(x[rows])
    return images if size == SIZES[-1] else 0.9 * images + 0.1 * images.flip(0)


def finite(x: Tensor) -> Tensor:
    """Images without NaN and infinity, which say nothing about a network."""
    return torch.nan_to_num(x.detach(), nan=0.0, posinf=0.0, neginf=0.0)
