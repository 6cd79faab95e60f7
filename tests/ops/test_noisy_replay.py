"""Noisy replay: which samples are replayed, and with what noise."""

from __future__ import annotations

import pytest
import torch
from op_cases.running import places

from fastadv.ops import backend, noisy_replay, random_start

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")
everywhere = pytest.mark.parametrize(("device", "name"), places("noisy_replay"))


@everywhere
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_replayed_samples_are_random_starts_and_the_others_untouched(
    device: str, name: str, layout: torch.memory_format
) -> None:
    x, adv = torch.rand(2, 6, 3, 8, 9).to(device)
    x = x.contiguous(memory_format=layout)
    distance = torch.tensor([0.1, 0.3, 0.25, torch.nan, torch.inf, 0.0], device=device)
    ids = torch.tensor([5, 4, 3, 2, 1, 0], device=device)
    with backend(name):
        out = noisy_replay(x, adv, distance, 0.25, 0.1, seed=9, sample_ids=ids)
        noisy = random_start(x, 0.1, seed=9, sample_ids=ids)
    replayed = [False, True, False, False, True, False]
    for i, noise in enumerate(replayed):
        assert torch.equal(out[i], noisy[i] if noise else adv[i])
        assert not torch.equal(noisy[i], adv[i])


@everywhere
def test_all_or_none_by_tau(device: str, name: str) -> None:
    x, adv = torch.rand(2, 4, 30).to(device)
    distance = torch.rand(4).to(device)
    with backend(name):
        assert torch.equal(noisy_replay(x, adv, distance, 1.0, 0.1, seed=0), adv)
        replayed = noisy_replay(x, adv, distance, -1.0, 0.1, seed=0)
        assert torch.equal(replayed, random_start(x, 0.1, seed=0))


@everywhere
def test_adversarial_images_pass_bit_for_bit(device: str, name: str) -> None:
    """Also where they lie outside the bounds: the attack has clipped them, not this op."""
    x = torch.rand(2, 30, device=device)
    adv = torch.full((2, 30), 1.5, device=device)
    adv[1, 7] = torch.nan
    with backend(name):
        out = noisy_replay(x, adv, torch.zeros(2, device=device), 0.5, 0.1, seed=0)
    torch.testing.assert_close(out, adv, rtol=0, atol=0, equal_nan=True)


@everywhere
def test_distances_of_any_float_dtype(device: str, name: str) -> None:
    x, adv = torch.rand(2, 4, 30).to(device)
    distance = torch.tensor([0.0, 0.5, 0.75, 1.0], device=device)
    with backend(name):
        expected = noisy_replay(x, adv, distance, 0.5, 0.1, seed=0)
        for dtype in (torch.float64, torch.bfloat16, torch.float16):
            out = noisy_replay(x, adv, distance.to(dtype), 0.5, 0.1, seed=0)
            assert torch.equal(out, expected)


def test_no_seed_follows_torchs_generator() -> None:
    x, distance = torch.rand(2, 30), torch.ones(2)
    torch.manual_seed(3)
    first = noisy_replay(x, x, distance, 0.5, 0.1)
    torch.manual_seed(3)
    assert torch.equal(noisy_replay(x, x, distance, 0.5, 0.1), first)
