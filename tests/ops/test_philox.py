"""Philox 4x32-10: the package's and the tests' own against the vectors that Random123 publishes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from op_cases.random_words import philox4x32, words

from fastadv.ops.philox import philox, philox_block, random_words, symmetric_uniform

VECTORS = [
    pytest.param((0,) * 4, (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8", id="zeros"),
    pytest.param(
        (0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd", id="ones"
    ),
    pytest.param(
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        "d16cfe09 94fdcceb 5001e420 24126ea1",
        id="pi",
    ),
]
SEEDS = (0, 1, 2**32, 2**63 - 1, -1, 0x1234_5678_9ABC_DEF0)
IDS = (0, 1, 2**31, 2**32 + 5, 2**62, -1)


@pytest.mark.parametrize(("counter", "key", "answer"), VECTORS)
def test_published_vectors(counter: tuple[int, ...], key: tuple[int, int], answer: str) -> None:
    expected = [int(word, 16) for word in answer.split()]
    assert philox4x32(np.array(counter, dtype=np.uint64), key).tolist() == expected
    drawn = philox_block(tuple(torch.tensor(word) for word in counter), key)
    assert [int(word) for word in drawn] == expected


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("stream", [0, 1])
def test_counters_and_keys_use_all_their_bits(seed: int, stream: int) -> None:
    drawn = philox(seed, torch.tensor(IDS), 3, stream)
    assert torch.equal(drawn, torch.from_numpy(words(seed, list(IDS), 12, stream).astype(np.int64)))


def test_seeds_ids_and_streams_give_different_numbers() -> None:
    rows = [
        tuple(philox(seed, torch.tensor([sample]), 1, stream)[0].tolist())
        for seed in SEEDS
        for sample in IDS
        for stream in (0, 1)
    ]
    assert len(set(rows)) == len(rows)


def test_a_word_per_element_in_logical_order() -> None:
    like = torch.empty(2, 3, 5, 7)
    drawn = random_words(7, None, like)
    assert drawn.shape == (2, 105)
    assert torch.equal(drawn, philox(7, torch.arange(2), 27)[:, :105])


def test_symmetric_uniform_covers_its_range_exactly() -> None:
    ends = symmetric_uniform(torch.tensor([0, 0xFF, 0x80000000, 0xFFFFFFFF]))
    assert ends.tolist() == [-1.0, -1.0, 0.0, 1 - 2.0**-23]
