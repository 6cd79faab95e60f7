"""The next call sees what has changed in the model since the last: weights, statistics, structure."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attack_helpers import digits_test, images, randomise, trained_small_cnn
from torch import Tensor, nn

import fastadv

pytestmark = pytest.mark.usefixtures("one_thread")

WAYS: dict[str, dict[str, Any]] = {
    "eager fp32": {"engine": "eager", "precision": "fp32"},
    "compiled fp32": {"engine": "compiled", "precision": "fp32"},
    "compiled bf16": {"engine": "compiled", "precision": "bf16"},
}
FORMS = ["function", "object"]
Attack = Callable[[Tensor, Tensor], Tensor]


def attack_on(model: nn.Module, form: str, **options: Any) -> Attack:
    """The attack as function or as object, to be called many times with one seed."""
    settings = dict(eps=0.1, alpha=0.03, steps=3, **options)
    if form == "object":
        return fastadv.PGD(model, **settings, seed=1)
    return lambda x, y: fastadv.pgd_fused(model, x, y, **settings, seed=1)


def assert_follows(
    model: nn.Module, change: Callable[[], object], way: str, form: str, x: Tensor, y: Tensor
) -> None:
    """After a change, the attack that has seen the model before gives what a fresh copy's gives."""
    attack = attack_on(model, form, **WAYS[way])
    for _ in range(3):  # so often that the engine knows the model by heart
        stale = attack(x, y)
    change()
    expected = attack_on(copy.deepcopy(model), form, **WAYS[way])(x, y)
    assert not torch.equal(expected, stale)  # the change matters
    assert torch.equal(attack(x, y), expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("way", WAYS)
def test_an_optimiser_step_is_seen(way: str, form: str) -> None:
    model, (x, y) = trained_small_cnn(), digits_test(16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)

    def change() -> None:
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    assert_follows(model, change, way, form, x, y)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("way", WAYS)
def test_statistics_of_a_training_pass_are_seen(way: str, form: str) -> None:
    model, (x, y) = trained_small_cnn(), digits_test(16)

    def change() -> None:
        with torch.no_grad():
            model.train()(1 - x)

    assert_follows(model, change, way, form, x, y)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("way", WAYS)
def test_a_loaded_state_dict_is_seen(way: str, form: str) -> None:
    model, (x, y) = trained_small_cnn(), digits_test(16)
    other = {name: 0.9 * value for name, value in model.state_dict().items()}
    assert_follows(model, lambda: model.load_state_dict(other), way, form, x, y)


class Adjustable(nn.Module):
    """A network whose forward pass depends on attributes of many kinds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.linear = nn.Linear(8, 4)
        self.inverted = False
        self.gain = 1.0
        self.mode = "plain"
        self.scales = [1.0, 1.0]
        self.activation: Callable[[Tensor], Tensor] = F.relu
        self.shift = torch.zeros(1, 3, 1, 1)  # a tensor that is neither parameter nor buffer
        self.register_buffer("offset", torch.zeros(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = 1 - x if self.inverted else x
        x = self.scales[0] * x - self.shift - self.offset
        x = self.activation(self.bn(self.conv(x)))
        x = x.amax((2, 3)) if self.mode == "max" else x.mean((2, 3))
        return self.linear(self.gain * x)


def set_to(name: str, value: Any) -> Callable[[Adjustable], object]:
    return lambda model: setattr(model, name, value)


def replace_conv(model: Adjustable) -> None:
    torch.manual_seed(1)
    model.conv = nn.Conv2d(3, 8, 5, padding=2, bias=False)


CHANGES: dict[str, Callable[[Adjustable], object]] = {
    "flag": set_to("inverted", True),
    "number": set_to("gain", -1.0),
    "word": set_to("mode", "max"),
    "item of a list": lambda model: model.scales.__setitem__(0, 0.3),
    "function": set_to("activation", torch.sigmoid),
    "plain tensor replaced": set_to("shift", torch.full((1, 3, 1, 1), 0.5)),
    "plain tensor in place": lambda model: model.shift.fill_(0.5),
    "buffer in place": lambda model: model.offset.fill_(0.5),
    "buffer replaced": set_to("offset", torch.full((1, 3, 1, 1), 0.5)),
    "module replaced": replace_conv,
    "module removed": set_to("bn", nn.Identity()),
    "stride": lambda model: setattr(model.conv, "stride", (2, 2)),
    "eps of a norm": lambda model: setattr(model.bn, "eps", 10.0),
    "wider layer": set_to("linear", nn.Linear(8, 6)),
    "forward of a layer": lambda model: setattr(model.conv, "forward", model.conv_of_half),
}
Adjustable.conv_of_half = lambda self, x: F.conv2d(x / 2, self.conv.weight, padding=1)  # type: ignore[attr-defined]


@pytest.mark.covering(
    facts=lambda given: {given["way"], (given["change"], given["way"].startswith("compiled"))}
)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_structural_change_is_seen(change: str, way: str) -> None:
    model, x, y = randomise(Adjustable()), images(8), torch.arange(8) % 4
    assert_follows(model, lambda: CHANGES[change](model), way, "object", x, y)


@pytest.mark.parametrize("form", FORMS)
def test_a_new_forward_hook_is_obeyed_on_the_copy(form: str) -> None:
    model, (x, y) = trained_small_cnn(), digits_test(16)
    attack = attack_on(model, form, precision="bf16")
    without = attack(x, y)
    handle = model.bn2.register_forward_hook(lambda module, args, out: out * 0.5)
    hooked = attack(x, y)
    live = attack_on(model, form, precision="fp32")(x, y)
    assert not torch.equal(hooked, without)
    assert ((hooked - live).abs() < 1e-4).float().mean() > 0.95
    handle.remove()
    assert torch.equal(attack(x, y), without)


BACKWARD_HOOK = "module 'conv2' has backward hooks"


def halve(module: nn.Module, before: Any, after: Any) -> Any:
    return (before[0] * 0.5,)


@pytest.mark.parametrize("form", FORMS)
def test_the_reason_for_the_eager_engine_is_given_once(form: str) -> None:
    model, (x, y) = trained_small_cnn(), digits_test(16)
    model.conv2.register_full_backward_hook(halve)
    attack = attack_on(model, form, precision="bf16")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            attack(x, y)
    assert [str(w.message) for w in caught] == [
        f"fastadv attacks this model with the eager engine: {BACKWARD_HOOK}"
    ]


def test_an_engine_that_cannot_run_the_model_is_an_error_when_asked_for() -> None:
    model, (x, y) = trained_small_cnn(), digits_test(4)
    model.conv2.register_full_backward_hook(halve)
    with pytest.raises(ValueError, match=f"engine must be .* got 'compiled': {BACKWARD_HOOK}"):
        fastadv.pgd_fused(model, x, y, engine="compiled")


@pytest.mark.parametrize("way", ["compiled fp32", "compiled bf16"])
def test_the_copy_is_made_once(way: str) -> None:
    model, (x, y) = trained_small_cnn(), digits_test(16)
    attack = fastadv.PGD(model, steps=2, **WAYS[way])
    engine = attack.engine_for(x)
    attack(x, y)
    model.train()
    with torch.no_grad():
        model.conv1.weight.mul_(0.5)
    attack(x[:5], y[:5])
    assert attack.engine_for(x) is engine


class Reshapes(nn.Module):
    """Normalises by a flat buffer that the forward pass reshapes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = trained_small_cnn()
        self.register_buffer("gain", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x / self.gain[None, :, None, None])


@pytest.mark.parametrize("way", ["compiled fp32", "compiled bf16"])
def test_the_copy_of_a_model_that_reshapes_its_buffers_is_made_once(way: str) -> None:
    model, (x, y) = Reshapes(), digits_test(8)
    attack = fastadv.PGD(model, steps=2, **WAYS[way])
    attack(x, y)
    engine = attack.engine_for(x)
    attack(x, y)
    assert attack.engine_for(x) is engine


@pytest.mark.parametrize("change", ["in place", "replaced"])
@pytest.mark.parametrize("way", WAYS)
def test_a_change_of_a_reshaped_buffer_is_seen(way: str, change: str) -> None:
    model, (x, y) = Reshapes(), digits_test(8)

    def alter() -> None:
        if change == "in place":
            model.gain.fill_(2)
        else:
            model.gain = torch.full((1,), 2.0)

    assert_follows(model, alter, way, "object", x, y)


@pytest.mark.parametrize("way", WAYS)
def test_no_model_is_kept_alive(way: str) -> None:
    model, (x, y) = trained_small_cnn(), digits_test(4)
    fastadv.pgd_fused(model, x, y, steps=1, **WAYS[way])
    alive = weakref.ref(model)
    weights = weakref.ref(model.conv2.weight)
    del model
    gc.collect()
    assert alive() is None and weights() is None


@pytest.mark.parametrize("way", WAYS)
def test_a_model_made_where_another_died_gets_its_own_engine(way: str) -> None:
    """The same address may be used again; what was known of the dead model may not."""
    x, y = images(4), torch.arange(4)
    for width in (3, 5, 3):
        torch.manual_seed(width)
        model = nn.Sequential(nn.Conv2d(3, width, 3), nn.Flatten(), nn.Linear(36 * width, 4)).eval()
        adv = attack_on(model, "function", **WAYS[way])(x, y)
        assert torch.equal(adv, attack_on(copy.deepcopy(model), "object", **WAYS[way])(x, y))
        del model
