"""Engines that run the live model: the precision and the treatment of random numbers that are right for it."""

from __future__ import annotations

from torch import Tensor, nn

from fastadv.engine import proof, randomness
from fastadv.engine.engines import (
    Draws,
    EagerEngine,
    LiveEngine,
    Model,
    ValueOfLogits,
    as_model_takes,
    unwrapped,
)
from fastadv.engine.live_tape import PROBES, SIZES, finite
from fastadv.engine.recorder import draws_nothing
from fastadv.float32 import full_float32


def live_rival(model: nn.Module, images: Tensor, precision: str) -> LiveEngine:
    """The live model, on channels-last images unless its own code fails on them."""
    engine = LiveEngine(precision, "", channels_last=True)
    try:
        with engine.session(model, 0, current=True):
            engine.logits(engine.images(images))
    except Exception:
        return LiveEngine(precision, "", channels_last=False)
    return engine


def draws_of(model: Model, x: Tensor, train_mode: bool) -> Draws:
    """How the random numbers of a live model are to be governed."""
    if isinstance(model, nn.Module) and not train_mode:
        images = as_model_takes(model, finite(x[:PROBES]))
        if draws_nothing(unwrapped(model), images):
            return "never"
    return "watched" if randomness.draws_can_be_watched(model) else "assumed"


def autocast_is_right(
    model: Model, x: Tensor, precision: str, train_mode: bool, draws: Draws
) -> bool:
    """Whether the live model under autocast has the gradients that it has in float32."""
    images = finite(x if train_mode else x[: SIZES[-1]])
    try:
        found = []
        values: tuple[ValueOfLogits, ...] = ()
        for own in ("fp32", precision):
            engine = EagerEngine(own, "", train_mode, draws)
            with full_float32(), engine.session(model, 0):
                shown = engine.images(images)
                values = values or proof.objectives(engine.logits(shown))
            for value_of in values:
                # Random numbers begin anew for each.
                with full_float32(), engine.session(model, 0):
                    found.append(proof.probe(engine, shown, value_of))
    except Exception:  # if the model itself fails, its own message is to come from the real call
        return False
    half = len(values)
    pairs = zip(found[half:], found[:half], strict=True)
    return all(proof.difference(narrow, wide, precision) is None for narrow, wide in pairs)
