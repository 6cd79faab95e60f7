"""Random sequences of operations on models and their surroundings, between calls of attacks.

Each call is compared with a loop that runs the live model alone. A sequence that fails is shortened by leaving
operations out, as long as it still fails.
"""

from __future__ import annotations

import random
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import sequence_behaviour
import sequence_surroundings
import sequence_weights
import torch
from sequence_calls import call
from sequence_scene import Scene

from fastadv.engine import selection

Operation = Callable[[random.Random, Scene], None]
KINDS: tuple[tuple[Operation, ...], ...] = (
    sequence_weights.OPERATIONS,
    sequence_behaviour.OPERATIONS,
    sequence_surroundings.OPERATIONS,
)
_WEIGHTS = (4, 5, 2)  # of the kinds
_CALLS = 0.5  # share of the operations that are calls


class Step(NamedTuple):
    """One operation, with a seed of its own, so that it does the same when others are left out."""

    operation: Operation
    seed: int


def run(rng: random.Random) -> None:
    """One sequence of 3 to 12 operations."""
    start, plan = rng.randrange(2**31), random_plan(rng)
    error = failure_of(start, plan)
    if error is None:
        return
    shortest = shortened(start, plan)
    told = ", ".join(step.operation.__name__ for step in shortest)
    raise AssertionError(f"{told}: {failure_of(start, shortest) or error}") from error


def random_plan(rng: random.Random) -> list[Step]:
    """Operations to come; the first and the last are calls."""
    middle = []
    for _ in range(rng.randint(1, 10)):
        kind = rng.choices(KINDS, _WEIGHTS)[0]
        operation = call if rng.random() < _CALLS else rng.choice(kind)
        middle.append(operation)
    return [Step(operation, rng.randrange(2**31)) for operation in (call, *middle, call)]


def shortened(start: int, plan: list[Step]) -> list[Step]:
    """The sequence without the operations that it does not need to fail."""
    number = 0
    while number < len(plan):
        shorter = plan[:number] + plan[number + 1 :]
        if failure_of(start, shorter) is None:
            number += 1
        else:
            plan = shorter
    return plan


def failure_of(start: int, plan: list[Step]) -> Exception | None:
    """The exception of a sequence; None if all went well."""
    try:
        play(start, plan)
    except Exception as error:
        return error
    return None


def play(start: int, plan: list[Step]) -> None:
    """Set a scene, and do one step after the other; global state is put back in the end."""
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        scene = Scene(Path(folder))
        with warnings.catch_warnings(), scene.undone:
            warnings.simplefilter("ignore")
            rng = random.Random(start)
            torch.manual_seed(start)
            if rng.random() < 0.3:  # as on a processor that computes bfloat16 fast
                scene.undone.callback(setattr, selection, "fast_bf16", selection.fast_bf16)
                selection.fast_bf16 = lambda device: True
            for _ in range(rng.choice((1, 1, 2))):
                scene.add_victim(rng)
            if rng.random() < 0.4:
                scene.add_attacker(rng, scene.victim(rng))
            for step in plan:
                torch.manual_seed(step.seed)
                step.operation(random.Random(step.seed), scene)
