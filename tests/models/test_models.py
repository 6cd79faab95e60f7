"""Models: sizes, names of published checkpoints, the feature split, normalisation, the registry."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from fastadv.models import (
    Normalized,
    PreActResNet,
    ResNet,
    WideResNet,
    check_feature_split,
    create_model,
    model_names,
    resnet18,
    small_cnn,
)
from fastadv.models.preact_resnet import PreActBlock
from fastadv.models.wide_resnet import WideBlock


class NoSplit(nn.Module):
    def forward(self, x):
        return x.flatten(1)


def tiny_wrn() -> WideResNet:
    return WideResNet(depth=10, widen=1, num_classes=10, in_channels=3)


def randomise_buffers(model: nn.Module) -> None:
    """Give BatchNorm statistics that evaluation mode can tell apart."""
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_()
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2)


@pytest.mark.parametrize(
    ("name", "channels", "parameters"),
    [
        ("resnet18", 3, 11_173_962),
        ("preact_resnet18", 3, 11_172_170),
        ("wrn_28_10", 3, 36_479_194),
        ("wrn_34_10", 3, 46_160_474),
        ("vgg16_bn", 3, 14_728_266),
        ("small_cnn", 1, 56_554),
    ],
)
def test_parameter_counts(name, channels, parameters):
    with torch.device("meta"):  # counts need no memory
        model = create_model(name, 10, channels)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize(
    ("name", "channels", "side", "feature_shape"),
    [
        ("resnet18", 3, 32, (512, 4, 4)),
        ("resnet18", 3, 8, (512, 1, 1)),
        ("preact_resnet18", 3, 32, (512, 4, 4)),
        ("wrn_28_10", 3, 32, (640, 8, 8)),
        ("wrn_34_10", 3, 32, (640, 8, 8)),
        ("vgg16_bn", 3, 32, (512, 2, 2)),
        ("vgg16_bn", 3, 64, (512, 4, 4)),
        ("small_cnn", 1, 8, (64, 4, 4)),
        ("small_cnn", 3, 32, (64, 16, 16)),
    ],
)
def test_feature_shapes(name, channels, side, feature_shape):
    with torch.device("meta"):
        model = create_model(name, 7, channels)
        features = model.forward_features(torch.empty(2, channels, side, side))
        logits = model.forward_head(features)
        pooled = model.forward_head(features, pre_logits=True)
    assert features.shape == (2, *feature_shape)
    assert logits.shape == (2, 7)
    assert pooled.shape == (2, model.num_features)
    check_feature_split(model)


@pytest.mark.parametrize("build", [resnet18, small_cnn, tiny_wrn])
def test_whole_is_composition_of_halves(build):
    torch.manual_seed(0)
    model = build().eval()
    channels = model.conv1.in_channels
    x = torch.rand(2, channels, 16, 16, requires_grad=True)
    logits = model(x)
    assert torch.equal(logits, model.forward_head(model.forward_features(x)))
    (gradient,) = torch.autograd.grad(logits.square().sum(), x)
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("name", model_names())
def test_models_are_traceable(name):
    """The attack engine folds BatchNorm in a traced copy, so no forward may depend on data."""
    with torch.device("meta"):
        model = create_model(name)
    graph = torch.fx.symbolic_trace(model).graph
    assert sum(node.op == "call_module" for node in graph.nodes) > 5


def test_global_pooling_makes_size_free():
    torch.manual_seed(0)
    model = small_cnn().eval()
    features = torch.rand(2, 64, 3, 5)
    pooled = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pooled, features.flatten(2).mean(2))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "resnet18",
            [
                "conv1.weight",
                "bn1.running_var",
                "layer1.0.conv1.weight",
                "layer1.1.bn2.bias",
                "layer2.0.shortcut.0.weight",
                "layer2.0.shortcut.1.running_mean",
                "linear.bias",
            ],
        ),
        (
            "preact_resnet18",
            [
                "conv1.weight",
                "layer1.0.bn1.weight",
                "layer4.0.shortcut.0.weight",
                "bn.weight",
                "linear.weight",
            ],
        ),
        (
            "wrn_34_10",
            [
                "conv1.weight",
                "block1.layer.0.bn1.weight",
                "block1.layer.0.convShortcut.weight",
                "block3.layer.4.conv2.weight",
                "bn1.weight",
                "fc.bias",
            ],
        ),
        (
            "vgg16_bn",
            [
                "features.0.weight",
                "features.1.running_mean",
                "features.7.weight",
                "features.40.weight",
                "classifier.weight",
            ],
        ),
    ],
)
def test_state_dict_names(name, expected):
    with torch.device("meta"):
        names = set(create_model(name).state_dict())
    assert names.issuperset(expected)


def test_state_dict_lengths():
    """As many entries as the published files have: 122 (ResNet-18), without identity shortcuts."""
    with torch.device("meta"):
        assert len(create_model("resnet18").state_dict()) == 122
        assert len(create_model("preact_resnet18", final_norm=False).state_dict()) == 102
        assert "block1.layer.1.convShortcut.weight" not in create_model("wrn_28_10").state_dict()


@pytest.mark.parametrize("block", [PreActBlock(4, 8, 2), PreActBlock(4, 4, 1)])
def test_preact_block_projects_the_activated_input(block):
    randomise_buffers(block)
    block.eval()
    x = torch.randn(2, 4, 8, 8)
    activated = block.bn1(x).relu()
    residual = block.conv2(block.bn2(block.conv1(activated)).relu())
    skip = x if block.shortcut is None else block.shortcut[0](activated)
    torch.testing.assert_close(block(x), residual + skip)


@pytest.mark.parametrize("block", [WideBlock(4, 8, 2, 0.0), WideBlock(4, 4, 1, 0.0)])
def test_wide_block_projects_the_activated_input(block):
    randomise_buffers(block)
    block.eval()
    x = torch.randn(2, 4, 8, 8)
    activated = block.bn1(x).relu()
    residual = block.conv2(block.bn2(block.conv1(activated)).relu())
    skip = x if block.convShortcut is None else block.convShortcut(activated)
    torch.testing.assert_close(block(x), residual + skip)


def test_wide_resnet_initialisation():
    torch.manual_seed(0)
    model = WideResNet(10, 4, 10, 3)
    weight = model.block3.layer[0].conv2.weight  # [256, 256, 3, 3]
    assert weight.std().item() == pytest.approx((2 / (9 * 256)) ** 0.5, rel=0.02)
    assert model.fc.bias.abs().max() == 0


def test_wide_resnet_depth():
    with pytest.raises(ValueError, match=r"depth must be 6 \* n \+ 4 .* got 30"):
        WideResNet(30, 10, 10, 3)


def test_wide_resnet_dropout_only_in_training():
    torch.manual_seed(0)
    model = WideResNet(10, 1, 10, 3, dropout=0.5)
    x = torch.rand(4, 3, 16, 16)
    model.eval()
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


def test_check_feature_split_names_what_is_missing():
    with pytest.raises(TypeError, match="NoSplit has no forward_features and no forward_head"):
        check_feature_split(NoSplit())
    half = NoSplit()
    half.forward_features = lambda x: x
    with pytest.raises(TypeError, match="NoSplit has no forward_head"):
        check_feature_split(half)
    with pytest.raises(TypeError, match="NoSplit has no forward_features"):
        check_feature_split(Normalized(NoSplit()))


def test_check_feature_split_sees_through_wrappers():
    check_feature_split(Normalized(small_cnn()))
    with pytest.raises(TypeError, match=r"pass `model\.module`"):
        check_feature_split(nn.DataParallel(small_cnn()))


def test_normalized_keeps_the_split():
    torch.manual_seed(0)
    inner = small_cnn(in_channels=3).eval()
    model = Normalized(inner, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)).eval()
    x = torch.rand(2, 3, 8, 8)
    normalised = (x - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor(
        [0.2, 0.3, 0.4]
    ).view(3, 1, 1)
    torch.testing.assert_close(model(x), inner(normalised))
    features = model.forward_features(x)
    torch.testing.assert_close(features, inner.forward_features(normalised))
    assert torch.equal(model.forward_head(features), model(x))
    assert model.forward_head(features, pre_logits=True).shape == (2, 64)
    assert torch.equal(Normalized(NoSplit(), 0.5, 0.5)(x), ((x - 0.5) / 0.5).flatten(1))


def test_normalized_checks_its_arguments():
    with pytest.raises(ValueError, match="same number of channels, got 3 and 1"):
        Normalized(small_cnn(), (0.5, 0.5, 0.5), 1.0)
    with pytest.raises(ValueError, match="std must be > 0"):
        Normalized(small_cnn(), 0.5, 0.0)
    with pytest.raises(ValueError, match="mean must be one finite number"):
        Normalized(small_cnn(), float("nan"), 1.0)


def test_create_model_by_name():
    assert isinstance(create_model("ResNet18"), ResNet)
    with torch.device("meta"):
        assert create_model("WRN-34-10").fc.weight.shape == (10, 640)
    model = create_model("preact-resnet18", num_classes=100, in_channels=1, final_norm=False)
    assert isinstance(model, PreActResNet)
    assert model.bn is None
    assert model.conv1.in_channels == 1
    assert model.linear.out_features == 100


def test_create_model_refuses_unknown_names():
    with pytest.raises(ValueError, match="did you mean 'resnet18'"):
        create_model("resnet_18")
    with pytest.raises(ValueError, match=r"got 'transformer'$"):
        create_model("transformer")
    with pytest.raises(ValueError, match="num_classes must be >= 1, got 0"):
        create_model("resnet18", num_classes=0)


@pytest.fixture
def factories(monkeypatch):
    module = types.ModuleType("my_factories")
    module.full = lambda num_classes, in_channels, width=4: nn.Conv2d(
        in_channels, num_classes, width
    )
    module.fixed = lambda: nn.Linear(3, 10)
    module.anything = lambda **given: nn.Conv2d(given["in_channels"], given["num_classes"], 1)
    module.wrong = lambda num_classes: "a model"
    module.number = 3
    monkeypatch.setitem(sys.modules, "my_factories", module)


@pytest.mark.usefixtures("factories")
def test_create_model_from_factory():
    model = create_model("my_factories:full", 5, 2, width=7)
    assert model.weight.shape == (5, 2, 7, 7)
    assert isinstance(create_model("my_factories:fixed"), nn.Linear)
    assert create_model("my_factories:anything", 5, 2).weight.shape == (5, 2, 1, 1)
    with pytest.raises(TypeError, match=r"must return a torch\.nn\.Module, got str"):
        create_model("my_factories:wrong")
    with pytest.raises(ImportError, match="has no function 'number'"):
        create_model("my_factories:number")
    with pytest.raises(ImportError, match="has no function 'absent'"):
        create_model("my_factories:absent")
    with pytest.raises(ImportError, match="no module named 'no_such_package'"):
        create_model("no_such_package.models:net")


def test_a_factory_does_not_move_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "weights.txt").write_text("5")
    (tmp_path / "code" / "moving_factory.py").write_text(
        "import os, torch\n"
        "os.chdir(os.path.dirname(os.path.abspath(__file__)))\n"
        "def make(): return torch.nn.Linear(2, int(open('weights.txt').read()))\n"
    )
    monkeypatch.syspath_prepend(tmp_path / "code")
    monkeypatch.chdir(tmp_path)
    assert create_model("moving_factory:make").out_features == 5
    assert Path.cwd() == tmp_path


def test_create_model_from_timm(monkeypatch):
    calls = []
    fake = types.ModuleType("timm")
    fake.create_model = lambda name, **options: calls.append((name, options)) or nn.Identity()
    monkeypatch.setitem(sys.modules, "timm", fake)
    assert isinstance(create_model("timm:resnet26", 7, 1, pretrained=False), nn.Identity)
    assert calls == [("resnet26", {"num_classes": 7, "in_chans": 1, "pretrained": False})]


@pytest.mark.parametrize(
    "error", [ModuleNotFoundError("no timm"), RuntimeError("operator torchvision::nms")]
)
def test_timm_that_cannot_be_imported(monkeypatch, error):
    real = importlib.import_module

    def broken(name, package=None):
        if name == "timm":
            raise error
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(ImportError, match="pip install timm") as caught:
        create_model("timm:resnet26")
    assert str(error) in str(caught.value)
