"""Models that exchange, fuse or scale their weights in their first pass: they are left as they were."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attack_helpers import images
from torch import Tensor, nn

import fastadv

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:fastadv attacks this model with the eager engine"),
]
X, Y = images(4), torch.arange(4)


class Prepared(nn.Module):
    """Prepares its weights in its first pass, and notes that it has."""

    def __init__(self, prepare: Callable[[Any], None]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.last = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(288, 4)
        self.norm.running_mean.normal_()
        self.register_buffer("scale", torch.ones(4))
        self.prepare, self.is_prepared = prepare, False

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_prepared:
            self.prepare(self)
            self.is_prepared = True
        return self.last(self.norm(self.conv(x)).relu().flatten(1)) * self.scale


def fuse(model: Prepared) -> None:
    model.conv = nn.utils.fuse_conv_bn_eval(model.conv, model.norm)
    model.norm = nn.Identity()  # type: ignore[assignment]


def new_parameter(model: Prepared) -> None:
    model.last.weight = nn.Parameter(3 * model.last.weight.detach())


def new_data(model: Prepared) -> None:
    model.last.weight.data = 3 * model.last.weight.data


def in_place(model: Prepared) -> None:
    model.last.weight.data.mul_(3)


def buffer_in_place(model: Prepared) -> None:
    model.scale.data.copy_(torch.tensor([3.0, -1.0, 2.0, 0.5]))


def new_buffer(model: Prepared) -> None:
    model.scale = torch.tensor([3.0, -1.0, 2.0, 0.5])


@pytest.mark.parametrize("engine", ["auto", "eager"])
@pytest.mark.parametrize(
    "prepare", [fuse, new_parameter, new_data, in_place, buffer_in_place, new_buffer]
)
def test_a_model_that_prepares_its_weights_computes_the_same_after_an_attack(
    prepare: Callable[[Any], None], engine: Any
) -> None:
    """The note that the weights are prepared must not stay where the weights go back, or the reverse."""
    model = Prepared(prepare).eval()
    apart = copy.deepcopy(model)
    attack = fastadv.PGD(model, steps=2, random_start=False, engine=engine)
    adv = attack(X, Y)
    with torch.no_grad():
        assert torch.allclose(model(X), apart(X), atol=1e-5)
    plain = fastadv.PGD(apart, steps=2, random_start=False, engine="eager", precision="fp32")
    assert torch.allclose(adv, plain(X, Y), atol=1e-3)


class TakesFromABank(nn.Module):
    """Takes its weights, or its buffer, from a list, by turns."""

    def __init__(self, take: Callable[[Any, Tensor], None]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.last = nn.Linear(192, 4)
        self.register_buffer("other", torch.randn(4, 192))
        self.take, self.bank, self.turn = take, [torch.randn(4, 192) for _ in range(2)], 0

    def forward(self, x: Tensor) -> Tensor:
        self.turn = 1 - self.turn
        self.take(self, self.bank[self.turn])
        return self.last(x.flatten(1)) + x.flatten(1) @ self.other.T


def weight_data(model: Any, weight: Tensor) -> None:
    model.last.weight.data = weight


def weight_set(model: Any, weight: Tensor) -> None:
    with torch.no_grad():
        model.last.weight.set_(weight)


def buffer_data(model: Any, weight: Tensor) -> None:
    model.other.data = weight


@pytest.mark.parametrize("engine", ["auto", "eager"])
@pytest.mark.parametrize("take", [weight_data, weight_set, buffer_data])
def test_memory_that_a_weight_was_moved_to_is_not_written(take: Any, engine: Any) -> None:
    model = TakesFromABank(take).eval()
    bank = copy.deepcopy(model.bank)
    own = [(t, t.data_ptr(), t.detach().clone()) for t in (model.last.weight, model.other)]
    fastadv.PGD(model, steps=3, engine=engine)(X[..., :8, :8], Y)
    assert all(map(torch.equal, model.bank, bank))
    for tensor, place, value in own:
        assert tensor.data_ptr() == place and torch.equal(tensor, value)


@pytest.mark.parametrize("engine", ["auto", "eager"])
def test_weights_that_a_pass_casts_have_their_dtype_back(engine: Any) -> None:
    class Casts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.last = nn.Linear(193, 3)  # float32 of odd sizes cannot be seen as float64

        def forward(self, x: Tensor) -> Tensor:
            return self.last.double()(x.flatten(1)[:, [0, *range(192)]].double()).float()

    model = Casts().eval()
    before = model.last.weight.detach().clone()
    fastadv.PGD(model, steps=2, engine=engine)(X[..., :8, :8], Y % 3)
    assert model.last.weight.dtype == torch.float32
    assert torch.equal(model.last.weight, before)


def test_a_submodule_that_a_recording_exchanged_is_back() -> None:
    class Exchanges(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.other = nn.Linear(192, 4), nn.Linear(192, 4)

        def forward(self, x: Tensor) -> Tensor:
            self.first = self.other
            return self.first(x.flatten(1))

    model = Exchanges().eval()
    first = model.first
    attack = fastadv.PGD(model, steps=1, engine="compiled", precision="fp32")
    attack(X[..., :8, :8], Y)
    assert attack.last.engine == "compiled"
    assert model.first is first is not model.other


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_buffers_of_scripted_parts_are_kept() -> None:
    part = torch.jit.script(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
    model = nn.Sequential(part, nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for train_mode in (False, True):
        fastadv.PGD(model, steps=1, train_mode=train_mode)(X, Y)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
