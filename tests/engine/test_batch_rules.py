"""A model that decides by the number of images is attacked as it decides now, also after its rule has changed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fastadv
from fastadv.engine.recorder import record
from fastadv.engine.watched_size import SizeComparisons, WatchedSize, watched


class Rules:
    """What a configuration object would hold."""

    limit = 100


def by_shape(x: Tensor) -> bool:
    return bool(x.shape[0] >= Rules.limit)


def by_size(x: Tensor) -> bool:
    return Rules.limit <= x.size(0)


def by_product(x: Tensor) -> bool:
    return x.numel() // (x.shape[1] * x.shape[2] * x.shape[3]) * 2 + 1 > 2 * Rules.limit


def by_length(x: Tensor) -> bool:
    return len(x) >= Rules.limit


def by_key(x: Tensor) -> bool:
    return {True: x.shape[0] in {n for n in (8, 16) if n >= Rules.limit}}[True]


def by_quotient(x: Tensor) -> bool:
    return x.shape[0] / 2 >= Rules.limit / 2


class Ruled(nn.Module):
    """Turns its logits around where the rule says so."""

    def __init__(self, rule: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 5)
        )
        self.rule = rule

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.body(x)
        return -logits if self.rule(x) else logits


@pytest.mark.parametrize("rule", [by_shape, by_size, by_product, by_length, by_key, by_quotient])
def test_changed_rule_on_the_batch_size_is_followed(rule: Callable[[Tensor], bool]) -> None:
    torch.manual_seed(0)
    model, x = Ruled(rule).eval(), torch.rand(16, 3, 8, 8)
    y = torch.randint(0, 5, (16,))
    attack = fastadv.PGD(
        model, eps=0.1, alpha=0.03, steps=3, random_start=False, precision="bf16", engine="compiled"
    )
    loss = nn.CrossEntropyLoss()
    try:
        for limit in (100, 8, 100, 8):
            Rules.limit = limit
            with torch.no_grad():
                before = loss(model(x), y)
                after = loss(model(attack(x, y)), y)
            assert after > before + 0.01
            assert attack.last.engine != "eager"
    finally:
        Rules.limit = 100


def test_new_rule_is_noticed_in_a_model_that_had_none() -> None:
    torch.manual_seed(0)
    model, x = Ruled(lambda x: False).eval(), torch.rand(16, 3, 8, 8)
    y = torch.randint(0, 5, (16,))
    attack = fastadv.PGD(
        model, eps=0.1, alpha=0.03, steps=3, random_start=False, precision="bf16", engine="compiled"
    )
    attack(x, y)
    model.rule = lambda x: x.shape[0] > 4
    with torch.no_grad():
        assert nn.functional.cross_entropy(model(attack(x, y)), y) > nn.functional.cross_entropy(
            model(x), y
        )


def test_sizes_that_decide_nothing_are_no_look() -> None:
    class Reshaping(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            n, c, h, w = x.shape
            windows = (
                x.view(n, c, h // 2, 2, w // 2, 2)
                .permute(0, 2, 4, 3, 5, 1)
                .reshape(n * (h // 2) * (w // 2), -1)
            )
            return windows.view(n, -1)[:, :10]

    recording = record(Reshaping(), torch.rand(3, 3, 8, 8), careful=True)
    assert recording.comparisons == []


def test_torch_takes_watched_sizes_for_integers() -> None:
    comparisons, x = SizeComparisons(), torch.rand(3, 4, 8, 8)
    shape = watched(x.shape, comparisons)
    n, c, h, w = shape
    assert isinstance(n, WatchedSize)
    assert x.view(n, -1).shape == (3, 256)
    assert torch.zeros(n, c).shape == (3, 4)
    assert x.reshape(shape).shape == x.shape
    assert nn.functional.interpolate(x, size=(h * 2, w)).shape == (3, 4, 16, 8)
    assert list(range(n)) == [0, 1, 2]
    comparisons.on = False
    assert n * 2 > 5
    assert comparisons.seen == []
    comparisons.on = True
    assert n * 2 > 5
    assert comparisons.seen == [1]
