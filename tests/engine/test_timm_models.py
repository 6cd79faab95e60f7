"""Models of timm, with random weights: copied, not run eagerly, and attacked without a trace."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from attack_helpers import assert_same_state, images, randomise, state_of
from test_attack_copy import assert_copy_equals, assert_narrow_agrees, cosine, engine_gradient
from torch import nn

import fastadv
from fastadv.models import check_feature_split, create_model

try:
    import timm  # noqa: F401
except Exception as error:  # a torchvision that does not fit torch raises RuntimeError
    pytest.skip(f"timm cannot be imported: {error}", allow_module_level=True)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
MODELS: dict[str, tuple[int, dict[str, Any]]] = {
    "resnet10t": (32, {}),
    "mobilenetv3_small_050": (32, {}),
    "convnext_atto": (32, {}),
    "vit_tiny_patch16_224": (16, {"img_size": 16, "patch_size": 4, "depth": 2}),
}


def made(name: str) -> tuple[nn.Module, torch.Tensor]:
    size, options = MODELS[name]
    torch.manual_seed(0)
    return randomise(create_model(f"timm:{name}", **options)), images(3, size=size)


@pytest.mark.parametrize("name", MODELS)
def test_its_copy_equals_it(name: str) -> None:
    model, x = made(name)
    check_feature_split(model)
    assert_copy_equals(model, x)


@pytest.mark.parametrize("name", MODELS)
def test_bf16_agrees_with_fp32(name: str) -> None:
    model, x = made(name)
    assert_narrow_agrees(model, x, engine="compiled")


@pytest.mark.parametrize("name", MODELS)
def test_it_is_attacked_on_a_copy_that_follows_it(name: str) -> None:
    model, x = made(name)
    model.train()
    attack, before = fastadv.PGD(model, steps=2, precision="bf16"), state_of(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attack(x, torch.arange(3), seed=0)
    assert_same_state(state_of(model), before)
    assert attack.last.engine == "compiled"
    old, _ = engine_gradient(model, x, precision="bf16")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
    assert_narrow_agrees(model, x)
    new, _ = engine_gradient(model, x, precision="bf16")
    assert cosine(old, new) < 0.999
