"""The live model where no copy can run: its precision, its layout, and when a copy is tried again."""

from __future__ import annotations

import time
from collections.abc import Hashable
from dataclasses import dataclass

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
from fastadv.engine.first_recordings import PROBES, SIZES, finite
from fastadv.engine.recorder import draws_nothing
from fastadv.float32 import full_float32

_LONGER = 3  # times as many uses as so far, before a copy is tried again
_ROUNDS = 2
_CLEARLY = 0.97  # of the time with images as they come, at most, to lay them out otherwise


@dataclass
class Live:
    """How the live model runs, and for how many uses.

    Attributes:
        obstacle: why no copy runs.
        precision: of its passes.
        reason: why it runs so.
        draws: as in `EagerEngine`.
        channels_last: as in `EagerEngine`.
        uses: so far.
        next_try: the number of uses after which a copy is tried.
    """

    obstacle: str
    precision: str
    reason: str
    draws: Draws
    channels_last: bool
    uses: int = 1
    next_try: int = 1

    def engine(self, train_mode: bool | str) -> EagerEngine:
        """The engine; it is not proven, since it is the model itself."""
        return EagerEngine(self.precision, self.reason, train_mode, self.draws, self.channels_last)


class LiveChoice:
    """How one model runs live, by kind of images."""

    def __init__(self) -> None:
        self._found: dict[Hashable, Live] = {}
        self._autocast_is_right: dict[Hashable, bool] = {}

    def waiting(self, kind: Hashable) -> Live | None:
        """What runs while no copy is tried: trying takes longer than an attack, and mostly fails again."""
        live = self._found.get(kind)
        if live is None or live.uses >= live.next_try:
            return None
        live.uses += 1
        return live

    def forget(self, kind: Hashable) -> None:
        """Note that a copy runs."""
        self._found.pop(kind, None)

    def found(
        self,
        kind: Hashable,
        model: Model,
        x: Tensor,
        train_mode: bool | str,
        precision: str,
        obstacle: str,
        free: bool,
    ) -> Live:
        """How the live model runs now.

        Args:
            kind: of images.
            model: the live model.
            x: images [B, ...].
            train_mode: as in `EagerEngine`.
            precision: the narrowest to be tried.
            obstacle: why no copy runs.
            free: whether precision and layout are left to us.
        """
        before, reason, last = self._found.get(kind), obstacle, False
        draws = _draws(model, x, bool(train_mode))
        if precision != "fp32" and free:
            place = (kind, obstacle)
            if not self._autocast_is_right.get(place):
                right = _is_right(model, x, precision, bool(train_mode), draws)
                self._autocast_is_right[place] = right
            if not self._autocast_is_right[place]:
                precision, reason = "fp32", f"{obstacle}; in {precision} its gradients are others"
            elif not train_mode and x.device.type == "cpu" and x.dim() == 4:
                known = before is not None and before.obstacle == obstacle
                last = (
                    before.channels_last
                    if before is not None and known
                    else _faster_channels_last(model, x, precision, draws)
                )
        uses = 1 if before is None else before.uses + 1
        live = Live(obstacle, precision, reason, draws, last, uses, _LONGER * uses)
        if draws == "never" and randomness.draws_can_be_watched(model):
            live.draws = "unlikely"  # for as long as nobody looks again
        elif draws == "never":
            live.next_try = uses
        self._found[kind] = live
        return live


def _draws(model: Model, x: Tensor, train_mode: bool) -> Draws:
    """How the random numbers of a live model are to be governed."""
    if isinstance(model, nn.Module) and not train_mode:
        images = as_model_takes(model, finite(x[:PROBES]))
        if draws_nothing(unwrapped(model), images):
            return "never"
    return "watched" if randomness.draws_can_be_watched(model) else "assumed"


def _is_right(
    model: Model,
    x: Tensor,
    precision: str,
    train_mode: bool,
    draws: Draws,
    channels_last: bool = False,
) -> bool:
    """Whether the live model under autocast has the gradients that it has in float32."""
    images = finite(x if train_mode else x[: SIZES[-1]])
    try:
        found = []
        values: tuple[ValueOfLogits, ...] = ()
        for own in ("fp32", precision):
            engine = EagerEngine(own, "", train_mode, draws, channels_last and own == precision)
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


def _faster_channels_last(model: Model, x: Tensor, precision: str, draws: Draws) -> bool:
    """Whether the live model is clearly faster on channels-last images, and right."""
    images, best = finite(x[: SIZES[-1]]), [float("inf"), float("inf")]
    engines = [EagerEngine(precision, "", False, draws, last) for last in (False, True)]
    try:
        for number in range(_ROUNDS + 1):
            for place, engine in enumerate(engines):
                with engine.session(model, 0):
                    shown = engine.images(images)
                    began = time.perf_counter()
                    engine.gradient(shown, proof.weighted_sum)
                    spent = time.perf_counter() - began
                if number:
                    best[place] = min(best[place], spent)
    except Exception:  # its own code may not take this layout
        return False
    return best[1] < _CLEARLY * best[0] and _is_right(model, x, precision, False, draws, True)


def live_rival(model: nn.Module, images: Tensor, precision: str) -> LiveEngine:
    """The live model, on channels-last images unless its own code fails on them."""
    engine = LiveEngine(precision, "", channels_last=True)
    try:
        with engine.session(model, 0, current=True):
            engine.logits(engine.images(images))
    except Exception:
        return LiveEngine(precision, "", channels_last=False)
    return engine
