"""Engines that run the live model itself, frozen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from fastadv.engine.adaptation import Adaptation, Questions
from fastadv.engine.cached_recording import CachedRecording
from fastadv.engine.compiled_parts import unwrapped
from fastadv.engine.engines import Engine, InputGradient, Model, ValueOfLogits, channels_last
from fastadv.engine.frozen import frozen
from fastadv.engine.hidden_draws import is_torchs
from fastadv.engine.precision import COMPUTE_DTYPES
from fastadv.engine.randomness import code_names
from fastadv.engine.recording import Recording
from fastadv.engine.tape import Tape

_ABOUT_LEAVES = frozenset(("is_leaf", "grad_fn"))
Draws: TypeAlias = Literal["never", "unlikely", "watched", "assumed"]


class EagerEngine(Engine):
    """Runs the live model as it stands, frozen; in a narrow precision through autocast.

    Args:
        precision: precision of the passes.
        reason: why no copy runs.
        train_mode: run in train mode; with ``"moving"`` the buffers keep the changes that the passes make.
        draws: whether the model draws random numbers, which then follow the session's seed. "watched": the draws
            are noticed when they happen. "unlikely": the same, for a model that did not draw when it was looked
            at.
        channels_last: run on channels-last images, which the code of some models does not accept.
        adaptation: whether the model adapts in its forward pass. Its parameters must then require grad, and
            are put back.
    """

    name = "eager"

    def __init__(
        self,
        precision: str,
        reason: str,
        train_mode: bool | str = False,
        draws: Draws = "assumed",
        channels_last: bool = False,
        adaptation: Adaptation | None = None,
    ) -> None:
        self._adaptation = Adaptation() if adaptation is None else adaptation
        self._dtype, self.reason, self.precision = COMPUTE_DTYPES[precision], reason, precision
        self._narrow_range = precision == "fp16"
        self._train_mode, self._draws = train_mode, draws
        self.any_batch = draws in ("never", "unlikely")
        self.channels_last = channels_last
        self._model: Model | None = None
        self._weights = torch.float32
        # Whether the model may ask if its images are a leaf. They are one in a plain loop.
        self._hands_leaf = False

    @contextmanager
    def session(self, model: Model, seed: int, current: bool = False) -> Iterator[None]:
        """Freeze the live model; it is as before on leaving."""
        # Held for the session only, so that a cached engine keeps no model alive. Within it a loss may attack the
        # same network, by the same engine.
        before = self._model, self._weights, self._hands_leaf
        self._model, self._weights = model, _weights_dtype(model)
        self._hands_leaf = code_names(model, _ABOUT_LEAVES)
        try:
            with frozen(
                model,
                train_mode=bool(self._train_mode),
                keep_state=self._train_mode != "moving",
                freeze_parameters=not self._adaptation.needs_gradients,
                keep_parameters=self._adaptation.adapts,
                seed=seed if self._draws != "never" else None,
                watch=self._draws in ("watched", "unlikely"),
            ):
                try:
                    yield
                finally:
                    self._adaptation.end()  # before the parameters get their flags back
        finally:
            self._model, self._weights, self._hands_leaf = before

    def images(self, x: Tensor) -> Tensor:
        """As in `Engine.images`, channels-last where the model takes that."""
        images = super().images(x)
        return channels_last(images) if self.channels_last else images

    def _differentiated(
        self, x: Tensor, value_of: ValueOfLogits, differentiate: Callable[..., Any]
    ) -> InputGradient:
        images = x.clone() if self._hands_leaf else x
        return super()._differentiated(images, value_of, differentiate)

    def _own_images(self, x: Tensor) -> Tensor:
        return x if self._hands_leaf and x.requires_grad else x.clone()

    def _forward(self, x: Tensor) -> Tensor:
        """Logits; the model gets images of its own, so that it may write to them."""
        assert self._model is not None
        with self._adaptation.found_out(self._model, x), naming_dtypes(self._model, x):
            if self._dtype == torch.float32:
                return self._model(self._own_images(_in_dtype_of(self._weights, x)))
            with torch.autocast(x.device.type, self._dtype):
                try:
                    return self._model(self._own_images(x))
                finally:
                    # Else it lasts to the end of the attack, with weights that a model has since changed.
                    torch.clear_autocast_cache()


class LiveEngine(EagerEngine):
    """The live model, which runs because it is faster than a copy that is right.

    Args:
        precision: precision of the passes.
        reason: why no copy runs.
        channels_last: run on channels-last images, which the code of some models does not accept.
        tape: the model's operations.
    """

    cached_recording: CachedRecording | None = None  # its proof
    first_pass: Questions | None = None  # entered for the next pass alone

    def __init__(self, precision: str, reason: str, channels_last: bool, tape: Tape) -> None:
        super().__init__(precision, reason, False, "never", channels_last)
        self.any_batch = tape.holds_for_any_batch
        # Other people's operators and backward methods may draw random numbers, or look at what they like.
        is_torchs_alone = not tape.own_functions and all(is_torchs(op.function) for op in tape.ops)
        self.may_skip_proofs = precision == "fp32" and self.any_batch and is_torchs_alone

    def refresh(self, recording: Recording) -> None:
        """It has the live weights."""
        self.cached_recording = None

    @contextmanager
    def session(self, model: Model, seed: int, current: bool = False) -> Iterator[None]:
        """Freeze the network itself, which was measured without the wrappers around it."""
        inner = unwrapped(model) if isinstance(model, nn.Module) else model
        # No recording holds gradients in parameters. An attack that is not proven may find some all the same.
        watched = self.first_pass is not None
        before, self._adaptation = (
            self._adaptation,
            Adaptation(not watched, watched, self.first_pass),
        )
        try:
            with super().session(inner, seed, current):
                yield
        finally:
            self._adaptation = before

    def _forward(self, x: Tensor) -> Tensor:
        watch, self.first_pass = self.first_pass, None
        with watch or nullcontext():
            return super()._forward(x)


@contextmanager
def naming_dtypes(model: Model, x: Tensor) -> Iterator[None]:
    """Let the error of a model that cannot take the images' dtype say so.

    Raises:
        TypeError: the model fails, and its weights have another dtype than ``x``.
    """
    try:
        yield
    except RuntimeError as error:
        weights = _weights_dtype(model)
        if not isinstance(model, nn.Module) or x.dtype in (weights, *_SIXTEEN_BITS):
            raise
        raise TypeError(
            f"x must have a dtype that the model takes, whose weights are {weights}, got {x.dtype}: "
            f"{error}"
        ) from error


def as_model_takes(model: Model, x: Tensor) -> Tensor:
    """Images in 16 bits where the model's weights are, else in float32 or float64."""
    return _in_dtype_of(_weights_dtype(model), x)


def _in_dtype_of(weights: torch.dtype, x: Tensor) -> Tensor:
    if weights in _SIXTEEN_BITS:
        return x.to(weights)
    return x.float() if x.dtype in _SIXTEEN_BITS else x


_SIXTEEN_BITS = (torch.float16, torch.bfloat16)


def _weights_dtype(model: Model) -> torch.dtype:
    """The dtype of a module's weights; float32 of other callables."""
    if isinstance(model, nn.Module):
        for tensor in chain(model.parameters(), model.buffers()):
            if tensor.is_floating_point():
                return tensor.dtype
    return torch.float32
