"""The copy is proven at every use: whatever switches a model, the next attack is on what it has become."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attack_helpers import (
    digits_test,
    images,
    randomise,
    trained_small_cnn,
)
from changing_models import SWITCHES, Switched
from foreign_models import Pooled, conv
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import fastadv
from fastadv.engine import proof
from fastadv.engine.precision import fast_bf16

needs_bf16 = pytest.mark.skipif(
    not fast_bf16(torch.device("cpu")), reason="a processor with fast bfloat16"
)

pytestmark = pytest.mark.usefixtures("one_thread")

Y = torch.arange(8) % 4


def gradient(attack: fastadv.PGD, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The gradient of the cross-entropy that the attack's engine would use."""
    engine = attack.engine_for(x)
    with engine.session(model, 0):
        found = engine.gradient(engine.images(x), lambda z: F.cross_entropy(z, y, reduction="none"))
        return found.grad.float().clone()


def live_gradient(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(F.cross_entropy(model(leaf), y, reduction="sum"), leaf)
    return grad


def worst_cosine(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a.double().flatten(1), b.double().flatten(1)).min())


@pytest.mark.covering(
    facts=lambda given: {given["precision"], (given["switch"], given["precision"] == "bf16")}
)
@pytest.mark.parametrize("precision", ["auto", "bf16", "fp32"])
@pytest.mark.parametrize("switch", SWITCHES)
def test_what_switches_a_model_is_seen(switch: str, precision: str) -> None:
    torch.manual_seed(0)
    model, x = randomise(Switched()), images(8)
    engine = "compiled" if precision != "auto" else "auto"
    attack = fastadv.PGD(model, precision=precision, engine=engine)
    for _ in range(3):  # so often that the engine knows the model by heart
        before = gradient(attack, model, x, Y)
    turn, undo = SWITCHES[switch]
    handle = turn(model)
    try:
        wanted = live_gradient(model.eval(), x, Y)
        found = gradient(attack, model, x, Y)
    finally:
        undo(handle)
    assert worst_cosine(found, wanted) > 0.95
    assert worst_cosine(before, wanted) < 0.95  # the switch matters


def test_a_model_that_alternates_between_two_forms_keeps_both_copies() -> None:
    model, x = randomise(Switched()), images(8)
    attack = fastadv.PGD(model, precision="bf16")
    first = attack.engine_for(x)
    model.config.inner["names"].add("inverted")
    second = attack.engine_for(x)
    model.config.inner["names"].clear()
    assert second is not first and attack.engine_for(x) is first


def test_a_forward_that_counts_its_calls_keeps_its_engine() -> None:
    model, x = randomise(Switched()), images(8)
    attack = fastadv.PGD(model, steps=1, precision="bf16", engine="fixed")
    engine = attack.engine_for(x)
    for _ in range(4):
        attack(x, Y)
        model(x)
    assert attack.engine_for(x) is engine and model.count == 4


@pytest.mark.parametrize("check_inputs", [True, False])
def test_a_batch_with_nan_changes_nothing_for_the_next(check_inputs: bool) -> None:
    model, (x, y) = trained_small_cnn(), digits_test(8)
    attack = fastadv.PGD(model, steps=2, check_inputs=check_inputs, seed=0)
    bad = x.clone()
    bad[0, 0, 0, 0] = torch.nan
    if check_inputs:
        with pytest.raises(ValueError, match="x must be finite"):
            attack(bad, y)
    else:
        attack(bad, y)
    fresh = fastadv.PGD(model, steps=2, seed=0)
    assert torch.equal(attack(x, y), fresh(x, y))
    assert attack.last.engine == fresh.last.engine


def test_weights_that_are_not_finite_leave_no_engine_behind() -> None:
    model, (x, y) = trained_small_cnn(), digits_test(8)
    weight = model.conv2.weight.detach().clone()
    attack = fastadv.PGD(model, steps=2, seed=0)
    with torch.no_grad():
        model.conv2.weight.fill_(torch.nan)
    attack(x, y)
    with torch.no_grad():
        model.conv2.weight.copy_(weight)
    fresh = fastadv.PGD(model, steps=2, seed=0)
    assert torch.equal(attack(x, y), fresh(x, y)) and attack.last.engine == fresh.last.engine


def test_logits_that_part_from_the_live_ones_lead_to_a_new_copy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As if a kernel were at fault: operations and weights are the model's, the logits are not."""
    model, (x, y) = trained_small_cnn(), digits_test(8)
    attack = fastadv.PGD(model, steps=2, precision="bf16", seed=0)
    first = attack.engine_for(x)
    with torch.no_grad():
        next(model.parameters()).mul_(1.1)  # so that the proof is due again
    expected = fastadv.PGD(model, steps=2, precision="bf16", seed=0)(x, y)
    monkeypatch.setattr(first, "logits", lambda x: torch.zeros(len(x), 10))
    assert attack.engine_for(x) is not first
    assert torch.equal(attack(x, y), expected)


def test_logits_of_an_image_next_to_the_boundary_are_not_held_against_the_copy() -> None:
    live = torch.tensor([[0.2078, 0.2075], [1.0, -1.0]])
    assert proof.difference_of_logits(live + torch.tensor([0.005, 0.0]), live, "bf16") is None
    other = torch.tensor([[0.2078, 0.2075], [-1.0, 1.0]])
    assert proof.difference_of_logits(other, live, "bf16") is not None


@needs_bf16
def test_a_precision_that_parts_again_and_again_gives_way_to_a_wider_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, (x, y) = trained_small_cnn(), digits_test(8)
    attack = fastadv.PGD(model, steps=2)
    for _ in range(2):
        engine = attack.engine_for(x)
        assert engine.precision == "bf16"
        monkeypatch.setattr(engine, "logits", lambda x: torch.zeros(len(x), 10))
        with torch.no_grad():
            next(model.parameters()).mul_(1.1)  # so that the proof is due again
    attack(x, y)
    assert attack.last.precision == "fp32" and "parted from it in use" in attack.last.reason


@needs_bf16
def test_a_precision_whose_gradients_are_others_gives_way_to_a_wider_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(proof.COSINES, "bf16", 1.1)
    model, (x, y) = trained_small_cnn(), digits_test(8)
    attack = fastadv.PGD(model, steps=2)
    attack(x, y)
    assert attack.last.precision == "fp32" and attack.last.engine == "compiled"
    assert "in bf16 the gradient's cosine" in attack.last.reason
    asked = fastadv.PGD(model, steps=2, precision="bf16")
    with pytest.warns(UserWarning, match="attacks in fp32"):
        asked(x, y)
    monkeypatch.setitem(proof.COSINES, "fp32", 1.1)
    with pytest.warns(UserWarning, match="eager engine: in fp32 the gradient's cosine"):
        fastadv.PGD(model, steps=2)(x, y)
    with pytest.raises(ValueError, match="got 'compiled': in fp32 the gradient's cosine"):
        fastadv.PGD(model, engine="compiled")(x, y)


class Deep(nn.Module):
    """A plain stack of rough layers, through which bfloat16 loses the gradient."""

    def __init__(self, depth: int = 60) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1)]
        for _ in range(depth):
            layers += [nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
        self.body, self.fc = nn.Sequential(*layers), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x).mean((2, 3)))


@pytest.mark.slow
def test_gradients_of_a_rough_network_are_the_networks() -> None:
    torch.manual_seed(0)
    model, x = Deep(), images(8)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    model.train()(x)
    attack = fastadv.PGD(model.eval())
    assert worst_cosine(gradient(attack, model, x, Y), live_gradient(model, x, Y)) > 0.7


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_images_without_any_gradient_are_attacked_by_the_copy(batch: int) -> None:
    """Such images tell nothing about gradients; that alone is no reason for a slow engine."""
    model = Pooled(conv(3, 8), nn.ReLU())
    with torch.no_grad():
        model.body[0].bias.fill_(-1.0)
    attack = fastadv.PGD(model, precision="bf16", steps=1, random_start=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fastadv attacks this model with the eager engine")
        warnings.filterwarnings("ignore", message="the model's gradient in x is zero everywhere")
        for _ in range(2):
            attack(torch.zeros(batch, 3, 8, 8), Y[:batch])
    assert attack.last.engine == "compiled"


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_one_image_through_instance_norm(precision: str) -> None:
    """torch itself misreads a channels-last gradient there; a copy must not inherit that."""
    torch.manual_seed(0)
    model = randomise(Pooled(conv(3, 8), nn.InstanceNorm2d(8, affine=True), nn.GELU(), conv(8, 8)))
    attack = fastadv.PGD(model, engine="compiled", precision=precision)
    for seed in range(4):
        x = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        wanted = live_gradient(copy.deepcopy(model).eval().double(), x.double(), Y[:1])
        assert worst_cosine(gradient(attack, model, x, Y[:1]), wanted) > 0.95
        assert attack.engine_for(x).name == "compiled"


def test_the_first_use_of_an_engine_finds_what_later_uses_find() -> None:
    """With one seed the first call and the next give the same images, whatever precision is right for them."""
    torch.manual_seed(0)
    for seed in range(6):
        model = randomise(Pooled(conv(3, 8), nn.BatchNorm2d(8), nn.GELU(), *(conv(8, 8),) * 6))
        x = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        attack = fastadv.PGD(model, steps=2, seed=0)
        first = attack.engine_for(x)
        assert torch.equal(attack(x, Y), attack(x, Y)) and attack.engine_for(x) is first


@pytest.mark.parametrize("spoil", [0.0, torch.nan, torch.inf])
def test_a_gradient_lost_for_one_image_is_a_difference(spoil: float) -> None:
    live = proof.InputGradient(torch.zeros(3), torch.randn(3, 4), torch.randn(3, 2, 5, 5))
    found = proof.InputGradient(live.value, live.logits, live.grad.clone())
    assert proof.difference(found, live, "bf16") is None
    found.grad[1] = spoil
    assert "cosine" in str(proof.difference(found, live, "bf16"))
    live.grad[1] = 0  # an image without a gradient tells nothing
    assert proof.difference(found, live, "bf16") is None


class Reads(TorchFunctionMode):
    """Lists the reads of a block, for each of which the host waits on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        by_mask = name == "__getitem__" and isinstance(args[1], Tensor)
        if by_mask or name in ("item", "tolist", "__bool__", "__float__", "__int__"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("spoil", [1.0, 1.5, -1.0, torch.nan])
@pytest.mark.parametrize("of", ["logits", "grad"])
def test_a_comparison_reads_values_once(of: str, spoil: float) -> None:
    draws = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, generator=draws)
    grad = torch.randn(3, 2, 5, 5, generator=draws)
    live = proof.InputGradient(torch.zeros(3), logits, grad)
    changed = {"logits": logits.clone(), "grad": grad.clone()}
    changed[of][1] *= spoil
    with Reads() as reads:
        fault = proof.difference(proof.InputGradient(live.value, **changed), live, "bf16")
    assert reads.names == ["tolist"]
    right = spoil == 1.0 or (spoil == 1.5 and of == "grad")  # gradients are compared by direction
    assert (fault is None) == right, fault


class NearlyEqualMaxima(nn.Module):
    """Each class has a maximum of its own over places that are nearly alike."""

    def __init__(self, classes: int = 200) -> None:
        super().__init__()
        self.places = nn.Conv2d(3, classes, 3, padding=1)
        self.gain = 1e-2

    def forward(self, x: Tensor) -> Tensor:
        return self.places(0.5 + self.gain * x).flatten(2).amax(2)


@needs_bf16
def test_the_gradient_of_two_classes_is_compared_as_well() -> None:
    """Over many classes wrong maxima average out; an attack follows few of them."""
    torch.manual_seed(0)
    model, x, y = NearlyEqualMaxima(), images(8), torch.arange(8)
    attack = fastadv.PGD(model)
    wanted = live_gradient(model.eval(), x, y)
    assert worst_cosine(gradient(attack, model, x, y), wanted) > 0.99
    assert "bf16" in attack.engine_for(x).reason and attack.engine_for(x).precision == "fp32"


def test_images_that_take_turns_show_both_gradients() -> None:
    logits = torch.randn(5, 7, requires_grad=True)
    (both,) = proof.objectives(logits, in_turn=True)
    (found,) = torch.autograd.grad(both(logits).sum(), logits)
    of_all, of_two = (
        torch.autograd.grad(value(logits).sum(), logits)[0] for value in proof.objectives(logits)
    )
    assert torch.equal(found[::2], of_all[::2]) and torch.equal(found[1::2], of_two[1::2])
