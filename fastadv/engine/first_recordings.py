"""The recordings of which a copy is made, and how a model is seen to do the same in every call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from fastadv.engine import proof
from fastadv.engine.cached_recording import CachedRecording, counted_weights
from fastadv.engine.counters import plain_state
from fastadv.engine.errors import DependsOnBatch, Unrecordable
from fastadv.engine.named_code import asks_for_gradients
from fastadv.engine.outline import outlined
from fastadv.engine.recorder import record, recorded
from fastadv.engine.recording import Recording
from fastadv.engine.recording_mode import recording_mode, warm_up
from fastadv.engine.tape import Tape, same_tensors, tape_for_one_size, tape_of

SIZES = (3, 4)  # of the two batches of which a copy is made
PROBES = 2  # images that prove a copy at every use
_CALLS = 8  # in which a model must do the same, to be copied
_COUNTED_CALLS = 64  # if it counts them
_WARMUP = 2  # most calls in which a model may do something else than ever after
_CHANGES = "its operations change from call to call"
_OTHER_WITHOUT_GRADIENTS = (
    "its logits are others where no gradients are computed and nothing watches"
)


def finite(x: Tensor) -> Tensor:
    """Images without NaN and infinity, which say nothing about a network."""
    return torch.nan_to_num(x.detach(), nan=0.0, posinf=0.0, neginf=0.0)


def tape_now(model: nn.Module, x: Tensor) -> tuple[Tape, Recording]:
    """The model's operations, and a recording to compare gradients with.

    A model may do something else in its first calls than ever after, such as fill a cache that the later ones
    read. So one that changes is recorded once more, since what it keeps may stay; then after calls that are not
    recorded.

    Raises:
        Unrecordable: no copy can be made.
    """
    for warmup in (0, 0, 1, _WARMUP):
        try:
            tape, recording = _of_two_sizes(model, x, warmup)
            if tape.describes(whole_outline(model, x, tape, recording)):
                return tape, recording
        except DependsOnBatch:
            continue
        except Unrecordable:
            raise
        except Exception:
            pass  # the model may take batches of one size alone; if not, its own error comes now
        break
    others = 0.9 * finite(x) + 0.1 * finite(x).flip(0, -1)
    for warmup in (0, _WARMUP):
        with recording_mode(model):
            warm_up(model, x, warmup)
            first, second = (
                recorded(model, images, careful=True) for images in (others, finite(x))
            )
        by_mode = asks_for_gradients(model)
        tape = replace(tape_for_one_size(first), warmup=warmup, by_mode=by_mode)
        if tape.describes(second) and same_tensors(first, second):
            _check_plain_pass(model, tape, second)
            return tape, second
    raise Unrecordable(_CHANGES)


def _of_two_sizes(model: nn.Module, x: Tensor, warmup: int) -> tuple[Tape, Recording]:
    """The tape of batches of two sizes; the second was computed."""
    # Held once for both, so that a model which counts its calls, and acts on it, shows that.
    with recording_mode(model):
        warm_up(model, x, warmup)
        second = recorded(model, _some(x, SIZES[1]), careful=True)
        first = outlined(model, _some(x, SIZES[0]), second, careful=True)
        first = first or recorded(model, _some(x, SIZES[0]), careful=True)
    tape = replace(tape_of(first, second), warmup=warmup, by_mode=asks_for_gradients(model))
    _check_plain_pass(model, tape, second)
    return tape, second


def _check_plain_pass(model: nn.Module, tape: Tape, recording: Recording) -> None:
    """Refuse a model that gives other logits without gradients, or before it has warmed up.

    Attacks also ask for logits alone. A copy has one network for both. A few of the recorded images tell, unless
    the model mixes the images of a batch.

    Raises:
        Unrecordable: it does.
    """
    images, recorded_logits = recording.images.detach(), recording.logits.detach()
    few = PROBES if tape.only_batch is None else len(images)
    for count in dict.fromkeys((few, len(images))):
        with recording_mode(model), torch.no_grad():
            began = proof.seconds()
            logits = model(images[:count].clone())
            recording.forward_seconds = (proof.seconds() - began) / count
        if proof.difference_of_logits(logits, recorded_logits[:count], "fp32") is None:
            return
    raise Unrecordable(_CHANGES if tape.warmup else _OTHER_WITHOUT_GRADIENTS)


def record_few(model: nn.Module, x: Tensor, tape: Tape, like: Recording) -> Recording | None:
    """A recording of the images that every later use begins with, so that it finds right what is right now.

    It has no values, unless only a real pass can tell. None where the model does something else with so few
    images.

    Raises:
        Unrecordable: these are all images of the batch.
    """
    images, careful = finite(x[:PROBES]), tape.own_functions
    with recording_mode(model):
        warm_up(model, images, tape.warmup)
        recording = outlined(model, images, like, careful=careful)
    if recording is None or not tape.describes(recording):
        recording = record(model, images, careful=careful, warmup=tape.warmup)
    if tape.describes(recording):
        return recording
    if x.shape[0] <= PROBES:
        raise Unrecordable(f"it does something else for {x.shape[0]} images")
    return None


def is_steady(
    model: nn.Module, tape: Tape, cached: CachedRecording, recording: Recording | None = None
) -> bool:
    """Whether a model does the same in each of several calls, as one does not that takes turns or counts.

    Args:
        model: the model.
        tape: its operations.
        cached: one recording of it, which the tape describes.
        recording: that one, whose weights then are not looked at again unless torch counts a change of them.
    """
    unchanged = [] if recording is None else counted_weights(recording)
    began = proof.seconds()

    def does_the_same(call: int) -> bool:
        found = cached.again(model, unchanged)
        if call == 0:
            # A whole proof is this pass and the hash of the weights, whose time is in `cached` already.
            cached.seconds += proof.seconds() - began
        return found

    return _every_call(model, tape, cached.images, does_the_same)


def repeats(model: nn.Module, tape: Tape, recording: Recording, like: Recording) -> bool:
    """As `is_steady`, of a model whose recordings cannot be cached, as on a GPU.

    Args:
        model: the model.
        tape: its operations.
        recording: a recording that the tape describes.
        like: a recording with values.
    """
    images, careful = recording.images.detach(), tape.own_functions

    def does_the_same(_: int) -> bool:
        again = outlined(model, images, like, careful=careful)
        again = again or recorded(model, images, careful=careful)
        return tape.describes(again) and same_tensors(recording, again)

    return _every_call(model, tape, images, does_the_same)


def _every_call(
    model: nn.Module, tape: Tape, images: Tensor, does_the_same: Callable[[int], bool]
) -> bool:
    """Whether a model does the same in several calls in a row: more of them if it counts them."""
    with recording_mode(model):
        warm_up(model, images, tape.warmup)
        before, calls, done = plain_state(model), _CALLS, 0
        while done < calls:
            if not does_the_same(done):
                return False
            done += 1
            if done == 1 and plain_state(model) != before:
                calls = _COUNTED_CALLS
    return True


def whole_outline(model: nn.Module, x: Tensor, tape: Tape, like: Recording) -> Recording:
    """A recording of the whole batch, without values where that is enough."""
    with recording_mode(model):
        warm_up(model, x, tape.warmup)
        recording = outlined(model, finite(x), like, careful=tape.own_functions, gradients=False)
    if recording is not None and tape.describes(recording):
        return recording
    return whole(model, x, tape.own_functions, tape.warmup)


def whole(model: nn.Module, x: Tensor, careful: bool, warmup: int) -> Recording:
    """A recording of the whole batch, whose graph would be large; of half of it where memory does not suffice."""
    try:
        return record(model, finite(x), careful=careful, gradients=False, warmup=warmup)
    except torch.OutOfMemoryError:
        if x.shape[0] <= SIZES[-1]:
            raise
        return whole(model, x[: x.shape[0] // 2], careful, warmup)


def _some(x: Tensor, size: int) -> Tensor:
    """``size`` images, by turns from the batch; two sizes have no image in common."""
    rows = torch.arange(size, device=x.device) % x.shape[0]
    images = finite(x[rows])
    return images if size == SIZES[-1] else 0.9 * images + 0.1 * images.flip(0)
