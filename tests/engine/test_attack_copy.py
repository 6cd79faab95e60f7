"""The attack copy gives the live model's logits and gradients, for our models and other people's."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attack_helpers import copy_of, digits_test, images, randomise, refresh, trained_small_cnn
from foreign_models import COPIED, NormAct, Pooled, conv
from stubborn_models import COPIED_OR_EAGER, BranchesOnData
from torch import Tensor, nn

import fastadv
from fastadv.engine import proof
from fastadv.engine.engines import InputGradient
from fastadv.engine.layers import CopiedConv2d, CopiedLinear
from fastadv.models import Normalized, small_cnn
from fastadv.models.preact_resnet import preact_resnet18
from fastadv.models.resnet import resnet18
from fastadv.models.vgg import vgg16_bn
from fastadv.models.wide_resnet import WideResNet

pytestmark = pytest.mark.usefixtures("one_thread")

OURS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet18": (resnet18, 16),
    "preact_resnet18": (preact_resnet18, 16),
    "preact_resnet18 without its last norm": (lambda: preact_resnet18(final_norm=False), 16),
    "vgg16_bn": (vgg16_bn, 32),
    "wide_resnet": (lambda: WideResNet(10, 2, 10, 3), 16),
    "wide_resnet with dropout": (lambda: WideResNet(16, 1, 10, 3, dropout=0.3), 16),
    "small_cnn": (lambda: small_cnn(10, 3), 8),
    "normalized": (lambda: Normalized(small_cnn(10, 3), (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)), 8),
}


def made(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return randomise(make())


def gradient_of(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    logits = model(leaf)
    return torch.autograd.grad(
        F.cross_entropy(logits, torch.arange(len(x)), reduction="sum"), leaf
    )[0]


def cosine(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a.double().flatten(), b.double().flatten(), 0))


def assert_copy_equals(model: nn.Module, x: Tensor) -> None:
    """In fp32 to 1e-5 of the largest logit, and 1e-4 of the largest component of the gradient.

    Where two inputs of a max pooling are equal but for rounding, the gradient goes another way; there it is
    compared as a whole.
    """
    copied = copy_of(model.train(), x)
    model.eval()
    with torch.no_grad():
        logits, expected = copied(x), model(x)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    gradient, expected = gradient_of(copied, x), gradient_of(model, x)
    if any(isinstance(module, nn.MaxPool2d) for module in model.modules()):
        assert cosine(gradient, expected) > 1 - 1e-4
    else:
        largest = float(expected.abs().max())
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-4 * largest)
    assert not any(parameter.requires_grad for parameter in copied.parameters())


def engine_gradient(model: nn.Module, x: Tensor, **options: str) -> tuple[Tensor, Tensor]:
    """Logits and gradient of the cross-entropy, as the engine that an attack would use gives them."""
    engine = fastadv.PGD(model, **options).engine_for(x)
    y = torch.arange(len(x))
    with engine.session(model, 0):
        engine.gradient(engine.images(x), lambda z: F.cross_entropy(z, y, reduction="sum"))
        # Twice, because the second pass finds the memory of the first.
        found = engine.gradient(engine.images(x), lambda z: F.cross_entropy(z, y, reduction="sum"))
        return found.logits.clone(), found.grad.float().clone()


def assert_narrow_agrees(model: nn.Module, x: Tensor, **options: str) -> None:
    """No worse than torch's own narrow arithmetic, which random networks with many maxima suffer from."""
    logits, gradient = engine_gradient(model, x, precision="bf16", **options)
    with torch.no_grad():
        expected = model.eval()(x)
    assert (logits - expected).abs().max() <= 0.05 * expected.abs().max()
    wide = gradient_of(model, x)
    _, autocast = engine_gradient(model, x, precision="bf16", engine="eager")
    assert cosine(gradient, wide) > min(0.97, cosine(autocast, wide) - 0.03)


@pytest.mark.parametrize("name", OURS)
def test_folded_logits_of_our_models_equal_the_live_ones(name: str) -> None:
    make, size = OURS[name]
    assert_copy_equals(made(make), images(2, size=size))


@pytest.mark.parametrize("name", COPIED)
def test_folded_logits_of_foreign_models_equal_the_live_ones(name: str) -> None:
    assert_copy_equals(made(COPIED[name]), images(4))


@pytest.mark.slow
@pytest.mark.parametrize("name", OURS)
def test_bf16_agrees_with_fp32_on_our_models(name: str) -> None:
    make, size = OURS[name]
    assert_narrow_agrees(made(make), images(2, size=size), engine="compiled")


@pytest.mark.parametrize(("batch", "size"), [(1, 7), (3, 9), (2, 13), (5, 4)])
def test_bf16_agrees_with_fp32_on_odd_sizes(batch: int, size: int) -> None:
    assert_narrow_agrees(made(OURS["small_cnn"][0]), images(batch, size=size), engine="compiled")


@pytest.mark.parametrize("name", COPIED)
def test_bf16_agrees_with_fp32_on_foreign_models(name: str, poisoned_memory: None) -> None:
    assert_narrow_agrees(made(COPIED[name]), images(4), engine="compiled")


@pytest.mark.parametrize("name", COPIED_OR_EAGER)
@pytest.mark.filterwarnings("ignore:fastadv attacks this model with the eager engine")
def test_bf16_agrees_with_fp32_whatever_engine_is_chosen(name: str) -> None:
    assert_narrow_agrees(made(COPIED_OR_EAGER[name]), images(4), engine="auto")


def test_bf16_gradients_of_a_trained_net_point_the_same_way() -> None:
    """Sample by sample: on a trained net some gradients are a thousand times smaller than others."""
    model, (x, _) = trained_small_cnn(), digits_test(10)
    _, narrow = engine_gradient(model, x, precision="bf16", engine="compiled")
    wide = gradient_of(model, x)
    assert min(cosine(a, b) for a, b in zip(narrow, wide, strict=True)) > 0.97


def test_the_copy_follows_the_live_model_without_moving() -> None:
    model, x = made(OURS["preact_resnet18"][0]), images(2, size=16)
    copied = copy_of(model, x)
    addresses = [t.data_ptr() for t in (*copied.parameters(), *copied.buffers())]
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.mul_(1.1).add_(0.01)
        refresh(copied, model, x)
        expected = model(x)
        torch.testing.assert_close(
            copied(x), expected, rtol=0, atol=1e-5 * float(expected.abs().max())
        )
    assert [t.data_ptr() for t in (*copied.parameters(), *copied.buffers())] == addresses


def called(copied: nn.Module) -> list[Any]:
    """What the nodes of a copy's graph call, layers by their class."""
    graph = copied.graph_module
    nodes = [node for node in graph.graph.nodes if node.op.startswith("call")]
    return [
        type(graph.get_submodule(n.target)) if n.op == "call_module" else n.target for n in nodes
    ]


def test_folded_norms_and_dropout_leave_the_graph() -> None:
    body = (conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.Identity())
    copied = copy_of(made(lambda: Pooled(*body)), images(4))
    assert called(copied) == [
        CopiedConv2d,
        F.relu,
        F.adaptive_avg_pool2d,
        torch.flatten,
        CopiedLinear,
    ]


def test_a_norm_that_ends_in_its_activation_is_folded() -> None:
    copied = copy_of(made(lambda: Pooled(conv(3, 8), NormAct(8))), images(4))
    assert called(copied) == [
        CopiedConv2d,
        F.relu,
        F.adaptive_avg_pool2d,
        torch.flatten,
        CopiedLinear,
    ]


def test_a_model_that_branches_on_images_runs_eagerly_and_says_so() -> None:
    with pytest.warns(UserWarning, match="eager engine: its forward looks at values that depend"):
        fastadv.pgd_fused(made(BranchesOnData), images(2), torch.arange(2), precision="bf16")


class ReturnsTuple(nn.Module):
    """Logits and features, as much published code has it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Pooled(conv(3, 8), nn.ReLU())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.net(x), x


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.filterwarnings("ignore:fastadv attacks this model with the eager engine")
def test_a_model_that_returns_a_tuple_is_a_type_error(precision: str) -> None:
    with pytest.raises(TypeError, match="model must return a tensor of logits, got tuple"):
        fastadv.pgd_fused(made(ReturnsTuple), images(2), torch.arange(2), precision=precision)


@pytest.mark.parametrize("precision", ["auto", "fp32", "bf16"])
@pytest.mark.filterwarnings("ignore:fastadv attacks this model with the eager engine")
def test_any_callable_is_attacked(precision: str) -> None:
    net, (x, y) = trained_small_cnn(), digits_test(16)
    adv = fastadv.pgd_fused(
        lambda t: net((t - 0.5) / 0.5 * 0.5 + 0.5), x, y, steps=3, seed=0, precision=precision
    )
    expected = fastadv.pgd_fused(net, x, y, steps=3, seed=0, precision="fp32")
    assert ((adv - expected).abs() < 1e-4).float().mean() > 0.95


@pytest.mark.parametrize("case", ["callable", "train mode"])
def test_what_the_caller_asked_for_is_no_reason_to_warn(case: str) -> None:
    net, (x, y) = trained_small_cnn(), digits_test(4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if case == "callable":
            fastadv.pgd_fused(lambda t: net(t), x, y, steps=1)
        else:
            fastadv.pgd_fused(net, x, y, steps=1, precision="bf16", train_mode=True)


def test_a_copy_is_compared_in_full_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """By TensorFloat-32 the gradients of a deep net are off by more than the comparison allows."""
    probe, seen = proof.probe, []

    def watched(*arguments: Any) -> InputGradient:
        seen.append(torch.backends.cudnn.allow_tf32)
        return probe(*arguments)

    monkeypatch.setattr(proof, "probe", watched)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    x, _ = digits_test(2)
    fastadv.PGD(trained_small_cnn(), engine="compiled", precision="fp32").engine_for(x)
    assert seen and not any(seen) and torch.backends.cudnn.allow_tf32


def test_a_model_compiled_by_torch_is_attacked() -> None:
    model, (x, y) = trained_small_cnn(), digits_test(4)
    expected = fastadv.pgd_fused(model, x, y, steps=2, seed=0, precision="bf16")
    model.compile(backend="eager")
    assert torch.equal(fastadv.pgd_fused(model, x, y, steps=2, seed=0, precision="bf16"), expected)


def test_identities_of_numbers_and_pairs_stay() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.same, self.conv = nn.Identity(), nn.Conv2d(1, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            left, right = self.same((x, 2 * x))
            return self.conv(left + right * self.same(1.0)).mean((2, 3))

    model, x = Odd(), torch.rand(2, 1, 8, 8)
    attack = fastadv.PGD(model, 0.1, 0.05, 2, precision="bf16")
    assert torch.isfinite(attack(x, torch.tensor([0, 1]))).all()
