"""Defences that draw by a method of a generator, kept or named without the generator itself."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastadv

X, Y = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 4
METHODS: dict[str, Callable[[], Callable[[], float]]] = {
    "random.Random": lambda: random.Random(0).random,
    "random.SystemRandom": lambda: random.SystemRandom().random,
    "numpy.random.Generator": lambda: np.random.default_rng(0).random,
    "numpy.random.RandomState": lambda: np.random.RandomState(0).rand,
}


class Noisy(nn.Module):
    """Adds a number that is drawn in every hundredth pass alone, but draws in each."""

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        return self.net(1 - x if self.draw() < 0.01 else x)


@pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)
@pytest.mark.filterwarnings("ignore:fastadv attacks this model with the eager engine")
def test_a_bound_method_is_seen_to_draw(make: Callable[[], Callable[[], float]]) -> None:
    torch.manual_seed(0)
    engine = fastadv.PGD(Noisy(make()).eval(), steps=1).engine_for(X)
    assert engine.name == "eager" or engine.precision == "fp32"
    assert "draws random numbers" in engine.reason


def test_a_generator_without_state_is_seen_to_draw() -> None:
    """The system's numbers have no state that could be compared."""
    torch.manual_seed(0)
    model = Noisy(lambda: 1.0).eval()
    model.own = random.SystemRandom()
    assert "draws" not in fastadv.PGD(model, steps=1).engine_for(X).reason
    model.draw = lambda: model.own.random()
    with pytest.warns(UserWarning, match="draws random numbers"):
        assert "draws" in fastadv.PGD(model, steps=1).engine_for(X).reason


PYTHONS, NUMPYS = random.Random(0), np.random.default_rng(0)


def rarely() -> bool:
    return NUMPYS.random() < 0.01


def flipped(x: Tensor) -> Tensor:
    return x.flip(3) if rarely() else x


class Coin:
    """Draws from a generator that the module names, not the object."""

    def shows_head(self) -> bool:
        return PYTHONS.random() < 0.01


class Hiding(nn.Module):
    """The code that draws is one or two calls away from the forward method."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
        self.way, self.coin = way, Coin()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self._augmented(x))

    def _augmented(self, x: Tensor) -> Tensor:
        if self.way == "function":
            return flipped(x)
        if self.way == "object":
            return 1 - x if self.coin.shows_head() else x
        return 1 - x if PYTHONS.random() < 0.01 else x


@pytest.mark.parametrize("way", ["function", "object", "method"])
@pytest.mark.filterwarnings("ignore:fastadv attacks this model with the eager engine")
def test_a_generator_that_called_code_names_is_seen(way: str) -> None:
    torch.manual_seed(0)
    assert "draws random numbers" in fastadv.PGD(Hiding(way).eval(), steps=1).engine_for(X).reason
