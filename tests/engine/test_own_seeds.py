"""Models that seed torch's generator themselves, as a defence with fixed noise does, keep their own noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attack_helpers import cross_entropy, images, plain_pgd
from torch import Tensor, nn

import fastadv

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:fastadv attacks this model with the eager engine"),
]
X, Y = images(4), torch.arange(4)


class FixedNoise(nn.Module):
    """Adds the same noise in every pass."""

    def __init__(self, noise: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.noise = noise
        self.conv, self.last = nn.Conv2d(3, 8, 3), nn.Linear(288, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.conv(x + self.noise(x)).relu().flatten(1))


def seeded(x: Tensor) -> Tensor:
    torch.manual_seed(7)
    return torch.randn(x.shape)


def seeded_apart(x: Tensor) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return torch.randn(x.shape)


def by_the_generator(x: Tensor) -> Tensor:
    torch.default_generator.manual_seed(7)
    return torch.randn(x.shape)


STATE = torch.Generator().manual_seed(7).get_state()


def from_a_kept_state(x: Tensor) -> Tensor:
    before = torch.get_rng_state()
    torch.set_rng_state(STATE)
    try:
        return torch.randn(x.shape)
    finally:
        torch.set_rng_state(before)


@pytest.mark.parametrize("noise", [seeded, seeded_apart, by_the_generator, from_a_kept_state])
@pytest.mark.parametrize("settings", [{}, {"engine": "eager"}, {"train_mode": True}])
@pytest.mark.parametrize("as_function", [False, True])
@pytest.mark.parametrize("callers_seed", [3, 7])
def test_a_model_keeps_its_own_noise(
    noise: Callable[[Tensor], Tensor],
    settings: dict[str, Any],
    as_function: bool,
    callers_seed: int,
) -> None:
    """Also where the caller's generator is in the state to which the model brings it."""
    model = FixedNoise(noise).eval()
    options: dict[str, Any] = dict(eps=8 / 255, alpha=2 / 255, steps=2)
    wanted = plain_pgd(model, X, Y, X, loss=cross_entropy, **options)
    attacked = (lambda x: model(x)) if as_function else model
    attack = fastadv.PGD(
        attacked, random_start=False, precision="fp32", seed=0, **options, **settings
    )
    torch.manual_seed(callers_seed)
    state = torch.get_rng_state()
    for _ in range(3):  # what an earlier attack has left must not matter
        assert torch.equal(attack(X, Y), wanted)
        assert torch.equal(torch.get_rng_state(), state)


def test_a_model_that_seeds_and_draws_nothing_leaves_the_callers_generator() -> None:
    def no_noise(x: Tensor) -> Tensor:
        torch.manual_seed(7)
        return torch.zeros(1)

    torch.manual_seed(3)
    state = torch.get_rng_state()
    attack = fastadv.PGD(FixedNoise(no_noise).eval(), steps=1, seed=0, engine="compiled")
    torch.set_rng_state(state)
    attack(X, Y)
    assert attack.last.engine == "compiled"
    assert torch.equal(torch.get_rng_state(), state)
