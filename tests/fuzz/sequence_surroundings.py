"""Operations of a sequence on what surrounds a call: torch's switches, threads, processes and errors."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from attack_helpers import assert_same_state, state_of
from sequence_calls import check, compare, random_batch_for
from sequence_scene import Attacker, Scene
from sequence_subject import Fuse
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

Context = Callable[[], AbstractContextManager[Any]]
_AROUND: tuple[Context, ...] = (
    torch.no_grad,
    torch.inference_mode,
    torch.enable_grad,
    partial(torch.autocast, "cpu", torch.bfloat16),
    partial(torch.backends.mkldnn.flags, enabled=False),
    partial(torch.device, "cpu"),
    partial(torch.autograd.set_detect_anomaly, True, check_nan=False),
    partial(torch.autograd.graph.save_on_cpu),
    partial(torch.random.fork_rng, devices=[]),
)


def around(rng: random.Random, scene: Scene) -> None:
    """Let contexts be entered around all later calls."""
    scene.around = rng.sample(_AROUND, rng.choice((0, 1, 1, 2)))


def default_dtype(rng: random.Random, scene: Scene) -> None:
    scene.undone.callback(torch.set_default_dtype, torch.get_default_dtype())
    torch.set_default_dtype(rng.choice((torch.float32, torch.float64)))


def threads(rng: random.Random, scene: Scene) -> None:
    scene.undone.callback(torch.set_num_threads, torch.get_num_threads())
    torch.set_num_threads(rng.choice((1, 2)))


def deterministic(rng: random.Random, scene: Scene) -> None:
    scene.undone.callback(
        torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled()
    )
    torch.use_deterministic_algorithms(rng.random() < 0.5, warn_only=True)


def matmul_precision(rng: random.Random, scene: Scene) -> None:
    scene.undone.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
    torch.set_float32_matmul_precision(rng.choice(("highest", "high", "medium")))


def mkldnn(rng: random.Random, scene: Scene) -> None:
    scene.undone.enter_context(torch.backends.mkldnn.flags(enabled=rng.random() < 0.5))


class Stopped(Exception):
    """An error of a model's own."""


_ERRORS: Sequence[Callable[[], BaseException]] = (
    partial(RuntimeError, "of the model"),
    partial(ValueError, "of the model"),
    Stopped,
    KeyboardInterrupt,
    partial(torch.OutOfMemoryError, "of the model"),
)


def error_in_a_call(rng: random.Random, scene: Scene) -> None:
    """Let a model fail in one of its next calls, and attack again."""
    attacker = rng.choice(scene.attackers)
    x, y = random_batch_for(rng, scene)
    x = x.to(torch.float64 if attacker.victim.dtype == torch.float64 else torch.float32)
    subject = attacker.victim.subject
    for _ in range(rng.randint(1, 2)):
        kind = rng.choice(_ERRORS)
        subject.fuse = Fuse(rng.randint(1, 12), kind())
        before = state_of(subject)
        adv = None
        try:
            adv = attacker.attack(x, y, seed=1)
        except BaseException as error:
            message = str(error)
            if type(error) is not type(kind()) and "engine must be" not in message:
                raise
        subject.fuse = None
        assert_same_state(state_of(subject), before)
        if adv is not None:
            compare(attacker.attack, attacker.victim, x, y, adv)
    check(attacker, scene, x, y)


def calls_in_threads(rng: random.Random, scene: Scene) -> None:
    """Several threads, each with an attack, of models that they may share."""
    batches = [random_batch_for(rng, scene) for _ in range(3)]
    chosen = [rng.choice(scene.attackers) for _ in batches]
    results: list[Any] = [None] * len(batches)

    def attack(number: int, attacker: Attacker, x: Tensor, y: Tensor) -> None:
        dtype = torch.float64 if attacker.victim.dtype == torch.float64 else torch.float32
        try:
            results[number] = attacker.attack(x.to(dtype), y, seed=1)
        except Exception as error:
            results[number] = error

    running = [
        threading.Thread(target=attack, args=(n, a, *batch))
        for n, (a, batch) in enumerate(zip(chosen, batches, strict=True))
    ]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    for attacker, (x, y), found in zip(chosen, batches, results, strict=True):
        if isinstance(found, ValueError) and "engine must be" in str(found):
            continue
        if isinstance(found, Exception):
            raise found
        one_alone = sum(a.attack is attacker.attack for a in chosen) == 1
        if one_alone:  # else `last` is another call's
            compare(attacker.attack, attacker.victim, x.to(found.dtype), y, found)


class _Attacked(Dataset[Tensor]):
    """One attack in a process of its own."""

    def __init__(self, attacker: Attacker, x: Tensor, y: Tensor) -> None:
        self._attacker, self._batch = attacker, (x, y)

    def __len__(self) -> int:
        return 1

    def __getitem__(self, number: int) -> Tensor:
        return self._attacker.attack(*self._batch, seed=1)


def call_in_a_worker(rng: random.Random, scene: Scene) -> None:
    """A worker of a data loader, which is a forked process, attacks."""
    attacker = rng.choice(scene.attackers)
    if attacker.attack.settings.engine == "compiled" or torch.get_num_threads() > 1:
        return
    x, y = random_batch_for(rng, scene)
    x = x.to(torch.float64 if attacker.victim.dtype == torch.float64 else torch.float32)
    check(attacker, scene, x, y)
    loader = DataLoader(
        _Attacked(attacker, x, y), None, num_workers=1, multiprocessing_context="fork"
    )
    (adv,) = loader
    compare(attacker.attack, attacker.victim, x, y, adv)


OPERATIONS = (
    around, default_dtype, threads, deterministic, matmul_precision, mkldnn, error_in_a_call, error_in_a_call,
    calls_in_threads, call_in_a_worker,
)  # fmt: skip
