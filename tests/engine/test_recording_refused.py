"""What a recording refuses, and in which words: such a model is attacked as it is, by the eager engine."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from attack_helpers import images, randomise
from foreign_models import Pooled, conv
from test_engine_proof import gradient, live_gradient, worst_cosine
from test_engine_recording import Written, in_autocast
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastadv
from fastadv.models import small_cnn

pytestmark = pytest.mark.usefixtures("one_thread")

Y = torch.arange(8) % 4


def alternates(m: Any, x: Tensor) -> Tensor:
    m.calls += 1
    return m.net(x if m.calls % 2 else x.flip(3))


def test_a_model_that_acts_on_the_number_of_its_calls_runs_live() -> None:
    with pytest.warns(UserWarning, match="change from call to call"):
        fastadv.PGD(Written(alternates, calls=0), steps=1)(images(4), Y[:4])


@pytest.mark.parametrize("precision", ["auto", "fp32"])
def test_lazy_modules_must_have_their_weights(precision: str) -> None:
    model = nn.Sequential(nn.LazyConv2d(8, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4))
    attack = fastadv.PGD(model, steps=1, precision=precision)
    with pytest.raises(ValueError, match=r"'0.weight' without a shape; call the model once"):
        attack(images(4), Y[:4])
    model(images(1))
    attack(images(4), Y[:4])


class PythonsRandom:
    def __init__(self) -> None:
        self.rng = random.Random(0)


FLIPS: dict[str, tuple[Callable[[Any], float], dict[str, Any]]] = {
    "Python's random": (lambda m: random.random(), {}),
    "numpy's random": (lambda m: np.random.rand(), {}),
    "an own random.Random": (lambda m: m.holder.rng.random(), {"holder": PythonsRandom()}),
    "an own numpy generator": (lambda m: m.rng.random(), {"rng": np.random.default_rng(0)}),
    "an own RandomState": (lambda m: m.rng.rand(), {"rng": np.random.RandomState(0)}),
    "the system's": (lambda m: random.SystemRandom().random(), {}),
    "torch": (lambda m: float(torch.rand(())), {}),
    "an own torch generator": (
        lambda m: float(torch.rand((), generator=m.rng)),
        {"rng": torch.Generator()},
    ),
}


@pytest.mark.parametrize("name", FLIPS)
def test_a_random_defence_is_attacked_as_it_is_and_says_so(name: str) -> None:
    draw, attributes = FLIPS[name]
    seen: list[bool] = []

    def forward(m: Any, x: Tensor) -> Tensor:
        seen.append(draw(m) < 0.5)
        return m.net(x.flip(3) if seen[-1] else x)

    for seed in range(4):
        random.seed(seed), np.random.seed(seed)
        model = randomise(Written(forward, **attributes))
        attack = fastadv.PGD(model, steps=10, random_start=False)
        with pytest.warns(UserWarning, match=r"eager engine: .*draws random numbers"):
            attack(images(4), Y[:4])
        assert len(set(seen[-10:])) == 2  # both draws, within one attack


def test_random_layers_of_torch_are_seen_and_dropout_of_eval_mode_is_none() -> None:
    noisy = Written(lambda m, x: m.net(x + 0.1 * torch.randn_like(x)))
    dropping = Written(lambda m, x: m.net(F.dropout(x, 0.5)))
    gumbel = Written(lambda m, x: F.gumbel_softmax(m.net(x)))
    for model in (noisy, dropping, gumbel):
        with pytest.warns(UserWarning, match="draws random numbers"):
            fastadv.PGD(model, steps=1)(images(4), Y[:4])
    quiet = Written(lambda m, x: m.net(F.dropout(x, 0.5, m.training)))
    attack = fastadv.PGD(quiet, steps=1, precision="bf16")
    attack(images(4), Y[:4])
    assert attack.last.engine == "compiled"


def scripted() -> nn.Module:
    return torch.jit.script(nn.Sequential(conv(3, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten()))


def writes_buffer(m: Any, x: Tensor) -> Tensor:
    m.mean.mul_(0.9)
    return m.net(x - m.mean)


def exchanges_data(m: Any, x: Tensor) -> Tensor:
    x = x * 1
    x.data = x.data.clamp(0.2, 0.8)
    return m.net(x)


def clamps_data(m: Any, x: Tensor) -> Tensor:
    x = x * 1
    x.data.clamp_(0.2, 0.8)
    return m.net(x)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "scripted": (scripted, "cannot be seen"),
    "scripted part": (lambda: nn.Sequential(nn.Identity(), scripted()), "cannot be seen"),
    "reads the images": (
        lambda: Written(lambda m, x: m.net(x if x.mean() > 0.1 else 1 - x)),
        "looks at values",
    ),
    "through numpy": (
        lambda: Written(lambda m, x: m.net(torch.from_numpy(x.detach().numpy() + 0) + x)),
        "looks at values",
    ),
    "writes into a buffer": (lambda: Written(writes_buffer), "writes into the model's own"),
    "data exchanged": (lambda: Written(exchanges_data), "exchanges the data"),
    "data written": (lambda: Written(clamps_data), "changes part of a tensor in place"),
    "code handed to an autograd function": (
        lambda: Written(
            lambda m, x: m.net.fc(checkpoint(m.net.body, x, use_reentrant=True).mean((2, 3)))
        ),
        "hands code of its own",
    ),
    "gradients of its own": (
        lambda: Written(
            lambda m, x: (
                m.net(x) + torch.autograd.grad(m.net(x).sum(), x, create_graph=True)[0].sum()
            )
        ),
        "gradients of its own",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_copied_runs_live_and_is_said(name: str) -> None:
    torch.manual_seed(0)
    make, reason = REFUSED[name]
    model, x = make().eval(), images(4)
    attack = fastadv.PGD(model, steps=2)
    with pytest.warns(UserWarning, match=f"eager engine: .*{reason}"):
        attack(x, Y[:4])
    leaf = x.clone().requires_grad_()
    F.cross_entropy(model(leaf), Y[:4], reduction="sum").backward()
    assert leaf.grad is not None
    assert worst_cosine(gradient(attack, model, x, Y[:4]), leaf.grad) > 0.9
    with pytest.raises(ValueError, match=f"got 'compiled': .*{reason}"):
        fastadv.PGD(model, engine="compiled")(x, Y[:4])


def test_a_quantisation_aware_model_is_attacked_and_its_observers_left_alone() -> None:
    torch.manual_seed(0)
    from torch.ao.quantization import FakeQuantize

    model = nn.Sequential(FakeQuantize(), Pooled(conv(3, 8), nn.ReLU()))
    x = images(8)
    model(x)
    before = {name: value.clone() for name, value in model.named_buffers()}
    with pytest.warns(UserWarning, match="eager engine"):
        fastadv.PGD(model.eval(), steps=2)(x * 0.5, Y)
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())


def test_autocast_within_the_forward_equals_the_plain_loop_in_fp32() -> None:
    torch.manual_seed(0)
    model, x = randomise(Written(in_autocast)), images(8)
    found = gradient(fastadv.PGD(model, precision="fp32"), model, x, Y)
    assert torch.equal(found, live_gradient(model, x, Y))
    with pytest.raises(ValueError, match="got 'compiled': its forward enters autocast"):
        fastadv.PGD(model, precision="fp32", engine="compiled")(x, Y)


@pytest.mark.parametrize("engine", ["auto", "compiled"])
def test_images_in_a_dtype_that_the_model_does_not_take_are_named(engine: str) -> None:
    model, x = small_cnn(4, 3), images(4)
    words = r"x must have a dtype that the model takes.*float32, got torch.float64"
    with pytest.raises(TypeError, match=words):
        fastadv.PGD(model, steps=1, engine=engine)(x.double(), Y[:4])
    casts = Written(lambda m, x: m.net(x.float()))
    adv = fastadv.PGD(casts, steps=1, engine=engine)(x.double(), Y[:4])
    assert adv.dtype == torch.float64 and (adv != x).any()
