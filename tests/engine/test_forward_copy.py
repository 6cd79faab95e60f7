"""Forward passes of frozen models by copies: the model's results, in little memory, and who runs as it is."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastadv import PGD
from fastadv.engine import feature_tap, forward_copy
from fastadv.engine.errors import Unrecordable
from fastadv.engine.feature_tap import FeatureTap
from fastadv.engine.forward_copy import ForwardCopy, probe_images
from fastadv.models import Normalized, create_model
from fastadv.trainers.frozen_forward import FrozenForward, features_of, logits_of

pytestmark = pytest.mark.usefixtures("one_thread")
BF16 = torch.bfloat16


def network(name: str = "resnet18", classes: int = 10) -> nn.Module:
    """With running statistics as a trained one has."""
    torch.manual_seed(0)
    model = create_model(name, classes, 3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval().requires_grad_(False)


def images(count: int = 3, size: int = 16) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def off(found: Tensor, wanted: Tensor) -> float:
    apart = (found.float() - wanted).flatten(1).norm(dim=1)
    return float((apart / wanted.flatten(1).norm(dim=1)).max())


class Branches(nn.Module):
    """Views and results that are read late, which used memory must not overtake."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(16 * i, 16, 3, padding=1) for i in (1, 2, 3))
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.fc = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        late, flat = x.flip(3), x.view(x.shape[0], 16, -1)
        parts = [x]
        for conv in self.convs:
            parts.append(conv(torch.cat(parts, 1)))
        pooled = torch.cat(parts, 1).mean((2, 3)) + (late.mean() + flat.amax()).view(1, 1)
        return self.fc(pooled)


@pytest.mark.parametrize(
    ("name", "under_torch"),
    [("resnet18", False), ("wrn_10_2", False), ("wrn_10_2", True), ("branches", False)],
)
def test_a_copy_computes_the_models_results(
    name: str, under_torch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if under_torch:  # as on a GPU
        monkeypatch.setattr(forward_copy, "_PACKED_ON", ())
    model = Branches().eval() if name == "branches" else Normalized(network(name), 0.5, 0.25)
    outputs = [logits_of] if name == "branches" else [logits_of, features_of]
    first, second = images(), images().flip(0)
    for output in outputs:
        with torch.no_grad():
            wanted = output(model, first), output(model, second)
        copy = ForwardCopy(model, output, first, BF16)
        found = copy(first)
        kept = found.clone()
        assert off(copy(second), wanted[1]) < 0.02
        assert off(found, wanted[0]) < 0.02
        assert torch.equal(found, kept)  # the caller's own
        assert torch.equal(copy(first), kept)
        assert not found.requires_grad


def test_a_copy_draws_nothing_and_leaves_modes_alone() -> None:
    model, before = network("small_cnn"), torch.get_rng_state()
    with torch.autocast("cpu", BF16), torch.inference_mode():
        ForwardCopy(model, logits_of, images(), BF16)(images())
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(module.training for module in model.modules())
    assert torch.equal(probe_images(images(9))[:4], probe_images(images(5))[:4])


class Sized(nn.Module):
    """Looks at the number of images, or draws, or reads a value."""

    def __init__(self, rule: str) -> None:
        super().__init__()
        self.inner, self.rule = network("small_cnn"), rule

    def forward(self, x: Tensor) -> Tensor:
        if self.rule == "draws":
            return self.inner(x + torch.rand_like(x))
        if self.rule == "reads" and float(x.mean()) > 2:
            return self.inner(-x)
        if self.rule == "size" and x.shape[0] > 100:
            return self.inner(-x)
        return self.inner(x)


@pytest.mark.parametrize("rule", ["draws", "reads", "size"])
def test_a_model_that_cannot_be_copied_runs_as_it_is_and_says_so_once(rule: str) -> None:
    model = Sized(rule).eval()
    frozen = FrozenForward("teacher", model, logits_of, BF16)
    with torch.no_grad(), pytest.warns(UserWarning, match="'teacher' as it is.*its forward|number"):
        torch.manual_seed(2)
        frozen(images())
    assert frozen.reason is not None
    with torch.no_grad(), torch.autocast("cpu", BF16), warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.manual_seed(2)
        found = frozen(images())
        torch.manual_seed(2)
        assert torch.equal(found, model(images()))


def test_a_wrong_copy_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plain: Callable[..., Any] = forward_copy.ForwardPass.__call__
    monkeypatch.setattr(
        forward_copy.ForwardPass, "__call__", lambda self, x: plain(self, x).mul(1.3)
    )
    with pytest.raises(Unrecordable, match="computes other features"):
        ForwardCopy(network("small_cnn"), features_of, images(), BF16)


def test_float32_and_train_mode_are_the_models_own_to_the_bit() -> None:
    model = network("small_cnn")
    with torch.no_grad():
        wanted = model(images())
        assert torch.equal(FrozenForward("teacher", model, logits_of, None)(images()), wanted)
        model.train()
        found = FrozenForward("teacher", model, logits_of, BF16)(images())
        assert torch.equal(found, model(images()))


def test_changed_weights_are_copied_anew_and_equal_buffers_are_not() -> None:
    model = network("small_cnn")
    frozen = FrozenForward("teacher", model, logits_of, BF16)
    with torch.no_grad():
        frozen(images())
        first = frozen._copy
        for buffer in model.buffers():  # as processes that train together do
            buffer.copy_(buffer.clone())
        frozen(images())
        assert frozen._copy is first
        next(model.parameters()).mul_(2.0)
        assert off(frozen(images()), model(images())) < 0.02
        assert frozen._copy is not first


class Scaled(nn.Module):
    """A teacher with a plain number and a list of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.scale, self.shifts = network("small_cnn"), 1.0, [0.0]

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x * self.scale + self.shifts[0])


class Negated(Scaled):
    def forward(self, x: Tensor) -> Tensor:
        return -super().forward(x)


CHANGES: dict[str, Callable[[Scaled], object]] = {
    "past the counter": lambda m: next(m.net.parameters()).data.neg_(),
    "a number": lambda m: setattr(m, "scale", -2.0),
    "a number in a list": lambda m: m.shifts.__setitem__(0, 3.0),
    "a hook": lambda m: m.net.register_forward_hook(lambda module, args, out: -out),
    "a hook before": lambda m: m.net.register_forward_pre_hook(lambda module, args: (-args[0],)),
    "a forward": lambda m: setattr(m, "forward", lambda x: -m.net(x)),
    "a class": lambda m: setattr(m, "__class__", Negated),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_a_frozen_model_is_copied_anew(change: str) -> None:
    """Averages of weights are often written through `tensor.data`, which torch does not count."""
    model = Scaled().eval()
    frozen = FrozenForward("teacher", model, logits_of, BF16)
    with torch.no_grad():
        before = model(images())
        frozen(images())
        assert frozen._copy is not None and frozen._copy.is_current
        CHANGES[change](model)
        assert off(before, model(images())) > 0.1
        assert off(frozen(images()), model(images())) < 0.02
        assert frozen.reason is None


def negate(module: nn.Module, args: Any, out: Tensor) -> Tensor | None:
    return -out if isinstance(module, Scaled) else None


def by_method(patch: pytest.MonkeyPatch) -> None:
    forward = Scaled.forward
    patch.setattr(Scaled, "forward", lambda self, x: -forward(self, x))


def by_global_hook(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(nn.modules.module._global_forward_hooks, -1, negate)


def by_function(patch: pytest.MonkeyPatch) -> None:
    relu = torch.relu
    patch.setattr(torch, "relu", lambda x: relu(-x))


@pytest.mark.parametrize("change", [by_method, by_global_hook, by_function])
def test_changes_outside_of_a_frozen_model_are_seen(
    change: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Scaled().eval()
    frozen = FrozenForward("teacher", model, logits_of, BF16)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # says that the model runs itself
        before = model(images())
        frozen(images())
        assert frozen._copy is not None
        change(monkeypatch)
        assert off(before, model(images())) > 0.1
        assert off(frozen(images()), model(images())) < 0.02
    assert (frozen.reason is not None) == (change is by_function)


def tapped(model: nn.Module, x: Tensor) -> Tensor | None:
    attack = PGD(model, 8 / 255, 2 / 255, 1, precision="bf16", engine="compiled")
    return FeatureTap().features(attack.engine_for(x), model, x)


@pytest.mark.parametrize("normalized", [False, True])
def test_features_come_from_the_attacks_copy(normalized: bool) -> None:
    model: Any = network("wrn_10_2")
    model = Normalized(model, 0.5, 0.25) if normalized else model
    attack = PGD(model, 8 / 255, 2 / 255, 1, precision="bf16", engine="compiled")
    tap, before = FeatureTap(), dict(vars(model))
    for _ in range(2):
        with torch.no_grad():
            next(model.parameters()).mul_(1.1)
            found = tap.features(attack.engine_for(images()), model, images())
            assert found is not None
            assert off(found, model.forward_features(images())) < 0.02
    assert vars(model).keys() == before.keys()


class BeforeNorm(nn.Module):
    """Its features are changed on their way to the logits: folded, or overwritten."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = (
            nn.Conv2d(3, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.Linear(16, 4),
        )
        self.norm.running_mean.fill_(0.3)
        self.way = way

    def forward_features(self, x: Tensor) -> Tensor:
        return self.conv(x)

    def forward(self, x: Tensor) -> Tensor:
        features = self.forward_features(x)
        if self.way == "twice":
            features = features + self.forward_features(-x)
        x = features.relu_() if self.way == "overwritten" else torch.relu(self.norm(features))
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize("way", ["folded", "overwritten", "twice"])
def test_features_that_are_no_result_of_the_copy_are_not_taken_from_it(way: str) -> None:
    assert tapped(BeforeNorm(way).eval().requires_grad_(False), images()) is None


def test_features_without_the_split_or_by_the_live_model_are_not_taken() -> None:
    model = network("small_cnn")
    attack = PGD(model, 8 / 255, 2 / 255, 1, engine="eager")
    assert FeatureTap().features(attack.engine_for(images()), model, images()) is None
    assert tapped(Branches().eval(), images()) is None


def test_wrong_features_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plain: Callable[..., Any] = feature_tap.ForwardPass.__call__
    monkeypatch.setattr(
        feature_tap.ForwardPass, "__call__", lambda self, x: plain(self, x).mul(1.3)
    )
    assert tapped(network("small_cnn"), images()) is None
