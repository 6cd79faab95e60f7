"""The choice among engines that are right: by measuring times, if it is not known beforehand which is the fastest.

Most steps of a convolutional network's program are fused, and such a program is the fastest. So nothing is timed
there, and the choice is the same in every process. For other networks the engines that are right are timed on a
few images of the batch, and the fastest runs. Equal networks get one choice for the whole process, so that a
second attack, model or run does not measure again, and computes the same results as the first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastadv.engine import proof
from fastadv.engine.copy_engines import CopyEngine, EngineOnCopy, ProgramEngine
from fastadv.engine.cpu_steps import PlainStep, ProgramStep
from fastadv.engine.live_engines import LiveEngine
from fastadv.engine.live_reference import LiveReference
from fastadv.engine.tape import Tape

Contender = EngineOnCopy | LiveEngine


class EngineNames(NamedTuple):
    """Engines in the words of `Choice`; ``contiguous``: the live model on images that are not channels-last."""

    program: str
    copy: str
    live: str
    contiguous: str | None = None


# By the precision of the engines. In float32 some networks are faster on contiguous images.
NAMES = {
    "bf16": EngineNames("fused program", "copy", "live model under autocast"),
    "fp32": EngineNames(
        "fused program in fp32",
        "copy in fp32",
        "live model in fp32",
        "live model in fp32, contiguous",
    ),
}

_OTHER_STEPS = (
    0.1  # largest fraction of unfused steps with which a program is known to be the fastest
)
IMAGES = 8  # batches of this size and larger ones share a choice
_MOST_IMAGES, _FEWEST_IMAGES = 8, 4  # numbers of images for timing, with many and with few threads
_ENOUGH = 0.2  # seconds of a pass; where a pass is longer, half as many images tell as much
_ROUNDS = 3
_SECONDS = 0.5  # after this time there is no further round
_SLOWER = 1.15  # factor of time beyond which a rival is not timed again
# Seconds. A longer first pass counts by itself. In a shorter one too much of the time prepares later passes.
_LONG = 0.1
# Where passes are that long, fractions of the first engine's time between which its fastest rival is timed again.
_UNCERTAIN = (0.9, 1.03)
# Seconds of a pass. In shorter passes the engines differ by less than the noise of their times.
_SHORT = 0.002
_CLEARLY = 0.97  # largest fraction of the first engine's time with which a rival takes its place
# Fraction of the live model's time that a copy under autograd takes at least, of those with BatchNorm or weights
# that the live model computes anew in each pass. So a program that is faster than that is faster than both.
_FOLDED = 0.75
_PASSES = 3  # in an attack with few steps, which share the cost of its proof
# Factor of the times of copies and of contiguous images, where the live model needs few proofs. The live model on
# channels-last images is the caller's own loop, which must not be faster. It gains more than these from the larger
# batches of an attack. The program of ConvNeXt-T took 99 % of its time on two images, and 115 % on eight.
# Contiguous images of ConvNeXt V2 took 99 % on four, and 109 % on eight.
HANDICAP = 1.1
_KEPT = 256  # number of choices that are kept


@dataclass(frozen=True)
class Choice:
    """The measurements, and the engine that runs.

    Attributes:
        name: name of the engine that runs.
        images: number of images on which the engines were timed.
        milliseconds: time of a gradient pass, by engine.
        faults: the faults, in words, of engines that were faster and wrong.
        proof: milliseconds of the proof before an attack, where copies alone need it; else 0.
    """

    name: str
    images: int
    milliseconds: Mapping[str, float]
    faults: Mapping[str, str] = field(default_factory=dict)
    proof: float = 0.0

    def __str__(self) -> str:
        """In words, for `AttackReport.reason`."""
        times = ", ".join(
            f"{name} {ms:.3g} ms{f' ({self.faults[name]})' if name in self.faults else ''}"
            for name, ms in self.milliseconds.items()
        )
        proven = f", a copy's proof {self.proof:.3g} ms" if self.proof else ""
        return f"measured on {self.images} image{'s' if self.images > 1 else ''}: {times}{proven}"


@dataclass(frozen=True)
class Beforehand:
    """What is known of the times of engines before they are measured.

    Attributes:
        first: seconds of a gradient pass of the first engine, in its proof.
        proof: seconds of the proof of a copy before an attack, which the live model does not need; else 0.
        factor: of the times of copies and of contiguous images, which are then as good as those of the live model
            on channels-last images.
        least: seconds that a gradient pass of an engine takes at least, by name.
    """

    first: float = 0.0
    proof: float = 0.0
    factor: float = 1.0
    least: Mapping[str, float] = field(default_factory=dict)

    def cost(self, name: str, spent: float, images: int, batch: int) -> float:
        """Seconds by which an engine is compared: of a gradient pass, with its share of the proof of an attack.

        Args:
            name: of the engine.
            spent: seconds of its pass.
            images: number of images of that pass.
            batch: number of images that are attacked, as `group_of` gives it.
        """
        if any(name == names.live for names in NAMES.values()):
            return spent
        if any(name == names.contiguous for names in NAMES.values()):
            return self.factor * spent
        return self.factor * spent + self.proof / _PASSES * images / batch


def name_of(engine: Contender) -> str:
    """An engine in the words of `Choice`."""
    names = NAMES[engine.precision]
    if isinstance(engine, LiveEngine):
        return names.live if engine.channels_last else names.contiguous or names.live
    return names.program if isinstance(engine, ProgramEngine) else names.copy


def group_of(batch: int) -> int:
    """Batch sizes of one group share a choice; few images are another work than many."""
    return min(batch, IMAGES) if batch <= 2 else IMAGES


def images() -> int:
    """The number of images on which engines are timed: some for each thread."""
    return max(_FEWEST_IMAGES, min(_MOST_IMAGES, 2 * torch.get_num_threads()))


def enough_images(spent: Mapping[int, float]) -> int:
    """As `images`, half as many where a pass takes long.

    Args:
        spent: seconds of a pass of an engine by the number of images, as far as they are known.
    """
    most, of_one = images(), min((taken / count for count, taken in spent.items()), default=0.0)
    return most // 2 if of_one * most >= _ENOUGH else most


def is_open(engine: Contender) -> bool:
    """Whether another engine may be faster than this one, the first that was found right."""
    if torch.are_deterministic_algorithms_enabled():
        return False
    if not isinstance(engine, ProgramEngine):
        return isinstance(engine, CopyEngine)
    steps = [step for step in engine.steps if not _is_free(step)]
    return sum(not step.is_known_to_win for step in steps) > _OTHER_STEPS * len(steps)


# These functions move no element, or they take the same time in a program and in torch, little beside
# convolutions.
_POOLS = (F.max_pool2d, torch.max_pool2d)
_FREE = frozenset(
    ("flatten", "view", "reshape", "squeeze", "unsqueeze", "size", "getattr", "getitem", "detach", "dropout")
)  # fmt: skip


def _is_free(step: ProgramStep) -> bool:
    if type(step) is not PlainStep:
        return False
    target = step.node.target
    return is_view(target) or target in _POOLS


def is_view(function: object) -> bool:
    """Whether a function, or a method by its name, moves no element."""
    name = function if isinstance(function, str) else getattr(function, "__name__", "")
    return name in _FREE


def key_of(tape: Tape, x: Tensor, precision: str) -> Hashable:
    """The key of a choice: the network's operations, the images, and the threads that compute."""
    digest = hashlib.sha256(repr((tape.ops, tape.external)).encode()).hexdigest()
    return digest, x.shape[1:], x.dtype, group_of(x.shape[0]), precision, torch.get_num_threads()


_choices: dict[Hashable, Choice] = {}


def choose(
    key: Hashable,
    reference: LiveReference,
    x: Tensor,
    first: Contender,
    rivals: Mapping[str, Callable[[], Contender]],
    known: Beforehand,
) -> tuple[Choice, Contender]:
    """The choice that was made in this process, or a new one, and its engine.

    Args:
        key: the result of `key_of`.
        reference: what engines must agree with, for the images to be attacked.
        x: images of the batch to measure on [B, ...].
        first: an engine that is right and has the model's weights.
        rivals: builds the others, by the names that `name_of` gives them.
        known: what is known of their times.
    """
    choice, engine = _choices.get(key), None
    if choice is None:
        new, engine = _measured(reference, x, first, rivals, known)
        while len(_choices) >= _KEPT:
            del _choices[next(iter(_choices))]
        choice = _choices.setdefault(key, new)  # another thread may have been faster
        if choice is new:
            return choice, engine
    if choice.name not in rivals:
        return choice, first
    try:
        engine = rivals[choice.name]()
        fault = reference.fault_of(engine)
    except Exception as error:  # the model's own code may fail in any way
        fault = str(error)
    if fault is None and engine is not None:
        return choice, engine
    return replace(choice, name=name_of(first), faults={choice.name: f"{fault}"}), first


def _measured(
    reference: LiveReference,
    x: Tensor,
    first: Contender,
    rivals: Mapping[str, Callable[[], Contender]],
    known: Beforehand,
) -> tuple[Choice, Contender]:
    name, model = name_of(first), reference.model
    # The time of its proof serves, unless that is so short that it may be chance.
    times = {name: known.first}
    if known.first < 5 * _SHORT:
        times = times_of({name: first}, model, x, rounds=1)
    if times[name] < 5 * _SHORT:
        again = times_of({name: first}, model, x, rounds=_ROUNDS - 1, warm=False)
        times = {name: min(times[name], again[name])}
    batch = group_of(len(reference.x))

    def costs() -> dict[str, float]:
        return {one: known.cost(one, spent, len(x), batch) for one, spent in times.items()}

    close: dict[str, Contender] = {name: first}
    for other, make in rivals.items() if times[name] >= _SHORT else ():
        least = known.cost(other, known.least.get(other, 0.0), len(x), batch)
        if least >= costs()[name] or _is_hopeless(other, name, times, close):
            continue
        try:
            engine = make()
            times[other] = _first_time(engine, reference, x)
        except Exception:  # it may fail in any way that the model's own code allows
            continue
        if costs()[other] <= _SLOWER * min(costs().values()):
            close[other] = engine
    again = times_of(_to_time_again(name, costs(), close), model, x, rounds=_ROUNDS - 1, warm=False)
    times |= {other: min(times[other], spent) for other, spent in again.items()}
    milliseconds, cost = {other: 1e3 * spent for other, spent in times.items()}, costs()
    found = Choice(name, len(x), milliseconds, {}, 1e3 * known.proof)
    for other in sorted(close, key=lambda other: cost[other]):
        if cost[other] > _CLEARLY * cost[name]:
            break
        fault = reference.fault_of(close[other])
        if fault is None:
            return replace(found, name=other), close[other]
        found = replace(found, faults={**found.faults, other: fault})
    return found, first


def _is_hopeless(
    other: str, name: str, times: Mapping[str, float], close: Mapping[str, Contender]
) -> bool:
    """Whether an engine is known to be slower than those that have been timed; ``name`` is the first engine's."""
    for names in NAMES.values():
        if other == names.live and names.copy in times:
            return names.copy not in close  # it does the work of the copy and more
        if other == names.copy and names.live in times:
            live = min(times[one] for one in (names.live, f"{names.contiguous}") if one in times)
            return times[name] <= _FOLDED * live
    return False


def _to_time_again(
    name: str, costs: Mapping[str, float], close: Mapping[str, Contender]
) -> dict[str, Contender]:
    """The engines that further rounds decide between, by name; ``name`` is the first engine's.

    Long passes scatter little and take much time, so that only a narrow decision is worth another round.
    """
    rivals = [other for other in close if other != name]
    if not rivals:
        return {}
    if costs[name] < _LONG:
        return dict(close)
    fastest = min(rivals, key=lambda other: costs[other])
    low, high = (fraction * costs[name] for fraction in _UNCERTAIN)
    if fastest in (NAMES["fp32"].live, NAMES["fp32"].contiguous):
        low = _CLEARLY * costs[name]  # it takes no longer than the caller's own loop
    return {one: close[one] for one in (name, fastest)} if low < costs[fastest] < high else {}


def _first_time(engine: Contender, reference: LiveReference, x: Tensor) -> float:
    """Seconds of a gradient pass of an engine that has not run yet.

    A long first pass tells as much as the second.
    """
    for _ in range(2):
        spent = reference.seconds_of(engine, x)
        if spent >= _LONG:
            break
    return spent


def times_of(
    engines: Mapping[str, Contender],
    model: nn.Module,
    images: Tensor,
    rounds: int = _ROUNDS,
    warm: bool = True,
) -> dict[str, float]:
    """Seconds of a gradient pass of each engine, the least of several rounds; ``warm`` adds a round before."""
    best = dict.fromkeys(engines, float("inf"))
    with ExitStack() as stack:
        for engine in engines.values():
            stack.enter_context(engine.session(model, 0, current=True))
        shown = {name: engine.images(images) for name, engine in engines.items()}
        began = proof.seconds()
        for number in range(0 if warm else 1, rounds + 1):
            for name, engine in engines.items():
                before = proof.seconds()
                engine.gradient(shown[name], proof.weighted_sum)
                if number:
                    best[name] = min(best[name], proof.seconds() - before)
            if number and proof.seconds() - began > _SECONDS:
                break
    return best
