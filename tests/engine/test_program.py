"""Programs: the CPU engine's fused passes equal autograd on the same copy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attack_helpers import copy_of, refresh
from program_helpers import program_gradient
from torch import Tensor, nn

from fastadv.engine import cpu_convolution as convolution
from fastadv.engine import packed_convolution as packed
from fastadv.engine.buffer_pool import Memory
from fastadv.engine.cpu_program import Program, fused_steps
from fastadv.engine.cpu_steps import ConvStep, LinearStep, PlainStep, PoolStep
from fastadv.engine.cpu_steps_rows import ReshapeStep, RowsLinearStep
from fastadv.engine.layers import CopiedConv2d
from fastadv.models import create_model

pytestmark = pytest.mark.usefixtures("one_thread")


class Block(nn.Module):
    """What programs must get right: a conv used twice, sizes read from activations, odd residuals."""

    def __init__(self, variant: str) -> None:
        super().__init__()
        self.variant = variant
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace=True)
        )
        self.a = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.b = nn.Conv2d(16, 16, 3, padding=1)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.norm = nn.BatchNorm2d(16)
        self.down = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.project = nn.Conv2d(16, 32, 1, stride=2)
        self.last = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem((x - 0.5) / 0.25)
        if self.variant == "residual":
            out = self.b(F.relu(self.a(x)))
            out += x
            x = F.relu(out)
        elif self.variant == "preact":
            x = x + self.b(F.relu(self.norm(self.a(x) + x)))
        elif self.variant == "shared":
            x = F.relu(self.a(F.relu(self.a(x))))
        elif self.variant == "same twice":
            out = self.a(x)
            x = torch.relu(out + out)
        elif self.variant == "broadcast":
            x = F.relu(self.a(x) + x.mean((2, 3), keepdim=True))
        elif self.variant == "gate":
            x = self.a(x) * torch.sigmoid(self.b(x))
        elif self.variant == "grouped":
            x = F.relu(self.grouped(x) + x)
        x = F.relu(self.down(x) + self.project(x))
        return self.last(F.adaptive_avg_pool2d(x, 1).view(x.size(0), -1))


def settle(model: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator) * 0.1)
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
    return model.eval()


def plain_gradient(
    model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor
) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    logits = model(leaf)
    loss = F.cross_entropy(logits, y, reduction="sum")
    return logits.detach(), torch.autograd.grad(loss, leaf)[0].float()


def agree(model: nn.Module, x: Tensor, at_least: float = 0.95) -> None:
    y = torch.arange(len(x)) % 5
    program = Program(copy_of(model, x, torch.bfloat16, pack=True))
    logits, gradient = program_gradient(program, x, y)
    wanted_logits, wanted = plain_gradient(model, x, y)
    assert gradient.shape == x.shape
    assert torch.isfinite(gradient).all()
    assert (logits - wanted_logits).norm() / wanted_logits.norm() < 0.05
    cosine = F.cosine_similarity(gradient.flatten(1), wanted.flatten(1))
    assert cosine.min() > at_least, cosine
    ratio = gradient.flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)
    assert (ratio - 1).abs().max() < 0.1, ratio


VARIANTS = ("plain", "residual", "preact", "shared", "same twice", "broadcast", "gate", "grouped")


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_equals_autograd_on_the_live_model(variant: str) -> None:
    torch.manual_seed(1)
    agree(settle(Block(variant)), torch.rand(4, 3, 10, 10))


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_with_the_kernels_for_amx(variant: str, monkeypatch) -> None:
    monkeypatch.setattr(convolution, "has_amx", lambda: True)
    torch.manual_seed(1)
    agree(settle(Block(variant)), torch.rand(4, 3, 10, 10))


@pytest.mark.parametrize("variant", VARIANTS)
def test_memory_of_gradients_that_is_given_back_is_not_read(variant: str, monkeypatch) -> None:
    plain, given = Memory.give_back, []

    def give_back(self: Memory, gradient: Tensor, others: Any) -> None:
        before = len(self._gradients)
        plain(self, gradient, others)
        if len(self._gradients) < before:
            given.append(gradient.fill_(torch.nan))

    monkeypatch.setattr(Memory, "give_back", give_back)
    torch.manual_seed(1)
    agree(settle(Block(variant)), torch.rand(4, 3, 10, 10))
    assert given


def test_a_deep_network_needs_the_gradients_of_two_layers_at_a_time(monkeypatch) -> None:
    made, new = [], Memory._new

    def counted(memory: Memory, shape: tuple[int, ...]) -> Tensor:
        made.append(new(memory, shape))
        return made[-1]

    monkeypatch.setattr(Memory, "_new", counted)
    layers = [nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU()) for _ in range(6)]
    model = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), *layers, nn.Flatten(), nn.Linear(1024, 5))
    x = torch.rand(2, 3, 4, 4)
    program = Program(copy_of(model.eval(), x, torch.bfloat16, pack=True))
    output, run = program.forward(x)
    forward = len(made)
    for _ in range(2):
        assert program.backward(run, torch.ones_like(output)) is not None
        assert len(made) <= forward + 4  # two, with masks of their own, and the images'
        output, run = program.forward(x)


@pytest.mark.parametrize("variant", ["plain", "residual", "broadcast"])
def test_gradient_where_no_kernel_serves(variant: str, monkeypatch) -> None:
    monkeypatch.setattr(packed, "make_kernel", lambda *conv, **where: None)
    torch.manual_seed(1)
    agree(settle(Block(variant)), torch.rand(4, 3, 10, 10))


@pytest.mark.parametrize("name", ["resnet18", "preact_resnet18", "vgg16_bn", "small_cnn"])
def test_gradient_of_library_models(name: str) -> None:
    torch.manual_seed(1)
    # Sixteen random layers without a shortcut leave any bfloat16 gradient, autograd's too, at .9.
    at_least = 0.8 if name == "vgg16_bn" else 0.95
    agree(settle(create_model(name, 10, 3)), torch.rand(2, 3, 32, 32), at_least)


HEADS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda x: x.mean((2, 3)),
    "torch.mean": lambda x: torch.mean(x, dim=[-1, -2]),
    "keepdims": lambda x: x.mean((2, 3), keepdims=True).flatten(1),
    "mean, keepdim": lambda x: x.mean((-2, -1), keepdim=True).flatten(1),
    "adaptive": lambda x: F.adaptive_avg_pool2d(x, (1, 1)).flatten(1),
    "average of the whole": lambda x: F.avg_pool2d(x, 6).view(x.size(0), -1),
    "average of tiles": lambda x: F.avg_pool2d(x, 3)[:, :, 0, 1],
    "another axis": lambda x: x.mean((1, 2)).repeat(1, 4)[:, :16],
    "pooled twice": lambda x: x.mean((2, 3)) * F.adaptive_avg_pool2d(x, 1).flatten(1),
    "images": lambda x: (x * torch.sigmoid(x).mean((2, 3), keepdim=True))[:, :, 2, 3],
}


class Head(nn.Module):
    """A convolution, a way to pool, a classifier."""

    def __init__(self, pool: Callable[[Tensor], Tensor], width: int = 16) -> None:
        super().__init__()
        self.pool, self.conv = pool, nn.Conv2d(3, 16, 3, padding=1)
        self.hidden, self.last = nn.Linear(16, width, bias=False), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.hidden(self.pool(F.relu(self.conv(x)))))


@pytest.mark.parametrize("name", HEADS)
def test_gradient_through_every_way_to_pool(name: str) -> None:
    torch.manual_seed(1)
    agree(Head(HEADS[name]).eval(), torch.rand(4, 3, 6, 6), 0.99)


def test_pooling_and_small_classifiers_are_steps() -> None:
    for name, plain in [("mean", 0), ("torch.mean", 0), ("adaptive", 1), ("mean, keepdim", 1)]:
        copy = copy_of(Head(HEADS[name]).eval(), torch.rand(4, 3, 8, 8), torch.bfloat16, pack=True)
        kinds = [type(step) for step in fused_steps(copy)]
        assert kinds.count(PoolStep) == 1
        assert kinds.count(LinearStep) + kinds.count(RowsLinearStep) == 2
        assert kinds.count(PlainStep) + kinds.count(ReshapeStep) == plain, name  # the flattening
    wide = copy_of(
        Head(HEADS["mean"], 8192).eval(), torch.rand(4, 3, 8, 8), torch.bfloat16, pack=True
    )
    assert wide.graph_module.part1.weight.dtype == torch.bfloat16
    assert wide.graph_module.part2.weight.dtype == torch.float32
    agree(Head(HEADS["mean"], 8192).eval(), torch.rand(4, 3, 6, 6), 0.99)


def test_resnet_is_fused_throughout() -> None:
    """20 convolutions; ReLUs and residual additions all ride on them."""
    copy = copy_of(
        settle(create_model("resnet18", 10, 3)), torch.rand(4, 3, 16, 16), torch.bfloat16, pack=True
    )
    steps = fused_steps(copy)
    convs = [step for step in steps if isinstance(step, ConvStep)]
    assert len(convs) == 20
    assert sum(step.rectifies for step in convs) == 17
    assert sum(len(step.inputs) == 2 for step in convs) == 8
    targets = {step.node.target for step in steps} - {step.node.target for step in convs}
    assert targets.isdisjoint({F.relu, torch.relu})


def test_memory_is_reused_and_results_repeat() -> None:
    torch.manual_seed(1)
    program = Program(
        copy_of(settle(Block("residual")), torch.rand(4, 3, 10, 10), torch.bfloat16, pack=True)
    )
    x, y = torch.rand(4, 3, 10, 10), torch.arange(4)
    first = program_gradient(program, x, y)
    buffers = {b.data_ptr() for _, b in program._memory._taken}
    for buffer in (b for _, b in program._memory._taken):
        buffer.fill_(torch.nan)
    second = program_gradient(program, x, y)
    assert {b.data_ptr() for _, b in program._memory._taken} == buffers
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    smaller = program_gradient(program, x[:3], y[:3])
    assert torch.equal(smaller[1], first[1][:3])
    assert {b.data_ptr() for _, b in program._memory._taken} <= buffers  # their first parts


def test_weights_follow_the_live_model() -> None:
    torch.manual_seed(1)
    model = settle(Block("residual"))
    x, y = torch.rand(4, 3, 10, 10), torch.arange(4)
    copy = copy_of(model, x, torch.bfloat16, pack=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        model.norm.running_mean.add_(0.3)
    refresh(copy, model, x)
    _, gradient = program_gradient(Program(copy), x, y)
    _, wanted = plain_gradient(model, x, y)
    assert F.cosine_similarity(gradient.flatten(1), wanted.flatten(1)).min() > 0.95


def test_packed_filters_replace_the_narrow_ones() -> None:
    copy = copy_of(settle(Block("plain")), torch.rand(4, 3, 10, 10), torch.bfloat16, pack=True)
    convs = [part for part in copy.graph_module.children() if isinstance(part, CopiedConv2d)]
    for conv in convs:
        kernels = conv.packed
        assert kernels is not None
        torchs = kernels.forward is None or kernels.backward is None
        assert torchs == (conv.weight.numel() > 0)


def test_detached_logits_have_no_gradient() -> None:
    class Detached(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).detach()

    program = Program(
        copy_of(settle(Detached("plain")), torch.rand(4, 3, 10, 10), torch.bfloat16, pack=True)
    )
    output, run = program.forward(torch.rand(2, 3, 8, 8))
    assert program.backward(run, torch.ones_like(output).float()) is None
