"""Programs of the layers that networks of ImageNet's size are made of: gradients, and which steps take them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from attack_helpers import copy_of, refresh
from imagenet_parts import (
    ODD,
    SIZES,
    Odd,
    ScaledBehind,
    convnext,
    dense,
    mobile,
    settled,
    swin,
    vit,
)
from program_helpers import agree
from torch import nn

from fastadv.engine import cpu_channels
from fastadv.engine.cpu_program import Program, fused_steps
from fastadv.engine.cpu_steps import PlainStep
from fastadv.engine.cpu_steps_attention import AttentionStep, UnbindStep
from fastadv.engine.cpu_steps_dense import DenseNormStep
from fastadv.engine.cpu_steps_rows import (
    ActivationStep,
    AliasStep,
    GateStep,
    LayerNormStep,
    RowsLinearStep,
    SumStep,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not cpu_channels.available(), reason="this processor has no AVX512-BF16"),
]


NETWORKS: dict[str, tuple[Callable[[], nn.Module], dict[type, int]]] = {
    "convnext": (
        convnext,
        {LayerNormStep: 4, RowsLinearStep: 5, ActivationStep: 2, AliasStep: 2, SumStep: 2},
    ),
    "scaled": (ScaledBehind, {RowsLinearStep: 3, ActivationStep: 1, AliasStep: 1, SumStep: 1}),
    "hardswish": (lambda: mobile(nn.Hardswish, nn.Hardsigmoid), {ActivationStep: 6, GateStep: 1}),
    "silu": (lambda: mobile(nn.SiLU, nn.Sigmoid, 1), {ActivationStep: 6, GateStep: 1}),
    "relu6": (lambda: mobile(nn.ReLU6, nn.Sigmoid), {ActivationStep: 6, GateStep: 1}),
    "dense": (dense, {DenseNormStep: 6}),
    "swin": (swin, {AttentionStep: 2, UnbindStep: 2, LayerNormStep: 5, SumStep: 4}),
    "vit": (
        vit,
        {AttentionStep: 2, UnbindStep: 2, LayerNormStep: 5, ActivationStep: 2, SumStep: 4},
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_gradient_and_steps(name: str) -> None:
    torch.manual_seed(1)
    build, wanted = NETWORKS[name]
    model = settled(build())
    x = torch.rand(3, 3, *SIZES.get(name, (12, 14)))
    copy = copy_of(model, x, torch.bfloat16, pack=True)
    kinds = [type(step) for step in fused_steps(copy)]
    assert {kind: kinds.count(kind) for kind in wanted} == wanted
    program = Program(copy)
    agree(program, model, x)
    agree(program, model, x[:1])
    agree(program, model, x.contiguous(memory_format=torch.channels_last))


@pytest.mark.parametrize("name", ["convnext", "scaled", "silu"])
def test_packed_weights_and_scales_follow_the_live_model(name: str) -> None:
    torch.manual_seed(2)
    model, x = settled(NETWORKS[name][0]()), torch.rand(2, 3, 10, 10)
    copy = copy_of(model, x, torch.bfloat16, pack=True)
    program = Program(copy)
    agree(program, model, x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(torch.rand(()) + 0.5)
    refresh(copy, model, x)
    agree(program, model, x)


@pytest.mark.parametrize("variant", ODD)
def test_what_only_looks_alike_runs_as_it_stands(variant: str) -> None:
    torch.manual_seed(3)
    model, x = settled(Odd(variant)), torch.rand(2, 3, 12, 12)
    copy = copy_of(model, x, torch.bfloat16, pack=True)
    if variant in ("masked attention", "scaled attention", "hardtanh", "scale of all"):
        assert PlainStep in [type(step) for step in fused_steps(copy)]
    agree(Program(copy), model, x)
