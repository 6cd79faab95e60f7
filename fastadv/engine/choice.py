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
_KEPT = 256  # number of choices that are kept


@dataclass(frozen=True)
class Choice:
    """The measurements, and the engine that runs.

    Attributes:
        name: name of the engine that runs.
        images: number of images on which the engines were timed.
        milliseconds: time of a gradient pass, by engine.
        faults: the faults, in words, of engines that were faster and wrong.
    """

    name: str
    images: int
    milliseconds: Mapping[str, float]
    faults: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """In words, for `AttackReport.reason`."""
        times = ", ".join(
            f"{name} {ms:.3g} ms{f' ({self.faults[name]})' if name in self.faults else ''}"
            for name, ms in self.milliseconds.items()
        )
        return f"measured on {self.images} image{'s' if self.images > 1 else ''}: {times}"


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
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    return name in _FREE or target in _POOLS


def key_of(tape: Tape, x: Tensor, precision: str) -> Hashable:
    """The key of a choice: the network's operations, the images, and the threads that compute."""
    digest = hashlib.sha256(repr((tape.ops, tape.external)).encode()).hexdigest()
    return digest, x.shape[1:], x.dtype, group_of(x.shape[0]), precision, torch.get_num_threads()


_choices: dict[Hashable, Choice] = {}


def settled(
    key: Hashable,
    model: nn.Module,
    x: Tensor,
    first: Contender,
    rivals: Mapping[str, Callable[[], Contender]],
    fault_of: Callable[[Contender], str | None],
    spent: Mapping[int, float],
) -> tuple[Choice, Contender]:
    """The choice that was made in this process, or a new one, and its engine.

    Args:
        key: the result of `key_of`.
        model: the live model.
        x: images of the batch to measure on [B, ...].
        first: an engine that is right and has the model's weights.
        rivals: builds the others, by the names that `name_of` gives them.
        fault_of: returns the fault of an engine, in words; None if it is right. It is called for the engine that
            runs.
        spent: seconds of a pass of ``first`` in its proof, by the number of images.
    """
    choice, engine = _choices.get(key), None
    if choice is None:
        new, engine = _measured(model, x, first, rivals, fault_of, spent.get(len(x), 0.0))
        while len(_choices) >= _KEPT:
            del _choices[next(iter(_choices))]
        choice = _choices.setdefault(key, new)  # another thread may have been faster
        if choice is new:
            return choice, engine
    if choice.name not in rivals:
        return choice, first
    try:
        engine = rivals[choice.name]()
        fault = fault_of(engine)
    except Exception as error:  # the model's own code may fail in any way
        fault = str(error)
    if fault is None and engine is not None:
        return choice, engine
    return replace(choice, name=name_of(first), faults={choice.name: f"{fault}"}), first


def _measured(
    model: nn.Module,
    x: Tensor,
    first: Contender,
    rivals: Mapping[str, Callable[[], Contender]],
    fault_of: Callable[[Contender], str | None],
    proven: float,
) -> tuple[Choice, Contender]:
    name = name_of(first)
    # The time of its proof serves, unless that is so short that it may be chance.
    times = {name: proven}
    if proven < 5 * _SHORT:
        times = times_of({name: first}, model, x, rounds=1)
    if times[name] < 5 * _SHORT:
        again = times_of({name: first}, model, x, rounds=_ROUNDS - 1, warm=False)
        times = {name: min(times[name], again[name])}
    close: dict[str, Contender] = {name: first}
    for other, make in rivals.items() if times[name] >= _SHORT else ():
        if any(other == n.live and n.copy in times and n.copy not in close for n in NAMES.values()):
            continue  # it does the work of the copy and more, and the copy is clearly slower already
        try:
            engine = make()
            times[other], is_near = _first_time(engine, model, x, min(times.values()))
        except Exception:  # it may fail in any way that the model's own code allows
            continue
        if is_near:
            close[other] = engine
    again = times_of(_to_time_again(name, times, close), model, x, rounds=_ROUNDS - 1, warm=False)
    times |= {other: min(times[other], spent) for other, spent in again.items()}
    milliseconds = {other: 1e3 * spent for other, spent in times.items()}
    faults: dict[str, str] = {}
    for other in sorted(close, key=lambda other: times[other]):
        if times[other] > _CLEARLY * times[name]:
            break
        fault = fault_of(close[other])
        if fault is None:
            return Choice(other, len(x), milliseconds, faults), close[other]
        faults[other] = fault
    return Choice(name, len(x), milliseconds, faults), first


def _to_time_again(
    name: str, times: Mapping[str, float], close: Mapping[str, Contender]
) -> dict[str, Contender]:
    """The engines that further rounds decide between, by name; ``name`` is the first engine's.

    Long passes scatter little and cost much, so that only a narrow decision is worth another round.
    """
    rivals = [other for other in close if other != name]
    if not rivals:
        return {}
    if times[name] < _LONG:
        return dict(close)
    fastest = min(rivals, key=lambda other: times[other])
    low, high = (fraction * times[name] for fraction in _UNCERTAIN)
    return {one: close[one] for one in (name, fastest)} if low < times[fastest] < high else {}


def _first_time(engine: Contender, model: nn.Module, x: Tensor, best: float) -> tuple[float, bool]:
    """Seconds of a gradient pass of an engine that has not run yet, and whether it may be the fastest.

    A long first pass tells as much as the second.
    """
    for _ in range(2):
        (spent,) = times_of({"": engine}, model, x, rounds=1, warm=False).values()
        if spent >= _LONG:
            break
    return spent, spent <= _SLOWER * best


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
