"""Weights as others publish them: their wrappings, their normalisation, and what does not fit."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

import pytest
import torch
from test_models import randomise_buffers, tiny_wrn
from torch import nn

from fastadv.data import load_cifar10
from fastadv.models import (
    Normalized,
    load_published_state_dict,
    resnet18,
)


def prefixed(state, prefix):
    return {prefix + name: tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 76},
        lambda state: {"model": prefixed(state, "module."), "optimizer": {"lr": 0.1}},
        lambda state: {"net": {"state_dict": prefixed(state, "model.")}},
        lambda state: prefixed(state, "_orig_mod.module."),
        lambda state: {k: v for k, v in state.items() if "num_batches_tracked" not in k},
        lambda state: {**state, "sub_block1.layer.0.bn1.weight": torch.ones(16)},
        lambda state: {**state, "mean": torch.zeros(3), "std": torch.ones(3)},
    ],
    ids=[
        "plain",
        "state_dict",
        "model+module",
        "nested+model",
        "compiled",
        "old",
        "sub_block1",
        "identity normalisation",
    ],
)
def test_published_wrappings_load(wrap):
    torch.manual_seed(0)
    source, target = tiny_wrn(), tiny_wrn()
    randomise_buffers(source)
    report = load_published_state_dict(target, wrap(source.state_dict()))
    assert report.complete
    x = torch.rand(2, 3, 16, 16)
    assert torch.equal(target.eval()(x), source.eval()(x))


def test_published_unused_layers_are_named():
    source = tiny_wrn()
    state = {**source.state_dict(), "sub_block1.layer.0.bn1.weight": torch.ones(16)}
    report = load_published_state_dict(tiny_wrn(), prefixed(state, "module."))
    assert report.prefix == "module."
    assert report.ignored == ["module.sub_block1.layer.0.bn1.weight"]
    assert len(report.loaded) == len(source.state_dict())


def test_published_normalisation_is_taken_over():
    torch.manual_seed(0)
    source = Normalized(tiny_wrn(), (0.49, 0.48, 0.45), (0.25, 0.24, 0.26))
    state = {
        "mu": source.mean,
        "sigma": source.std,
        **prefixed(source.model.state_dict(), "model."),
    }
    bare = tiny_wrn()
    with pytest.raises(ValueError, match=r"normalises its inputs .* Normalized\(model\)"):
        load_published_state_dict(bare, state)
    target = Normalized(bare)
    report = load_published_state_dict(target, state)
    assert report.mean == pytest.approx([0.49, 0.48, 0.45])
    x = torch.rand(2, 3, 16, 16)
    assert torch.equal(target.eval()(x), source.eval()(x))


def test_normalized_state_dict_round_trip():
    torch.manual_seed(0)
    source = Normalized(tiny_wrn(), (0.49, 0.48, 0.45), (0.25, 0.24, 0.26))
    target = Normalized(tiny_wrn())
    load_published_state_dict(target, source.state_dict())
    x = torch.rand(2, 3, 16, 16)
    assert torch.equal(target.eval()(x), source.eval()(x))


def test_misfits_are_refused_and_nothing_changes():
    target = tiny_wrn()
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    state = dict(tiny_wrn().state_dict())
    state["extra.weight"] = torch.ones(1)
    state["fc.weight"] = torch.ones(100, 64)
    del state["bn1.bias"]
    with pytest.raises(ValueError, match="nothing loaded") as caught:
        load_published_state_dict(target, state)
    message = str(caught.value)
    assert "nothing loaded:\n1 missing: bn1.bias;\n1 unexpected: extra.weight;\n" in message
    assert "fc.weight: (100, 64) in the file, (10, 64) in the model" in message
    assert all(torch.equal(target.state_dict()[name], before[name]) for name in before)


def test_misfits_are_reported_when_not_strict():
    source = tiny_wrn()
    state = dict(source.state_dict())
    del state["bn1.bias"]
    state["fc.weight"] = torch.ones(100, 64)
    target = tiny_wrn()
    report = load_published_state_dict(target, state, strict=False)
    assert not report.complete
    assert report.missing == ["bn1.bias"]
    assert report.mismatched == ["fc.weight: (100, 64) in the file, (10, 64) in the model"]
    assert torch.equal(target.conv1.weight, source.conv1.weight)
    assert target.fc.weight.shape == (10, 64)


def test_published_state_of_another_kind():
    with pytest.raises(TypeError, match="got a mapping with"):
        load_published_state_dict(tiny_wrn(), {"state_dict": {"epoch": 3}})
    with pytest.raises(TypeError, match="got Linear"):
        load_published_state_dict(tiny_wrn(), nn.Linear(1, 1))
    with pytest.raises(ValueError, match="no entry that fits WideResNet"):
        load_published_state_dict(tiny_wrn(), {"stem.weight": torch.ones(1)})


def published_resnet18() -> Path:
    """The trained CIFAR-10 ResNet-18 that the AutoAttack package carries beside its examples."""
    spec = importlib.util.find_spec("pyautoattack")
    if spec is None or spec.origin is None:
        pytest.skip("pyautoattack is not installed")
    path = Path(spec.origin).parent / "examples" / "model_test.pt"
    if not path.is_file():
        pytest.skip("pyautoattack comes without its example model")
    return path


@pytest.mark.slow
@pytest.mark.processes
def test_published_resnet18_classifies_cifar10(cifar10_root):
    state = torch.load(published_resnet18(), map_location="cpu", weights_only=True)
    model = resnet18().eval()
    load_published_state_dict(model, state, form="resnet18")
    test = load_cifar10(cifar10_root).test
    with torch.no_grad():
        logits = model(test.images[:250].float() / 255)
    accuracy = (logits.argmax(1) == test.labels[:250]).float().mean().item()
    assert 0.92 <= accuracy <= 0.97
