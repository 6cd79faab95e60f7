"""The live model where no copy can run: its precision, its layout, and when a copy is tried again."""

from __future__ import annotations

import time
from collections.abc import Hashable
from dataclasses import dataclass

from torch import Tensor, nn

from fastadv.engine import proof, randomness
from fastadv.engine.adaptation import Adaptation
from fastadv.engine.compiled_parts import unwrapped
from fastadv.engine.content import content_or_counters
from fastadv.engine.engines import Model, ValueOfLogits
from fastadv.engine.first_recordings import PROBES, SIZES, finite
from fastadv.engine.live_engines import Draws, EagerEngine, LiveEngine, as_model_takes
from fastadv.engine.recorder import Recorder
from fastadv.engine.recording_mode import recording_mode
from fastadv.engine.tape import Tape
from fastadv.float32 import full_float32

_LONGER = 3  # times as many uses as so far, before a copy is tried again
_ROUNDS = 2
_STEADY_CHANGES = 2  # uses in a row before which the weights changed: then the model is in training
_WITHOUT_COMPARISON = 15  # uses of a model in training between two comparisons
_CLEARLY = 0.97  # channels-last images are used if they take at most this fraction of the time


@dataclass
class Live:
    """How the live model runs, and for how many uses.

    Attributes:
        obstacle: why no copy runs.
        precision: precision of the passes.
        reason: the reason for this precision.
        draws: as in `EagerEngine`.
        channels_last: as in `EagerEngine`.
        adaptation: as in `EagerEngine`.
        uses: number of uses so far.
        next_try: the number of uses after which a copy is tried.
    """

    obstacle: str
    precision: str
    reason: str
    draws: Draws
    channels_last: bool
    adaptation: Adaptation
    uses: int = 1
    next_try: int = 1

    def engine(self, train_mode: bool | str) -> EagerEngine:
        """The engine; it is not proven, since it is the model itself."""
        return EagerEngine(
            self.precision, self.reason, train_mode, self.draws, self.channels_last, self.adaptation
        )


class _Comparison:
    """Whether autocast has a model's gradients, and whether that is to be asked again.

    Other weights can have other gradients in a narrow precision. In training the weights change a little before
    each use, so that some uses in a row may do without.

    Args:
        model: the model, as it was compared.
        right: the outcome.
        former: the comparison before.
    """

    def __init__(self, model: nn.Module, right: bool, former: _Comparison | None) -> None:
        self.right, self._weights, self._uses = right, _weights_of(model), 0
        # Uses in a row with other weights.
        self._changes: int = 0 if former is None else former._changes
        self._other = False  # whether the weights have changed since

    def is_due(self, model: nn.Module) -> bool:
        """Whether to compare again before this use; asked once for each use."""
        self._uses += 1
        weights = _weights_of(model)
        self._changes = 0 if weights == self._weights else self._changes + 1
        self._other, self._weights = self._other or self._changes > 0, weights
        in_training = self._changes > _STEADY_CHANGES and self._uses <= _WITHOUT_COMPARISON
        return self._other and not in_training


class LiveChoice:
    """How one model runs live, by kind of images."""

    def __init__(self) -> None:
        self._found: dict[Hashable, Live] = {}
        self._compared: dict[Hashable, _Comparison] = {}

    def waiting(self, kind: Hashable, model: nn.Module) -> Live | None:
        """The way to run while no copy is tried: trying takes longer than an attack, and mostly fails again."""
        live = self._found.get(kind)
        if live is None or live.uses >= live.next_try:
            return None
        place = (kind, live.obstacle)
        compared = self._compared.get(place)
        if compared is not None and compared.is_due(model):
            # False until `found` compares again.
            self._compared[place] = _Comparison(model, False, compared)
            return None
        live.uses += 1
        # The model may adapt by now.
        live.adaptation = Adaptation(unlikely=not live.adaptation.adapts)
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
        # That the forward pass draws nothing tells nothing of the backward pass, which trials run, too.
        in_trials: Draws = "assumed" if draws == "never" else draws
        # Found out anew, in the first pass, as often as a copy is tried.
        adaptation = Adaptation(never=draws == "never")
        if precision != "fp32" and free:
            assert isinstance(model, nn.Module)
            place = (kind, obstacle)
            compared = self._compared.get(place)
            if compared is None or not compared.right or compared.is_due(model):
                right = _is_right(
                    model, x, precision, bool(train_mode), in_trials, adaptation=adaptation
                )
                compared = self._compared[place] = _Comparison(model, right, compared)
            if not compared.right:
                precision, reason = "fp32", f"{obstacle}; in {precision} its gradients are others"
            elif not train_mode and x.device.type == "cpu" and x.dim() == 4:
                known = before is not None and before.obstacle == obstacle
                last = (
                    before.channels_last
                    if before is not None and known
                    else _faster_channels_last(model, x, precision, in_trials, adaptation)
                )
        uses = 1 if before is None else before.uses + 1
        live = Live(obstacle, precision, reason, draws, last, adaptation, uses, _LONGER * uses)
        if draws == "never" and _draws_are_seen(model):
            live.draws = "unlikely"  # for as long as nobody looks again
        elif draws == "never":
            live.next_try = uses
        self._found[kind] = live
        return live


def _weights_of(model: nn.Module) -> Hashable:
    """A value that differs for other weights."""
    return content_or_counters([*model.parameters(), *model.buffers()])


def _draws(model: Model, x: Tensor, train_mode: bool) -> Draws:
    """How the random numbers of a live model are to be governed."""
    if isinstance(model, nn.Module) and not train_mode:
        images = as_model_takes(model, finite(x[:PROBES]))
        drawn = _draws_something(unwrapped(model), images)
        if drawn is not None:
            return "assumed" if drawn else "never"
    return "watched" if _draws_are_seen(model) else "assumed"


def _draws_are_seen(model: Model) -> bool:
    """Whether a watch of the draws can tell that the model's generator is to be seeded."""
    return randomness.draws_can_be_watched(model) and not randomness.seeds_generators(model)


def _is_right(
    model: Model,
    x: Tensor,
    precision: str,
    train_mode: bool,
    draws: Draws,
    channels_last: bool = False,
    adaptation: Adaptation | None = None,
) -> bool:
    """Whether the live model under autocast has the gradients that it has in float32."""
    images = finite(x if train_mode else x[: SIZES[-1]])
    try:
        found = []
        values: tuple[ValueOfLogits, ...] = ()
        for own in ("fp32", precision):
            last = channels_last and own == precision
            engine = EagerEngine(own, "", train_mode, draws, last, adaptation)
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


def _faster_channels_last(
    model: Model, x: Tensor, precision: str, draws: Draws, adaptation: Adaptation
) -> bool:
    """Whether the live model is clearly faster on channels-last images, and right."""
    images, best = finite(x[: SIZES[-1]]), [float("inf"), float("inf")]
    engines = [EagerEngine(precision, "", False, draws, last, adaptation) for last in (False, True)]
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
    return best[1] < _CLEARLY * best[0] and _is_right(
        model, x, precision, False, draws, True, adaptation
    )


def live_rival(model: nn.Module, images: Tensor, precision: str, tape: Tape) -> LiveEngine:
    """The live model, on channels-last images unless its own code fails on them."""
    engine = LiveEngine(precision, "", True, tape)
    try:
        with engine.session(model, 0, current=True):
            engine.logits(engine.images(images))
    except Exception:
        return LiveEngine(precision, "", False, tape)
    return engine


class _LenientRecorder(Recorder):
    """A recorder that lets a model read values: it is not to be copied."""

    def _check_what_is_read(self, name: str, operands: list[Tensor]) -> None:
        pass


def _draws_something(model: nn.Module, images: Tensor) -> bool | None:
    """Whether a model draws random numbers of torch's; None if it was not seen to the end.

    Args:
        model: the live model.
        images: a few [B, ...].
    """
    recorder = None
    try:
        with recording_mode(model):
            recorder = _LenientRecorder(images)
            recorder.run(model)
    except Exception:
        return True if recorder is not None and recorder.draws else None
    return False
