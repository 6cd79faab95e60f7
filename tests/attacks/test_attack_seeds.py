"""What the seed and the sample ids of an attack govern, and that the place in the batch does not matter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attack_helpers import digits_test, trained_small_cnn
from torch import Tensor

import fastadv

pytestmark = pytest.mark.usefixtures("one_thread")

WAYS: dict[str, dict[str, Any]] = {
    "eager fp32": {"engine": "eager", "precision": "fp32"},
    "compiled fp32": {"engine": "compiled", "precision": "fp32"},
    "compiled bf16": {"engine": "compiled", "precision": "bf16"},
}
LIMITS = {"linf": {"eps": 0.1, "alpha": 0.03}, "l2": {"eps": 1.0, "alpha": 0.3}}


def attack(x: Tensor, y: Tensor, **options: Any) -> Tensor:
    options = {"steps": 3, "precision": "fp32", **LIMITS["linf"], **options}
    return fastadv.pgd_fused(trained_small_cnn(), x, y, **options)


@pytest.mark.parametrize("norm", LIMITS)
@pytest.mark.parametrize("way", WAYS)
def test_one_seed_gives_one_result(way: str, norm: str) -> None:
    (x, y), options = digits_test(16), {**WAYS[way], **LIMITS[norm], "norm": norm, "restarts": 2}
    first = attack(x, y, seed=1, **options)
    assert torch.equal(attack(x, y, seed=1, **options), first)
    assert not torch.equal(attack(x, y, seed=2, **options), first)


def test_without_a_seed_torch_governs() -> None:
    x, y = digits_test(16)
    torch.manual_seed(7)
    first, second = attack(x, y), attack(x, y)
    torch.manual_seed(7)
    assert torch.equal(attack(x, y), first)
    assert not torch.equal(second, first)


def test_an_object_without_a_seed_draws_one_per_call() -> None:
    x, y = digits_test(16)
    pgd = fastadv.PGD(trained_small_cnn(), steps=2, precision="fp32")
    torch.manual_seed(7)
    first, second = pgd(x, y), pgd(x, y)
    torch.manual_seed(7)
    assert torch.equal(pgd(x, y), first) and not torch.equal(second, first)


def test_the_seed_of_an_object_is_that_of_every_call_without_one() -> None:
    x, y = digits_test(16)
    pgd = fastadv.PGD(trained_small_cnn(), 0.1, 0.03, 3, seed=4, precision="fp32")
    assert torch.equal(pgd(x, y), attack(x, y, seed=4))
    assert torch.equal(pgd(x, y, seed=5), attack(x, y, seed=5))


def test_seed_zero_is_a_seed() -> None:
    x, y = digits_test(16)
    assert torch.equal(attack(x, y, seed=0), attack(x, y, seed=0))


@pytest.mark.parametrize("norm", LIMITS)
@pytest.mark.parametrize("restarts", [1, 3])
@pytest.mark.parametrize("way", WAYS)
def test_permuting_a_batch_with_its_ids_permutes_the_result(
    way: str, restarts: int, norm: str
) -> None:
    """Other places in the batch mean other summation orders: a vanishing gradient may change its sign."""
    (x, y), options = (
        digits_test(24),
        {**WAYS[way], **LIMITS[norm], "norm": norm, "restarts": restarts},
    )
    ids = torch.arange(100, 124)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    expected = attack(x, y, seed=1, sample_ids=ids, **options)[order]
    found = attack(x[order], y[order], seed=1, sample_ids=ids[order], **options)
    tolerance = 1e-6 if "fp32" in way else 0.02
    furthest = (found - expected).flatten(1).abs().amax(1)
    assert (furthest <= tolerance).float().mean() >= 0.9, furthest


def test_a_part_of_a_batch_gets_what_it_gets_in_the_whole() -> None:
    (x, y), ids = digits_test(24), torch.arange(100, 124)
    whole = attack(x, y, seed=1, sample_ids=ids)
    part = attack(x[5:9], y[5:9], seed=1, sample_ids=ids[5:9])
    torch.testing.assert_close(part, whole[5:9], rtol=0, atol=1e-6)


def test_the_default_ids_count_from_zero() -> None:
    x, y = digits_test(8)
    assert torch.equal(attack(x, y, seed=1), attack(x, y, seed=1, sample_ids=torch.arange(8)))


def test_the_same_image_under_other_ids_starts_elsewhere() -> None:
    x, y = digits_test(1)
    x, y = x.repeat(4, 1, 1, 1), y.repeat(4)
    settings = {"seed": 1, "steps": 1, "alpha": 1e-9}  # so that the starts are left
    adv = attack(x, y, **settings)
    assert len({row.numpy().tobytes() for row in adv}) == 4
    same = attack(x, y, **settings, sample_ids=torch.zeros(4, dtype=torch.int64))
    assert torch.equal(same, same[:1].expand_as(same))
