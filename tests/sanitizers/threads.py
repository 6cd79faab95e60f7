"""Several threads at once: one model, several models, ops. For ThreadSanitizer; run.sh runs it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from attack_helpers import images
from op_cases import CASES
from op_cases.budget import check_same_bits
from op_cases.draw import Spec
from op_cases.running import run
from torch import Tensor, nn

import fastadv
from fastadv import models

_THREADS, _ROUNDS = 4, 3


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """Two threads within each op."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def _at_once(work: Callable[[int], None]) -> None:
    """Run something in several threads; the first exception of any is raised."""
    barrier, failures = threading.Barrier(_THREADS), []

    def begin(number: int) -> None:
        barrier.wait()
        try:
            for _ in range(_ROUNDS):
                work(number)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=begin, args=(number,)) for number in range(_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def _network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return models.small_cnn().eval()


def _batch(seed: int) -> tuple[Tensor, Tensor]:
    return images(8, 1, 8, seed), torch.arange(8)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("shared", ["model", "attack", "nothing"])
def test_attacks(precision: str, shared: str) -> None:
    networks = [_network(0 if shared != "nothing" else number) for number in range(_THREADS)]
    if shared != "nothing":
        networks = networks[:1] * _THREADS
    attacks = [fastadv.PGD(net, steps=2, precision=precision, seed=0) for net in networks]
    if shared == "attack":
        attacks = attacks[:1] * _THREADS
    expected = [
        fastadv.PGD(_network(0 if shared != "nothing" else n), steps=2, precision=precision, seed=0)(*_batch(n))
        for n in range(_THREADS)
    ]  # fmt: skip

    def work(number: int) -> None:
        assert torch.equal(attacks[number](*_batch(number)), expected[number])

    _at_once(work)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.function])
def test_ops(name: str) -> None:
    case = CASES[name]
    shapes = [case.large or case.shapes[0], *case.shapes[:3]]
    arguments = [case.arguments(Spec(shape, seed=n)) for n, shape in enumerate(shapes)]
    expected = [run(case, own, "native") for own in arguments]

    def work(number: int) -> None:
        for result, wanted in zip(
            run(case, arguments[number], "native"), expected[number], strict=True
        ):
            check_same_bits(result, wanted, name)

    _at_once(work)
