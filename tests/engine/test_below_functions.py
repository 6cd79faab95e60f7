"""What acts below the functions of torch that a recording sees, or begins to act after attacks by a copy."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attack_helpers import cross_entropy, images, plain_pgd, randomise
from foreign_models import Pooled, conv
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

import fastadv

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:fastadv attacks this model with the eager engine"),
]

X, Y = images(4), torch.arange(4) % 4


class Switched(nn.Module):
    """A network that hands its features to a function, with the word whether it is switched on.

    Where it is, the function calls the same functions of torch, and something else is added out of their sight.
    """

    def __init__(self, change: Callable[[Tensor, bool], Tensor]) -> None:
        super().__init__()
        self.net = randomise(Pooled(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 8)))
        self.change, self.on = change, False

    def forward(self, x: Tensor) -> Tensor:
        h = self.change(self.net.body(x) * 1, self.on)
        return self.net.fc(F.relu(h + 0.5 * torch.tanh(h.flip(2))).mean((2, 3)))


class Negated(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return -out if func is torch.ops.aten.mul.Tensor else out


def turned(tensor: Tensor) -> Tensor:
    return tensor.flip(-1) if tensor.dim() == 4 else tensor


def kept(tensor: Tensor, on: bool = False) -> Tensor:
    return tensor


def in_a_mode(h: Tensor, on: bool) -> Tensor:
    with Negated() if on else nullcontext():
        return h * 2


def with_hooks(h: Tensor, on: bool) -> Tensor:
    with saved_tensors_hooks(kept, turned) if on else nullcontext():
        return h * h * h


def written_out_of_sight(h: Tensor, on: bool) -> Tensor:
    """As code in C++ does."""
    if on:
        with torch._C.DisableTorchFunction():
            h.mul_(-1)
    return h


class Reversing(torch.autograd.Function):
    """Writes into its argument, and turns the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return -grads[0]


def by_an_autograd_function(h: Tensor, on: bool) -> Tensor:
    if on:
        Reversing.apply(h)
    return h


def cut(h: Tensor, on: bool) -> Tensor:
    squashed = torch.tanh(h)
    if on:
        squashed.detach_()
    return h.flip(3) - squashed


def written_in_inference_mode(h: Tensor, on: bool) -> Tensor:
    """As a purifier whose result goes straight through."""
    with torch.inference_mode():
        squashed = torch.tanh(h)
        squashed.clamp_(-9, 0 if on else 9)
    return 0.3 * h * squashed.clone()


CHANGES = {
    "a mode": in_a_mode,
    "hooks of saved tensors": with_hooks,
    "a write out of sight": written_out_of_sight,
    "an autograd function that writes": by_an_autograd_function,
    "a gradient cut in place": cut,
    "another write in inference mode": written_in_inference_mode,
}


def check(attack: fastadv.PGD, model: nn.Module, x: Tensor = X) -> None:
    """Compare one attack with the plain loop, if the engine asked for can run."""
    wanted = plain_pgd(model.eval(), x, Y, x, eps=0.02, alpha=0.01, steps=2, loss=cross_entropy)
    try:
        found = attack(x, Y)
    except ValueError as error:
        assert "got 'compiled'" in str(error)
        return
    one, other = (found - x).flatten(), (wanted - x).flatten()
    assert float(F.cosine_similarity(one, other, 0)) > 0.98, attack.last.reason


def attack_on(model: nn.Module, engine: Any) -> fastadv.PGD:
    return fastadv.PGD(
        model,
        eps=0.02,
        alpha=0.01,
        steps=2,
        random_start=False,
        engine=engine,
        precision=PRECISIONS[engine],
    )


PRECISIONS: Any = {"auto": "auto", "fixed": "auto", "compiled": "fp32"}


@pytest.mark.parametrize("engine", PRECISIONS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_that_no_function_of_torch_shows_is_attacked(
    change: str, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastadv.engine.selection.fast_bf16", lambda device: False)
    model = Switched(CHANGES[change])
    attack = attack_on(model, engine)
    for model.on in (False, False, True, True, False):
        check(attack, model)


@pytest.mark.parametrize("engine", PRECISIONS)
def test_the_callers_hooks_of_saved_tensors_are_attacked_with_the_model(engine: Any) -> None:
    model = Switched(kept)
    attack = attack_on(model, engine)
    attack(X, Y)
    before = attack.last.engine
    with saved_tensors_hooks(kept, turned):
        check(attack, model)
        with pytest.raises(ValueError, match="saved_tensors_hooks"):
            attack_on(model, "compiled")(X, Y)
    with save_on_cpu():  # which changes nothing
        attack(X, Y)
    assert attack.last.engine == before


@torch.library.custom_op("fastadv_tests::bright_pixels", mutates_args=())
def bright_pixels(x: Tensor) -> int:
    return int((x > 0.97).sum())


@torch.jit.script
def alarm(x: Tensor) -> Tensor:
    return (x.amax() > 0.97).float().view(1)


def by_an_operator(x: Tensor) -> Tensor:
    return x.flip(3) if torch.ops.fastadv_tests.bright_pixels(x) else x


def by_a_scripted_detector(x: Tensor) -> Tensor:
    with torch.no_grad():
        found = alarm(x)
    return x * (1 - found) + x.flip(3) * found


def by_an_overload(x: Tensor) -> Tensor:
    return x.flip(3) if torch.ops.aten._local_scalar_dense.default(x.amax()) > 0.97 else x


def by_an_overloads_size(x: Tensor) -> Tensor:
    return x.flip(3) if torch.ops.aten.nonzero.default(x > 0.97).size(0) else x


DECISIONS = (by_an_operator, by_a_scripted_detector, by_an_overload, by_an_overloads_size)


@pytest.mark.parametrize("engine", PRECISIONS)
@pytest.mark.parametrize("decide", DECISIONS)
def test_a_decision_that_falls_otherwise_for_attacked_images_is_not_copied(
    decide: Callable[[Tensor], Tensor], engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decision is the same for all images until the attack has moved them."""
    monkeypatch.setattr("fastadv.engine.selection.fast_bf16", lambda device: False)
    model = nn.Sequential(Decided(decide), Switched(kept))
    check(attack_on(model, engine), model, 0.965 * X / X.amax((1, 2, 3), keepdim=True))


class Decided(nn.Module):
    def __init__(self, decide: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.decide = decide

    def forward(self, x: Tensor) -> Tensor:
        return self.decide(x)


class Asks(Switched):
    """Gives other logits without gradients once it is switched on."""

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return -logits if self.on and not torch.is_grad_enabled() else logits


@pytest.mark.parametrize("engine", ["auto", "compiled"])
@pytest.mark.parametrize("new_weights", [False, True])
def test_a_model_that_begins_to_ask_for_gradients_is_seen(engine: Any, new_weights: bool) -> None:
    model = Asks(kept).eval()
    attack = fastadv.Square(model, queries=12, eps=0.1, engine=engine, precision="bf16", seed=0)
    plain = fastadv.Square(model, queries=12, eps=0.1, engine="eager", precision="fp32", seed=0)
    attack(X, Y)
    attack(X, Y)
    model.on = True
    if new_weights:
        with torch.no_grad():
            model.net.fc.weight.mul_(-1)
    if engine == "compiled":
        with pytest.raises(ValueError, match="others where no gradients are computed"):
            attack(X, Y)
        return
    found, wanted = attack(X, Y), plain(X, Y)
    assert attack.last.engine == "eager"
    assert attack.last.precision != "fp32" or torch.equal(found, wanted)


class AsksForLayout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Switched(kept)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x if x.is_contiguous() else x.flip(3) * 0.9)


@pytest.mark.parametrize("engine", ["fixed", "compiled"])
def test_images_in_another_layout_of_memory_are_proven_anew(engine: Any) -> None:
    model, other = AsksForLayout(), X.contiguous(memory_format=torch.channels_last)
    attack = fastadv.FGSM(model, eps=0.01, engine=engine, precision=PRECISIONS[engine])
    for x in (X, X, other, other, X):
        leaf = x.clone().requires_grad_()
        F.cross_entropy(model.eval()(leaf), Y, reduction="sum").backward()
        assert leaf.grad is not None
        moved = attack(x, Y) - x
        cosine = F.cosine_similarity(moved.flatten(), leaf.grad.sign().flatten(), 0)
        assert float(cosine) > 0.98
