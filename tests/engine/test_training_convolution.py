"""Convolutions of training passes: gradients are torch's, in every order of uses, and what is left to torch."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastadv.engine import cpu_convolution as convolution
from fastadv.engine import training_convolution
from fastadv.engine.training_convolution import TrainingConvolutions

pytestmark = pytest.mark.usefixtures("one_thread")
BF16 = torch.bfloat16
# Channels, filters, kernel, stride, padding, height, width.
SHAPES = [
    (128, 256, 3, 1, 1, 8, 8),
    (256, 512, 3, 2, 1, 7, 5),
    (128, 256, 1, 2, 0, 8, 6),
    (512, 512, 3, 1, 1, 4, 4),
    (64, 48, 3, 1, 1, 9, 10),
    (3, 16, 5, 2, 2, 12, 12),
]


@pytest.fixture(params=[True, False], ids=["amx", "avx512"])
def _processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not request.param:
        monkeypatch.setattr(convolution, "has_amx", lambda: False)


def passed(
    conv: nn.Module, x: Tensor, mode: AbstractContextManager[Any]
) -> tuple[Tensor, list[Tensor]]:
    """The result, and the gradients in the images and in the parameters."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", BF16), mode:
        out = conv(x)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    return out, list(torch.autograd.grad((out * weights).sum(), [x, *conv.parameters()]))


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def make_conv(shape: tuple[int, ...]) -> tuple[nn.Conv2d, Tensor]:
    torch.manual_seed(0)
    c, k, kernel, stride, padding, height, width = shape
    conv = nn.Conv2d(c, k, kernel, stride, padding)
    return conv, torch.randn(5, c, height, width)


@pytest.mark.usefixtures("_processor")
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_results_and_gradients_are_torchs(shape: tuple[int, ...], last: bool) -> None:
    conv, x = make_conv(shape)
    if last:
        conv, x = conv.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)  # type: ignore[call-overload] # fmt: skip
    wanted, exact = passed(conv, x, nullcontext()), F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding)  # type: ignore[arg-type] # fmt: skip
    out, gradients = passed(conv, x, TrainingConvolutions())
    assert out.dtype == BF16 and relative(out, exact) < 0.01
    for found, plain in zip(gradients, wanted[1], strict=True):
        assert found.dtype == plain.dtype and found.shape == plain.shape
        assert relative(found, plain) < 0.015


@pytest.mark.usefixtures("_processor")
def test_weights_that_change_between_passes_are_packed_anew() -> None:
    conv, x = make_conv(SHAPES[3])
    mode = TrainingConvolutions()
    passed(conv, x, mode)
    conv.weight.data.mul_(-2.0)  # past torch's counters
    for found, plain in zip(
        passed(conv, x, mode)[1], passed(conv, x, nullcontext())[1], strict=True
    ):
        assert relative(found, plain) < 0.015


@pytest.mark.skipif(not convolution.supported(512, 512), reason="torch's own convolution runs here")
@pytest.mark.usefixtures("_processor")
def test_weights_that_change_within_one_context_are_packed_anew() -> None:
    """Torch's autocast keeps the weight that it has narrowed until its context ends."""
    conv, x = make_conv(SHAPES[3])
    with torch.autocast("cpu", BF16), TrainingConvolutions():
        first = conv(x)
        with torch.no_grad():
            conv.weight.mul_(0.5)
            conv.bias.mul_(0.5)
        second = conv(x)
    assert relative(second.detach(), 0.5 * first.detach()) < 0.05


def test_a_gradient_can_be_differentiated() -> None:
    conv, x = make_conv(SHAPES[1])
    found = []
    for mode in (nullcontext(), TrainingConvolutions()):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", BF16), mode:
            out = conv(leaf)
        (gradient,) = torch.autograd.grad(out.float().square().sum(), leaf, create_graph=True)
        found.append(torch.autograd.grad(gradient.square().sum(), conv.weight)[0])
    assert relative(found[1], found[0]) < 0.02


def test_a_network_trains_as_by_torch_and_with_checkpoints() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 128, 3, padding=1, bias=False),
        nn.BatchNorm2d(128),
        nn.ReLU(),
        nn.Conv2d(128, 256, 3, 2, 1),
        nn.BatchNorm2d(256),
        nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1),
    ).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.rand(8, 3, 12, 12).contiguous(memory_format=torch.channels_last)

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            result: Any = checkpoint(self.model, x, use_reentrant=False)
            return result

    plain = passed(model, x, nullcontext())[1]
    for network in (model, Checkpointed()):
        found = passed(network, x, TrainingConvolutions())[1]
        whole = torch.cat([g.flatten().double() for g in found])
        wanted = torch.cat([g.flatten().double() for g in plain])
        assert float(F.cosine_similarity(whole, wanted, 0)) > 0.97


def test_all_else_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def served(*args: object) -> None:
        raise AssertionError("served")

    monkeypatch.setattr(training_convolution._FastConv2d, "apply", served)
    conv, x = make_conv(SHAPES[3])
    with TrainingConvolutions():
        assert torch.equal(conv(x), F.conv2d(x, conv.weight, conv.bias, 1, 1))  # no autocast
        with torch.autocast("cpu", BF16):
            with torch.no_grad():
                conv(x)
            with torch.autocast("cpu", torch.float16):
                make_conv(SHAPES[3])[0](x)
            nn.Conv2d(512, 512, 3, groups=2)(x)
            nn.Conv2d(512, 256, 3, padding="same").double().float()(x)
            conv.requires_grad_(False)(x.requires_grad_())
            make_conv(SHAPES[5])[0](torch.rand(2, 3, 12, 12))


@pytest.mark.parametrize("name", ["batch_norm", "conv2d"])
def test_replaced_functions_are_left_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a mode a replacement that calls the original would run twice."""
    original, calls = getattr(F, name), []

    def theirs(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(name)
        return original(2 * x, *args, **kwargs)

    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32, eps=1.0), nn.Conv2d(32, 32, 3))
    mode = TrainingConvolutions()
    monkeypatch.setattr(F, name, theirs)
    x = torch.rand(4, 3, 8, 8)
    wanted, gradients = passed(layers, x, nullcontext())
    count = len(calls)
    for _ in range(2):
        out, found = passed(layers, x, mode)
        assert torch.equal(out, wanted)
        assert all(map(torch.equal, found, gradients))
    assert count > 0 and len(calls) == 3 * count
    monkeypatch.undo()
    with mode:
        assert mode in torch.overrides._get_current_function_mode_stack()
    assert mode not in torch.overrides._get_current_function_mode_stack()
