"""The features of a model, by the copy with which it is attacked.

An attack's copy has the model's weights of this moment, so a forward pass of it costs nothing else. The map before
pooling is one of the results in its graph: the one that `forward_features` returns when the model is recorded.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from fastadv.engine import proof
from fastadv.engine.compiled_parts import unwrapped
from fastadv.engine.copy_engines import ProgramEngine
from fastadv.engine.engines import Engine
from fastadv.engine.errors import Unrecordable
from fastadv.engine.forward_copy import probe_images
from fastadv.engine.forward_pass import ForwardPass
from fastadv.engine.recorder import record
from fastadv.engine.recording import Recording
from fastadv.float32 import full_float32


class FeatureTap:
    """Features of one model by the engines that attack it. It holds no engine."""

    def __init__(self) -> None:
        self._passes: weakref.WeakKeyDictionary[Engine, ForwardPass | None] = (
            weakref.WeakKeyDictionary()
        )

    def features(self, engine: Engine, model: nn.Module, x: Tensor) -> Tensor | None:
        """The map before pooling, without gradient.

        Args:
            engine: as `fastadv.engine.selection` has just handed it out for the model.
            model: the live model, whose forward pass calls `forward_features` of itself or of a part once.
            x: images [B, C, H, W].

        Returns:
            [B, C', H', W'] bfloat16, channels-last; None where this engine has no such result, as where it runs
            the live model.
        """
        if not isinstance(engine, ProgramEngine):
            return None
        if engine not in self._passes:
            self._passes[engine] = _tapped(engine, unwrapped(model), x)
        tapped = self._passes[engine]
        return None if tapped is None else tapped(engine.images(x))


def _tapped(engine: ProgramEngine, model: nn.Module, x: Tensor) -> ForwardPass | None:
    """The pass to the features, proven on a few images."""
    images = probe_images(x[:4])
    try:
        with full_float32():
            recording, features = _recorded(model, images)
        place = _place_of(features, recording)
        if not engine.tape.describes(recording):
            return None
        copy = engine.copy
        node = copy.nodes[place]
        found = ForwardPass(copy, node)
        fault = proof.difference_of_results(found(images), features.detach(), engine.precision)
    except (Unrecordable, LookupError, ValueError, TypeError, AttributeError):
        return None
    return found if fault is None else None


def _recorded(model: nn.Module, images: Tensor) -> tuple[Recording, Tensor]:
    """A recording, and the result of `forward_features` in it.

    Raises:
        Unrecordable: it was not called once.
    """
    results: list[Tensor] = []
    with _watched(model, results):
        recording = record(model, images, careful=False)  # which keeps all results
    if len(results) != 1:
        raise Unrecordable(f"its forward calls forward_features {len(results)} times")
    return recording, results[0]


@contextmanager
def _watched(model: nn.Module, results: list[Tensor]) -> Iterator[None]:
    """Within, the results of every `forward_features` of the model and its parts are collected."""
    parts = [m for m in model.modules() if callable(getattr(m, "forward_features", None))]
    own = [(part, vars(part).get("forward_features")) for part in parts]

    def watching(function: Any) -> Any:
        def forward_features(*args: Any, **kwargs: Any) -> Any:
            found = function(*args, **kwargs)
            results.append(found)
            return found

        return forward_features

    try:
        for part in parts:
            vars(part)["forward_features"] = watching(part.forward_features)
        yield
    finally:
        for part, before in own:
            if before is None:
                vars(part).pop("forward_features", None)
            else:
                vars(part)["forward_features"] = before


def _place_of(tensor: Tensor, recording: Recording) -> int:
    """Where a recording has a tensor.

    Raises:
        Unrecordable: nowhere, or it was overwritten later.
    """
    places = [place for place, value in enumerate(recording.values) if value is tensor]
    if len(places) != 1 or places[0] in recording.overwritten:
        raise Unrecordable("the features are not one result of its forward")
    return places[0]
