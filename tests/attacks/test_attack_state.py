"""An attack leaves the model, its gradients and the random state as they were, also when it fails."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attack_helpers import assert_same_state, digits_test, images, state_of, trained_small_cnn
from torch import Tensor, nn

import fastadv
from fastadv.engine.networks import depends_on_mode

pytestmark = pytest.mark.usefixtures("one_thread")

WAYS: dict[str, dict[str, Any]] = {
    "eager fp32": {"engine": "eager", "precision": "fp32"},
    "eager bf16": {"engine": "eager", "precision": "bf16"},
    "compiled fp32": {"engine": "compiled", "precision": "fp32"},
    "compiled bf16": {"engine": "compiled", "precision": "bf16"},
    "train mode": {"engine": "eager", "precision": "fp32", "train_mode": True},
}
LOSSES = {
    "ce": {},
    "kl": {"loss": "kl"},
    "restarts": {"restarts": 2},
    "best": {"keep": "best"},
    "l2": {"norm": "l2"},
}


class WithDropout(nn.Module):
    """The trained network behind a dropout, which draws random numbers in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.2)
        self.net = trained_small_cnn()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.dropout(x))


def unsettled_model() -> nn.Module:
    """A model whose modules, parameters and gradients are in different states."""
    model = WithDropout().train()
    net = model.net
    net.bn2.eval()
    net.conv1.weight.requires_grad_(False)
    net.linear.bias.grad = None
    net.conv2.weight.grad = torch.full_like(net.conv2.weight, 0.5)
    return model


@pytest.mark.parametrize("options", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("way", WAYS)
def test_model_and_random_state_are_as_before(way: str, options: dict[str, Any]) -> None:
    model, (x, y) = unsettled_model(), digits_test(8)
    images_before, labels_before = x.clone(), y.clone()
    before = state_of(model)
    fastadv.pgd_fused(model, x, y, steps=3, seed=1, **WAYS[way], **options)
    assert_same_state(state_of(model), before)
    assert torch.equal(x, images_before) and torch.equal(y, labels_before)


@pytest.mark.parametrize("way", WAYS)
def test_all_is_as_before_when_the_loss_raises_midway(way: str) -> None:
    model, (x, y) = unsettled_model(), digits_test(8)
    calls = []

    def failing_loss(logits: Tensor, labels: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise ArithmeticError("the second call")
        return F.cross_entropy(logits, labels)

    before = state_of(model)
    with pytest.raises(ArithmeticError, match="the second call"):
        fastadv.pgd_fused(model, x, y, steps=3, seed=1, loss=failing_loss, **WAYS[way])
    assert_same_state(state_of(model), before)
    fastadv.pgd_fused(model, x, y, steps=3, seed=1, **WAYS[way])  # and the engine still works


class FailsLater(nn.Module):
    """Raises at its second forward pass, after BatchNorm has changed its statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.net = unsettled_model()
        self.calls: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(1)
        logits = self.net(x)
        if len(self.calls) == 2:
            raise ArithmeticError("the second pass")
        return logits


@pytest.mark.parametrize("way", ["eager fp32", "eager bf16", "train mode"])
def test_all_is_as_before_when_the_model_raises_midway(way: str) -> None:
    model, (x, y) = FailsLater(), digits_test(8)
    before = state_of(model)
    with pytest.raises(ArithmeticError, match="the second pass"):
        fastadv.pgd_fused(model, x, y, steps=3, seed=1, **WAYS[way])
    assert_same_state(state_of(model), before)


@pytest.mark.parametrize("way", WAYS)
def test_all_is_as_before_when_the_batch_is_refused(way: str) -> None:
    model, (x, y) = unsettled_model(), digits_test(8)
    before = state_of(model)
    with pytest.raises(ValueError, match="x must be finite"):
        fastadv.pgd_fused(model, x * 2, y, steps=3, seed=1, **WAYS[way])
    assert_same_state(state_of(model), before)


class CountsItsImages(nn.Module):
    """A model with buffers of its own that change in eval mode: one in place, one replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.net = trained_small_cnn()
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(1, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return self.net(x)


@pytest.mark.parametrize("train_mode", [False, True])
def test_buffers_that_change_in_eval_mode_are_put_back(train_mode: bool) -> None:
    model, (x, y) = CountsItsImages(), digits_test(8)
    before = state_of(model)
    fastadv.pgd_fused(
        model, x, y, steps=2, seed=1, engine="eager", precision="fp32", train_mode=train_mode
    )
    assert_same_state(state_of(model), before)


class RemembersItsFeatures(nn.Module):
    """Keeps the last features as an attribute, as much published code does."""

    def __init__(self) -> None:
        super().__init__()
        self.net = trained_small_cnn()
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.net.forward_features(x)
        return self.net.forward_head(self.last)


def test_making_a_copy_leaves_no_trace_in_the_models_attributes() -> None:
    model, (x, y) = RemembersItsFeatures().eval(), digits_test(8)
    with torch.no_grad():
        model(x)
    remembered = model.last
    fastadv.pgd_fused(model, x, y, steps=2, seed=1, precision="bf16")
    assert model.last is remembered


class NormalisesByAView(nn.Module):
    """Reshapes its statistics in the forward pass; tracing meets a tensor that nobody has registered."""

    def __init__(self) -> None:
        super().__init__()
        self.net = trained_small_cnn()
        self.register_buffer("mean", torch.tensor([0.3]))
        self.register_buffer("std", torch.tensor([0.4]))

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x - self.mean[None, :, None, None]) / self.std.view(1, -1, 1, 1))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_making_a_copy_adds_no_attribute(precision: str) -> None:
    model, (x, y) = NormalisesByAView(), digits_test(8)
    before = state_of(model)
    fastadv.pgd_fused(model, x, y, steps=2, seed=1, precision=precision, engine="compiled")
    assert_same_state(state_of(model), before)


class DrawsNoise(nn.Module):
    """A randomised defence: noise on the images in eval mode too."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.net = trained_small_cnn()
        self.shared = shared

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.randn(1) if self.shared else torch.randn_like(x)
        return self.net(x + 0.1 * noise)


@pytest.mark.parametrize("shared", [False, True], ids=["noise per pixel", "one number"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.filterwarnings("ignore:fastadv attacks this model with the eager engine")
def test_a_model_that_draws_random_numbers_follows_the_seed(shared: bool, precision: str) -> None:
    model, (x, y) = DrawsNoise(shared).eval(), digits_test(8)
    before = state_of(model)
    options = dict(steps=3, precision=precision, random_start=False)
    first = fastadv.pgd_fused(model, x, y, seed=1, **options)
    assert_same_state(state_of(model), before)
    torch.rand(3)
    assert torch.equal(fastadv.pgd_fused(model, x, y, seed=1, **options), first)
    assert not torch.equal(fastadv.pgd_fused(model, x, y, seed=2, **options), first)


@pytest.mark.filterwarnings("ignore:fastadv attacks this model with the eager engine")
@pytest.mark.filterwarnings("ignore:.*steps:UserWarning")
def test_a_model_that_draws_random_numbers_draws_new_ones_at_every_step() -> None:
    model, (x, y) = DrawsNoise(shared=True).eval(), digits_test(8)
    seen: list[float] = []

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        seen.append(float(logits.detach().sum()))
        return F.cross_entropy(logits, labels)

    # With steps as small as this the images stay, so that only new noise makes the logits differ.
    fastadv.pgd_fused(model, x, y, alpha=1e-12, steps=4, seed=1, loss=loss, precision="bf16")
    assert len(set(seen)) == 4


@pytest.mark.parametrize("way", WAYS)
def test_dropout_in_train_mode_follows_the_seed(way: str) -> None:
    model, (x, y) = WithDropout(), digits_test(8)
    options = dict(steps=3, random_start=False, **WAYS[way])
    adv = [fastadv.pgd_fused(model, x, y, seed=seed, **options) for seed in (1, 1, 2)]
    assert torch.equal(adv[0], adv[1])
    assert torch.equal(adv[0], adv[2]) == (way != "train mode")  # in eval mode nothing is dropped


CONTEXTS: dict[str, AbstractContextManager[Any]] = {
    "no_grad": torch.no_grad(),
    "inference_mode": torch.inference_mode(),
    "enable_grad": torch.enable_grad(),
    "autocast": torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("context", CONTEXTS)
def test_the_callers_context_does_not_change_the_result(context: str, way: str) -> None:
    x, y = digits_test(8)
    expected = fastadv.pgd_fused(trained_small_cnn(), x, y, steps=3, seed=1, **WAYS[way])
    model = trained_small_cnn()
    with CONTEXTS[context]:
        adv = fastadv.pgd_fused(model, x.clone(), y.clone(), steps=3, seed=1, **WAYS[way])
    assert torch.equal(adv, expected)
    # An engine made in that context serves outside it.
    assert torch.equal(fastadv.pgd_fused(model, x, y, steps=3, seed=1, **WAYS[way]), expected)


@pytest.mark.parametrize("random_start", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_images_that_require_grad_are_left_alone(way: str, random_start: bool) -> None:
    model, (x, y) = trained_small_cnn(), digits_test(8)
    leaf = x.clone().requires_grad_()
    options = dict(steps=2, random_start=random_start, seed=1, **WAYS[way])
    adv = fastadv.pgd_fused(model, leaf, y, **options)
    assert not adv.requires_grad and leaf.requires_grad and leaf.grad is None
    assert torch.equal(adv, fastadv.pgd_fused(model, x, y, **options))


@pytest.mark.parametrize("way", WAYS)
def test_training_goes_on_as_if_nothing_had_happened(way: str) -> None:
    """Gradients of a step that accumulates over two backward passes, with an attack between them."""
    (x, y), gradients = digits_test(8), []
    for attacked in (False, True):
        model = trained_small_cnn().train()
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        if attacked:
            fastadv.pgd_fused(model, x, y, steps=2, seed=1, **WAYS[way])
        F.cross_entropy(model(x), y).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("way", WAYS)
def test_a_graph_of_the_caller_survives_an_attack(way: str) -> None:
    """Logits computed before the attack can still be differentiated after it."""
    model, (x, y) = trained_small_cnn().train(), digits_test(8)
    logits = model(x)
    fastadv.pgd_fused(model, x, y, steps=2, seed=1, **WAYS[way])
    F.cross_entropy(
        logits, y
    ).backward()  # putting statistics back must not count as a change of them


def test_only_the_seed_is_drawn_from_the_default_generator() -> None:
    model, x, y = nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), images(4), torch.arange(4)
    torch.manual_seed(3)
    fastadv.pgd_fused(model, x, y, steps=2)
    after_attack = torch.rand(1)
    torch.manual_seed(3)
    torch.randint(0, 2**63 - 1, (), dtype=torch.int64)
    assert torch.equal(torch.rand(1), after_attack)


@pytest.mark.parametrize("kind", [nn.Dropout2d, nn.BatchNorm2d, nn.RNN, nn.MultiheadAttention])
def test_layers_that_depend_on_their_mode_are_known(kind: type[nn.Module]) -> None:
    assert depends_on_mode(kind)
    assert not any(map(depends_on_mode, (nn.Conv2d, nn.ReLU, nn.Sequential, nn.LayerNorm)))


@pytest.mark.parametrize("inside", [False, True])
def test_dropout_that_alone_is_in_train_mode_is_told_of_once(inside: bool) -> None:
    """An attack in eval mode turns it off, so that it attacks another model than the caller may think."""
    model = WithDropout().eval()
    model.dropout.train()
    x, y = images(4, 1), torch.arange(4)
    attack = fastadv.PGD(nn.Sequential(model).train() if inside else model, steps=1)
    model.eval().dropout.train()
    with pytest.warns(UserWarning, match="its 'dropout', a Dropout, is in train mode"):
        attack(x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attack(x, y)


@pytest.mark.parametrize(
    "setting", ["train mode", "train mode asked for", "frozen", "whole network"]
)
def test_modes_that_an_attack_may_well_end_are_not_told_of(setting: str) -> None:
    model = WithDropout().train()
    attacked, train_mode = model, setting == "train mode asked for"
    if setting == "frozen":
        model.dropout.eval()
    if setting == "whole network":  # of a wrapper whose network is trained
        attacked = nn.Sequential(model).eval()
        model.train()
    if train_mode:
        model.eval().dropout.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastadv.PGD(attacked, steps=1, train_mode=train_mode)(images(4, 1), torch.arange(4))
