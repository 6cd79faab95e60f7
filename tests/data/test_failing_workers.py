"""Worker processes that fail in the middle of the work: the item, or the likely cause, is named."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info
from training_helpers import small_recipe

import fastadv
from fastadv.data import Splits, StreamedData, StreamLoader, from_tensors
from fastadv.models import small_cnn
from fastadv.trainers import train

pytestmark = [pytest.mark.slow, pytest.mark.processes, pytest.mark.usefixtures("one_thread")]
IMAGES = torch.randint(256, (48, 1, 8, 8), dtype=torch.uint8)


def fail() -> None:
    raise OSError(5, "Input/output error", "x.png")


def lack_memory() -> None:
    raise MemoryError


def be_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Failing(Dataset[Any]):
    """Items of which the 40th does something to the worker that reads it."""

    def __init__(self, how: Callable[[], None]) -> None:
        self._how = how

    def __len__(self) -> int:
        return len(IMAGES)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index == 40 and get_worker_info() is not None:
            self._how()
        return IMAGES[index], index % 4


WORDS = [
    (fail, r"^item 40 of .* cannot be read: OSError: .* 'x\.png'$"),
    (lack_memory, "^item 40 of .* cannot be read: MemoryError: $"),
    (be_killed, "^one of the 1 processes that read data was killed, .*; give fewer workers$"),
]


@pytest.mark.parametrize(("how", "words"), WORDS)
def test_an_evaluation_says_what_failed(how: Callable[[], None], words: str) -> None:
    data = StreamedData(Failing(how), 4, "failing", workers=1)
    with pytest.raises(RuntimeError, match=words):
        fastadv.evaluate(small_cnn(4, 1), data, attacks=("clean",), batch_size=16, progress=False)


@pytest.mark.parametrize(("how", "words"), WORDS)
def test_a_training_says_what_failed(how: Callable[[], None], words: str) -> None:
    data = StreamedData(Failing(how), 4, "failing", workers=1)
    with pytest.raises(RuntimeError, match=words):
        list(StreamLoader(data, 16).epoch(1))


def test_a_wrong_item_keeps_its_words_whoever_reads_it() -> None:
    class Wrong(Failing):
        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            return IMAGES[index], 7 if index == 40 else 0

    for workers in (0, 1):
        data = StreamedData(Wrong(fail), 4, "wrong", workers)
        with pytest.raises(ValueError, match=r"^labels must be in 0 \.\. 3, got 7 at index 40$"):
            list(StreamLoader(data, 16).epoch(1))


def test_splits_of_another_kind_are_named(tmp_path: Path) -> None:
    streamed = StreamedData(Failing(fail), 4, "failing", workers=0)
    memory = from_tensors(IMAGES, torch.arange(48) % 4)
    pair: Any = (IMAGES, torch.arange(48) % 4)
    wrong: list[tuple[Any, Any, str]] = [
        (memory, streamed, "test of data must be ImageData, got StreamedData; from_dataset reads"),
        (memory, pair, "test of data must be ImageData, got tuple"),
        (pair, memory, "train of data must be ImageData or StreamedData, got tuple; from_tensors"),
    ]
    for first, second, words in wrong:
        with pytest.raises(TypeError, match=f"^{words}"):
            train(
                "standard",
                small_recipe("standard"),
                data=Splits(first, second),
                model="small_cnn",
                run_dir=tmp_path,
            )
