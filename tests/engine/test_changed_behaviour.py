"""Models that become something else between two attacks, or between two calls, in ways that are easily missed."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from attack_helpers import images, randomise
from foreign_models import Pooled, conv
from torch import Tensor, nn

import fastadv
from fastadv.engine.cached_recording import CachedRecording

pytestmark = pytest.mark.usefixtures("one_thread")

Y = torch.arange(8) % 4


def net() -> nn.Module:
    return randomise(Pooled(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 8)))


def cosine_with_live(attack: fastadv.PGD, model: nn.Module, x: Tensor) -> float:
    """The smallest cosine of the engine's gradient with the one that a fresh pass of the model has."""
    engine = attack.engine_for(x)

    def value(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, Y[: len(x)], reduction="none")

    with engine.session(model, 0, current=True):
        found = engine.gradient(engine.images(x), value).grad.double().flatten(1)
    leaf = x.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(value(model.eval()(leaf)).sum(), leaf)
    return float(F.cosine_similarity(found, wanted.double().flatten(1)).min())


def used(model: nn.Module, x: Tensor) -> fastadv.PGD:
    """An attack whose engine knows the model by heart."""
    attack = fastadv.PGD(model, steps=1, seed=0)
    for _ in range(3):
        attack(x, Y[: len(x)])
    return attack


class TakesTurns(nn.Module):
    """Members of one structure, each for some calls."""

    def __init__(self, every: int, counter: str) -> None:
        super().__init__()
        self.members = nn.ModuleList([net(), net()])
        self.every, self.counter = every, counter
        self.calls, self.shared = 0, SimpleNamespace(calls=0)
        self.turns = itertools.cycle([0] * every + [1] * every) if counter == "iterator" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.counter == "attribute":
            self.calls += 1
            calls = self.calls
        elif self.turns is not None:
            return self.members[next(self.turns)](x)
        else:
            self.shared.calls += 1
            calls = self.shared.calls
        return self.members[calls // self.every % 2](x)


@pytest.mark.parametrize("counter", ["attribute", "object", "iterator"])
@pytest.mark.parametrize("every", [1, 2, 3, 5, 7, 12, 50])
@pytest.mark.filterwarnings("ignore:fastadv attacks this model with the eager engine")
def test_members_that_take_turns_run_live(every: int, counter: str) -> None:
    attack = fastadv.PGD(TakesTurns(every, counter), steps=1)
    assert attack.engine_for(images(8)).name == "eager"


@pytest.mark.parametrize("every", [5, 12, 50])
@pytest.mark.filterwarnings("ignore:fastadv attacks this model with the eager engine")
def test_members_that_take_turns_run_live_where_recordings_are_not_cached(
    every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU. There a copy would be the member of one turn for a whole attack."""
    monkeypatch.setattr(CachedRecording, "of", lambda *_: None)
    attack = fastadv.PGD(TakesTurns(every, "object"), steps=1)
    assert attack.engine_for(images(8)).name == "eager"
    assert fastadv.PGD(net(), steps=1).engine_for(images(8)).name == "compiled"


class Routed(nn.Module):
    """Code that cannot be seen makes a number, or a mask, of the images."""

    def __init__(self, route: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.route = net(), route

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            weight = self.route(x)
        return self.net(x) * weight


@torch.jit.script
def mean_gate(x: Tensor) -> Tensor:
    return torch.sigmoid(8 * (x.mean() - 0.5))


@torch.jit.script
def gate_of_each(x: Tensor) -> Tensor:
    return torch.sigmoid(20 * (x[:, 0].mean((1, 2)) - 0.5))[:, None]


@pytest.mark.parametrize("route", [mean_gate, gate_of_each])
@pytest.mark.filterwarnings("ignore:fastadv attacks this model with the eager engine")
def test_unseen_code_without_gradient_is_no_weight(route: Callable[[Tensor], Tensor]) -> None:
    attack = fastadv.PGD(Routed(route), steps=1)
    assert attack.engine_for(images(8)).name == "eager"


class Guarded(nn.Module):
    """Its behaviour hangs on a flag, in ways that no operation of a pass without gradients shows."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.first, self.net, self.way, self.flag = conv(3, 3), net(), way, False

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if self.way == "cut":
            with torch.set_grad_enabled(self.flag is False and torch.is_grad_enabled()):
                h = self.first(h)
            return self.net(h + 0.3 * x)
        if self.flag and h.requires_grad:
            h.register_hook(lambda grad: -grad)
        return self.net(h)


@pytest.mark.parametrize("way", ["cut", "hook"])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.filterwarnings("ignore:fastadv attacks this model with the eager engine")
def test_a_gradient_that_is_cut_or_turned_is_seen(way: str, first: bool) -> None:
    torch.manual_seed(0)
    model, x = Guarded(way), images(8)
    model.flag = first
    attack = used(model, x)
    assert cosine_with_live(attack, model, x) > 0.95
    for _ in range(2):
        model.flag = not model.flag
        for _ in range(2):
            assert cosine_with_live(attack, model, x) > 0.95


DRAWS: dict[str, Callable[[], int]] = {
    "Python's": lambda: random.randrange(2),
    "numpy's": lambda: int(np.random.randint(2)),
}


class RandomMember(nn.Module):
    """A defence that is switched on later."""

    def __init__(self, draw: Callable[[], int]) -> None:
        super().__init__()
        self.members, self.draw, self.on = nn.ModuleList([net(), net()]), draw, False

    def forward(self, x: Tensor) -> Tensor:
        return self.members[self.draw() if self.on else 0](x)


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.filterwarnings("ignore:fastadv attacks this model with the eager engine")
def test_a_random_defence_that_is_switched_on_runs_live(draw: str) -> None:
    model, x = RandomMember(DRAWS[draw]), images(8)
    attack = used(model, x)
    assert attack.last.engine == "compiled"
    model.on = True
    for _ in range(3):
        assert attack.engine_for(x).name == "eager"


def test_numbers_that_the_caller_draws_do_not_matter() -> None:
    model, x = net(), images(8)
    attack = used(model, x)
    first = attack.engine_for(x)
    for _ in range(3):
        random.random()
        np.random.rand()
        assert attack.engine_for(x) is first


@pytest.mark.slow
@pytest.mark.compiles
@pytest.mark.filterwarnings("ignore:fastadv attacks this model with the eager engine")
def test_a_function_that_torch_has_compiled() -> None:
    class Compiled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()
            self.act: Any = torch.compile(lambda h: torch.sin(h) + h, backend="eager")

        def forward(self, x: Tensor) -> Tensor:
            return self.net(self.act(x))

    model, x = Compiled(), images(8)
    adv = fastadv.PGD(model, steps=1, random_start=False, precision="auto")(x, Y)
    plain = fastadv.PGD(model, steps=1, random_start=False, precision="fp32")(x, Y)
    assert float((adv != plain).float().mean()) < 0.05


def test_buffers_that_a_forward_pass_makes_do_not_stay() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()
            self.register_buffer("late", None)

        def forward(self, x: Tensor) -> Tensor:
            if self.late is None:
                self.late = torch.ones(1)
                self.register_buffer("new", torch.ones(1))
            return self.net(x) * self.late

    model = Positions()
    names = list(model.state_dict())
    fastadv.PGD(model, steps=1)(images(4), Y[:4])
    assert list(model.state_dict()) == names and model.late is None


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_start_that_is_no_image_is_refused(value: float) -> None:
    x = images(4)
    with pytest.raises(ValueError, match="start must be finite, got values"):
        fastadv.PGD(net(), steps=1)(x, Y[:4], start=torch.full_like(x, value))
