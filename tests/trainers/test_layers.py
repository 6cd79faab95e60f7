"""The layers of a network at which VFD-Adv distills: the ends of its stages, and the logits."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from test_pair_methods import length, slow_vfd
from torch import Tensor, nn
from training_helpers import (
    make_batch,
    make_method,
    make_model,
    small_data,
    small_recipe,
    states_equal,
)

from fastadv.models import (
    VGG,
    Normalized,
    PreActResNet,
    ResNet,
    SmallCNN,
    Stack,
    WideResNet,
    check_layer,
    layer_and_logits,
    layer_names,
    layer_output,
)
from fastadv.trainers import train
from fastadv.trainers.vfd import Guided

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
NETWORKS: dict[str, Any] = {
    "resnet": lambda: ResNet((1, 1, 1, 1), 5, 3),
    "preact": lambda: PreActResNet((1, 1, 1, 1), 5, 3),
    "preact without last norm": lambda: PreActResNet((1, 1, 1, 1), 5, 3, final_norm=False),
    "wrn": lambda: WideResNet(10, 1, 5, 3),
    "vgg": lambda: VGG(((4, 4), (8,), (8, 8)), 5, 3),
    "small": lambda: SmallCNN(5, 3),
    "normalized": lambda: Normalized(WideResNet(10, 1, 5, 3), [0.4, 0.5, 0.6], [0.3, 0.2, 0.25]),
}
# Of each network the module whose output is its second layer; of the small one there is no such module.
SECOND = {
    "resnet": "layer2",
    "preact": "layer2",
    "preact without last norm": "layer2",
    "wrn": "block2",
    "vgg": "features.9",  # the ReLU before the second pooling
    "normalized": "model.block2",
}


class TheirResNet(nn.Module):
    """What ResNet of torchvision is: no feature split, and a first pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Tanh())
        self.layer2 = nn.Sequential(nn.Conv2d(4, 6, 3, 2, padding=1), nn.Tanh())
        self.layer3 = nn.Sequential(nn.Conv2d(6, 8, 3, 2, padding=1), nn.Tanh())
        self.layer4 = nn.Sequential(nn.Conv2d(8, 10, 3, 2, padding=1), nn.Tanh())
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


TheirResNet.__module__ = "torchvision.models.resnet"


class NoSplit(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


def made(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = (TheirResNet if name == "theirs" else NETWORKS[name])().double()
    # The least size at which the last stages have maps of different sizes.
    side = 32 if name == "theirs" else 16
    with torch.no_grad():
        for _ in range(2):
            model(torch.rand(4, 3, side, side, dtype=torch.float64))
    return model.eval(), torch.rand(2, 3, side, side, dtype=torch.float64)


@pytest.mark.parametrize("name", [*NETWORKS, "theirs"])
def test_every_layer_is_a_step_on_the_way_to_the_logits(name: str) -> None:
    model, x = made(name)
    names = layer_names(model)
    assert names[0] == "layer1" and names[-1] == "logits"
    logits = model(x)
    maps = []
    for layer in [*names, "last"]:
        check_layer(model, layer)
        features, out = layer_and_logits(model, layer, x)
        assert torch.equal(out, logits)
        assert torch.equal(layer_output(model, layer, x), features)
        maps.append(features)
    assert torch.equal(maps[-1], maps[-3]) and torch.equal(maps[-2], logits)
    if name != "theirs":
        assert torch.equal(maps[-1], model.forward_features(x))  # type: ignore[operator]
    elements = [m[0].numel() for m in maps[:-1]]
    assert elements == sorted(elements, reverse=True) and len({*map(id, maps)}) == len(maps)


@pytest.mark.parametrize(("name", "module"), [*SECOND.items(), ("theirs", "layer2")])
def test_the_second_layer_is_what_the_second_stage_gives(name: str, module: str) -> None:
    model, x = made(name)
    seen: list[Tensor] = []
    model.get_submodule(module).register_forward_hook(lambda _, __, out: seen.append(out))
    model(x)
    assert torch.equal(layer_output(model, "layer2", x), seen[0])


def test_nothing_behind_a_layer_is_computed() -> None:
    model, x = made("resnet")
    calls: list[int] = []
    model.layer3.register_forward_hook(lambda *_: calls.append(1))  # type: ignore[operator, union-attr]
    layer_output(model, "layer2", x)
    assert not calls
    layer_output(model, "layer3", x)
    assert calls


@pytest.mark.compiles
@pytest.mark.parametrize("name", ["vgg", "normalized", "theirs"])
def test_the_pass_is_compiled_as_one_graph(name: str) -> None:
    model, x = made(name)
    compiled = torch.compile(layer_and_logits, backend="eager", fullgraph=True)
    for ours, expected in zip(
        compiled(model, "layer2", x), layer_and_logits(model, "layer2", x), strict=True
    ):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("layer", ["layer1", "layer2", "last", "logits"])
@pytest.mark.parametrize("base", ["trades", "mart"])
def test_the_loss_at_a_layer_equals_equation_6(layer: str, base: str) -> None:
    model, teacher = make_model(0, torch.float64), make_model(1, torch.float64).eval()
    method: Any = make_method("vfd", model, teacher, layer=layer, base=base, lam=0.03)
    method.train_mode()
    slow = copy.deepcopy(model).train()
    batch = make_batch(dtype=torch.float64)
    adv = (batch.x + 0.05 * torch.sign(torch.sin(50 * batch.x))).clamp(0, 1)

    def layers(network: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        first = network.bn1(network.conv1(x)).relu()
        second = network.bn2(network.conv2(first)).relu()
        third = network.bn3(network.conv3(second)).relu()
        logits = network.linear(third.mean((2, 3)))
        found = {"layer1": first, "layer2": second, "last": third, "logits": logits}
        return found[layer], logits

    with torch.no_grad():
        vanilla, _ = layers(teacher, batch.x)
    assert torch.allclose(method.attack(batch).vanilla_features, vanilla, rtol=1e-12)
    (clean, clean_logits), (hard, adv_logits) = layers(slow, batch.x), layers(slow, adv)
    apart = length(hard - vanilla) + length(clean - vanilla)
    expected = slow_vfd(method.recipe, clean_logits, adv_logits, batch.y) + 0.03 * apart.mean()
    loss = method.training_loss(batch, Guided(adv, vanilla)).loss
    loss.backward()
    expected.backward()
    assert torch.allclose(loss, expected, rtol=1e-11)
    for a, b in zip(model.parameters(), slow.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-8, atol=1e-11)  # type: ignore[arg-type]


def test_a_layer_that_is_not_there_is_told_with_those_that_are() -> None:
    words = "layer must be one of layer1, layer2, layer3, logits, last of the model, a SmallCNN, got 'layer4'"
    with pytest.raises(ValueError, match=words):
        make_method("vfd", make_model(0), make_model(1), layer="layer4")
    other = WideResNet(10, 1, 4, 1)
    stack = Stack([make_model(0), make_model(1)], 4)
    assert layer_names(stack) == ("layer1", "logits")
    with pytest.raises(
        ValueError, match="layer1, logits, last of the teacher, a Stack, got 'layer2'"
    ):
        make_method("vfd", other, stack, layer="layer2")
    assert layer_names(NoSplit()) == ("logits",)
    with pytest.raises(TypeError, match="NoSplit has no forward_features and no forward_head"):
        check_layer(NoSplit(), "last")
    with pytest.raises(
        ValueError, match="layer must be one of logits, last of the model, a NoSplit"
    ):
        check_layer(NoSplit(), "layer1")


def test_a_run_at_a_layer_is_resumed_bit_for_bit(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(progress: Any) -> None:
        if progress.step == 5:
            raise Stop

    def run(folder: Path, **changes: Any) -> Any:
        recipe = small_recipe("vfd", layer="layer2", precision="bf16")
        return train(
            "vfd",
            recipe,
            data=small_data(64, 16),
            model=make_model(0),
            teacher=make_model(1),
            run_dir=folder,
            progress=False,
            device="cpu",
            **changes,
        )

    whole = run(tmp_path / "whole")
    with pytest.raises(Stop):
        run(tmp_path / "parts", on_step=stop)
    resumed = run(tmp_path / "parts", resume=True)
    assert states_equal(whole.model.state_dict(), resumed.model.state_dict())
