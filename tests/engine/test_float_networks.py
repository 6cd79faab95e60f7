"""Programs in float32 of the layers of ImageNet's networks: gradients, and which steps take them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from attack_helpers import copy_of
from imagenet_parts import ODD, SIZES, Odd, convnext, dense, mobile, settled, swin, vit
from program_helpers import agree
from torch import Tensor, nn

from fastadv.engine import cpu_convolution as convolution
from fastadv.engine.cpu_program import Program, fused_steps
from fastadv.engine.cpu_steps_dense import DenseNormStep
from fastadv.engine.cpu_steps_rows import ActivationStep, GateStep, LayerNormStep

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not convolution.available(), reason="programs need the compiled part"),
]

ERROR = 1e-4
NETWORKS: dict[str, tuple[Callable[[], nn.Module], dict[type, int]]] = {
    "convnext": (convnext, {ActivationStep: 2, LayerNormStep: 4}),
    "hardswish": (lambda: mobile(nn.Hardswish, nn.Hardsigmoid), {ActivationStep: 6, GateStep: 1}),
    "silu": (lambda: mobile(nn.SiLU, nn.Sigmoid, 1), {ActivationStep: 6, GateStep: 1}),
    "relu6": (lambda: mobile(nn.ReLU6, nn.Sigmoid), {ActivationStep: 6, GateStep: 1}),
    "dense": (dense, {DenseNormStep: 6}),
    "swin": (swin, {ActivationStep: 2, LayerNormStep: 5}),
    "vit": (vit, {ActivationStep: 2, LayerNormStep: 5}),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_gradient_and_steps(name: str) -> None:
    torch.manual_seed(1)
    build, wanted = NETWORKS[name]
    model, x = settled(build()), torch.rand(3, 3, *SIZES.get(name, (12, 14)))
    copy = copy_of(model, x, torch.float32, pack=True)
    kinds = [type(step) for step in fused_steps(copy)]
    assert {kind: kinds.count(kind) for kind in wanted} == wanted
    program = Program(copy)
    agree(program, model, x, ERROR)
    agree(program, model, x[:1], ERROR)
    agree(program, model, x.contiguous(memory_format=torch.channels_last), ERROR)


@pytest.mark.parametrize("variant", ODD)
def test_what_only_looks_alike_runs_as_it_stands(variant: str) -> None:
    torch.manual_seed(3)
    model, x = settled(Odd(variant)), torch.rand(2, 3, 12, 12)
    agree(Program(copy_of(model, x, torch.float32, pack=True)), model, x, ERROR)


class Shared(nn.Module):
    """Results that several others use, and gates that are no numbers per channel."""

    def __init__(self, variant: str) -> None:
        super().__init__()
        self.variant = variant
        self.stem, self.other = nn.Conv2d(3, 16, 3), nn.Conv2d(3, 16, 3)
        self.last = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.stem(x), self.other(x)
        if self.variant == "input of an activation used twice":
            a = F.silu(a) + a
        elif self.variant == "activation used three times":
            c = F.silu(a)
            a = c * torch.sigmoid(c.mean((2, 3), keepdim=True)) + F.relu(c) * b
        elif self.variant == "gate used twice":
            gate = torch.sigmoid(b.mean((2, 3), keepdim=True))
            a = a * gate + b * gate
        elif self.variant == "gate first":
            a = torch.sigmoid(b.mean((2, 3), keepdim=True)) * a
        elif self.variant == "gate per place":
            a = a * torch.sigmoid(b.mean(1, keepdim=True))
        elif self.variant == "gate of the whole batch":
            a = a * torch.sigmoid(b[:1].mean((2, 3), keepdim=True)) if len(a) == 1 else a * b
        elif self.variant == "square":
            c = F.hardswish(a)
            a = c * c
        elif self.variant == "of rows":
            return self.last(F.silu(F.gelu(a.mean((2, 3)))))
        elif self.variant == "in place":
            a = F.silu(a, inplace=True) * a
        return self.last(a.mean((2, 3)))


SHARED = (
    "input of an activation used twice", "activation used three times", "gate used twice", "gate first",
    "gate per place", "gate of the whole batch", "square", "of rows", "in place",
)  # fmt: skip


@pytest.mark.parametrize("variant", SHARED)
def test_gradients_of_shared_results_are_added_up(variant: str) -> None:
    torch.manual_seed(4)
    model, x = settled(Shared(variant)), torch.rand(2, 3, 9, 8)
    agree(Program(copy_of(model, x, torch.float32, pack=True)), model, x, ERROR)


def test_fused_steps_call_the_passes_and_no_function_of_torch() -> None:
    """A step that fell back would be right as well, and slow."""
    torch.manual_seed(5)
    x = torch.rand(2, 3, 12, 14)
    kinds = (ActivationStep, GateStep, LayerNormStep)
    for build, count in ((lambda: mobile(nn.SiLU, nn.Sigmoid, 1), 7), (convnext, 6)):
        model = settled(build())
        program = Program(copy_of(model, x, torch.float32, pack=True))
        _, run = program.forward(x)
        fused = [step for step in program.steps if isinstance(step, kinds)]
        assert len(fused) == count and not any(step.node in run.tapes for step in fused)


def test_without_the_compiled_part_of_the_passes(monkeypatch) -> None:
    monkeypatch.setattr(convolution, "available", lambda: False)
    torch.manual_seed(6)
    model, x = settled(mobile(nn.Hardswish, nn.Hardsigmoid)), torch.rand(2, 3, 12, 14)
    copy = copy_of(model, x, torch.float32, pack=True)
    assert not any(isinstance(step, (ActivationStep, GateStep)) for step in fused_steps(copy))
