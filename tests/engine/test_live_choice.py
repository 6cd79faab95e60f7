"""The live model where no copy can run: what it costs, and that changes of the model are seen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attack_helpers import images, randomise
from foreign_models import Pooled, conv
from test_cached_recording import Ripple
from torch import Tensor, nn

import fastadv
from fastadv.engine import live_choice, selection
from fastadv.engine.precision import fast_bf16

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:fastadv attacks this model with the eager engine"),
]

Y = torch.arange(8) % 4


class Reads(nn.Module):
    """Its code looks at its results, so that no copy can be made as long as it does."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Pooled(conv(3, 8), nn.ReLU(), conv(8, 8))
        self.reads, self.noisy = True, False

    def forward(self, x: Tensor) -> Tensor:
        out = self.net(x)
        if self.noisy:
            out = out + torch.randn_like(out)
        return out if not self.reads or out.sum() < 1e9 else -out


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every time that a copy is tried."""
    calls: list[int] = []
    plain = selection._build

    def counted(*args: Any) -> Any:
        calls.append(1)
        return plain(*args)

    monkeypatch.setattr(selection, "_build", counted)
    return calls


def test_a_copy_is_tried_ever_less_often(tried: list[int]) -> None:
    torch.manual_seed(0)
    model, x = randomise(Reads()).eval(), images(8)
    attack = fastadv.PGD(model, steps=1, seed=0)
    results = [attack(x, Y) for _ in range(20)]
    assert len(tried) == 3  # at the uses 1, 4 and 13
    assert attack.last.engine == "eager"
    assert all(torch.equal(result, results[0]) for result in results)


def test_a_model_that_can_be_copied_later_is(tried: list[int]) -> None:
    model, x = randomise(Reads()).eval(), images(8)
    attack = fastadv.PGD(model, steps=1, engine="fixed")
    assert [attack.engine_for(x).name for _ in range(3)] == ["eager"] * 3
    model.reads = False
    assert attack.engine_for(x).name == "compiled"
    assert attack.engine_for(x).name == "compiled" and len(tried) == 2


def test_numbers_drawn_between_two_tries_follow_the_seed() -> None:
    model, x = randomise(Reads()).eval(), images(8)
    attack = fastadv.PGD(model, steps=1, seed=0)
    attack(x, Y)
    model.noisy = True
    before = torch.get_rng_state()
    first, second = attack(x, Y), attack(x, Y)
    assert torch.equal(first, second) and torch.equal(before, torch.get_rng_state())


@pytest.mark.skipif(not fast_bf16(torch.device("cpu")), reason="a processor with fast bfloat16")
@pytest.mark.parametrize("faster", [False, True])
def test_the_faster_layout_runs(faster: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    plain = live_choice.EagerEngine.gradient

    def gradient(self: Any, x: Tensor, value_of: Any) -> Any:
        last = x.is_contiguous(memory_format=torch.channels_last)
        now[0] += 1.0 if last == faster else 2.0
        return plain(self, x, value_of)

    monkeypatch.setattr(live_choice.EagerEngine, "gradient", gradient)
    monkeypatch.setattr(live_choice.time, "perf_counter", lambda: now[0])
    model, x = randomise(Reads()).eval(), images(8)
    for _ in range(2):
        engine = fastadv.PGD(model, steps=1).engine_for(x)
        shown = engine.images(x)
        assert engine.precision == "bf16"
        assert shown.is_contiguous(memory_format=torch.channels_last) is faster


class ReadsRipple(Ripple):
    """It looks at its results."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out if out.sum() < 1e9 else -out


@pytest.mark.skipif(not fast_bf16(torch.device("cpu")), reason="this CPU has no fast bfloat16")
@pytest.mark.parametrize("way", ["at once", "past the counters", "in training", "after training"])
def test_new_weights_whose_gradients_are_lost_under_autocast_are_noticed(way: str) -> None:
    torch.manual_seed(0)
    model, x = ReadsRipple().eval(), images(8)
    attack = fastadv.PGD(model, steps=1)
    attack(x, Y)
    assert (attack.last.engine, attack.last.precision) == ("eager", "bf16")
    training = way.endswith("training")
    with torch.no_grad():
        for _ in range(6 if training else 0):
            model.head.weight.mul_(1.01)
            attack(x, Y)
        assert attack.last.precision == "bf16"
        (model.height.data if way == "past the counters" else model.height).fill_(0.005)
        (model.rate.data if way == "past the counters" else model.rate).fill_(2000.0)
        if training:
            attack(x, Y)
        for _ in range(15 if way == "in training" else 0):
            model.head.weight.mul_(1.001)
            attack(x, Y)
    attack(x, Y)
    assert attack.last.precision == "fp32"
