"""Modules whose ``train`` does more than to set the mode, and states of modules that torch itself restricts."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastadv

X = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(6) % 4


class Merging(nn.Module):
    """A low-rank adapter that is merged into its layer in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(288, 4)
        self.down, self.up = nn.Parameter(torch.randn(2, 288) / 9), nn.Parameter(torch.randn(4, 2))
        self.merged, self.calls = False, 0

    def train(self, mode: bool = True) -> Merging:
        super().train(mode)
        self.calls += 1
        if self.merged == mode:
            with torch.no_grad():
                self.layer.weight += (-1 if mode else 1) * self.up @ self.down
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if self.merged else self.layer(x) + x @ self.down.t() @ self.up.t()


class Frozen(nn.Module):
    """Freezes its first layer whenever its mode is set, and keeps its BatchNorm in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small()

    def train(self, mode: bool = True) -> Frozen:
        super().train(mode)
        self.net[0].weight.requires_grad_(False)
        self.net[1].eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def small(last: Callable[[], nn.Module] = lambda: nn.Linear(288, 4)) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), last())


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("engine", ["auto", "eager"])
def test_merged_weights_are_parted_again(engine: Any, mode: bool) -> None:
    model = small(Merging).train(mode)
    adapter = model[-1]
    before, calls = adapter.layer.weight.detach().clone(), adapter.calls
    attack = fastadv.PGD(model, steps=1, engine=engine)
    for used in (1, 2):
        attack(X, Y)
        assert adapter.training == mode and adapter.merged != mode
        assert torch.allclose(adapter.layer.weight, before, atol=1e-6)
        assert adapter.calls == calls + (2 * used if mode else 0)


def test_an_adapter_in_eval_mode_of_a_model_in_train_mode_stays_merged() -> None:
    model = small(Merging).train()
    model[-1].eval()
    fastadv.PGD(model, steps=1)(X, Y)
    assert model.training and not model[-1].training and model[-1].merged


class Deployed(nn.Module):
    """Does something else in eval mode, by an `eval` method of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small()
        self.sign = 1.0

    def eval(self) -> Deployed:
        self.sign = -1.0
        return super().eval()

    def train(self, mode: bool = True) -> Deployed:
        self.sign = 1.0 if mode else self.sign
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        return self.sign * self.net(x)


@pytest.mark.parametrize("engine", ["auto", "eager"])
def test_an_eval_method_of_its_own_is_called(engine: Any) -> None:
    model = Deployed().train()
    attack = fastadv.PGD(model, steps=2, random_start=False, engine=engine, precision="fp32")
    found = attack(X, Y)
    assert model.sign == 1.0 and model.training
    model.eval()
    assert model.sign == -1.0 and torch.equal(attack(X, Y), found)
    assert model.sign == -1.0 and not model.training


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("engine", ["auto", "eager"])
def test_what_may_be_trained_stays_so(engine: Any, mode: bool) -> None:
    model = Frozen().train(mode)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model.net[1].train()
    fastadv.PGD(model, steps=1, engine=engine)(X, Y)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.training == mode and model.net[1].training


@pytest.mark.parametrize("engine", ["auto", "eager"])
def test_an_expanded_buffer_is_put_back(engine: Any) -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = small()
            self.register_buffer("mean", torch.full((1, 1, 1), 0.3).expand(3, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            self.mean[:1] += 0.1
            return self.net(x - self.mean)

    model = Shifted().eval()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *args, **options: None)
        fastadv.PGD(model, steps=1, engine=engine)(X, Y)
    assert model.mean.stride(0) == 0 and torch.equal(model.mean, torch.full((3, 1, 1), 0.3))


@pytest.mark.filterwarnings("ignore")
def test_models_made_in_inference_mode_are_attacked_without_gradients() -> None:
    with torch.inference_mode():
        model = small().eval()
    attack = fastadv.Square(model, queries=3)
    assert torch.equal(attack(X, Y, seed=0), attack(X, Y, seed=0))
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.filterwarnings("ignore")
def test_frozen_scripts_have_no_mode() -> None:
    scripted = torch.jit.freeze(torch.jit.script(small().eval()))
    attack = fastadv.PGD(scripted, steps=2, random_start=False, precision="fp32")
    plain = fastadv.PGD(small().eval(), steps=2, random_start=False, precision="fp32")
    assert torch.allclose(attack(X, Y), plain(X, Y), atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_complex_logits_are_refused() -> None:
    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = small()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).to(torch.complex64)

    with pytest.raises(TypeError, match="model must return real logits"):
        fastadv.PGD(Complex().eval(), steps=1)(X, Y)


class Remembering(nn.Module):
    """Keeps features in containers, as hooks that collect them do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small()
        self.list: list[Tensor] = []
        self.dict: dict[str, Tensor] = {}
        self.deque: collections.deque[Tensor] = collections.deque(maxlen=3)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.net(x)
        self.list.append(logits.detach())
        self.dict["last"] = logits.detach()
        self.deque.append(logits.detach())
        return logits


def test_a_copy_leaves_no_trace_in_the_models_containers() -> None:
    """The passes that look for the operations alone have results without values, which must not stay."""
    model = Remembering().eval()
    wanted = [model(X) for _ in range(3)][-1]
    kept = [model.list, model.dict, model.deque]
    before = [list(model.list), dict(model.dict), list(model.deque)]
    attack = fastadv.PGD(model, steps=1, engine="fixed")
    for _ in range(2):
        attack(X, Y)
        assert attack.last.reason == "the model can be copied"
    now = [model.list, model.dict, model.deque]
    assert all(a is b for a, b in zip(kept, now, strict=True))
    assert [len(c) for c in now] == [3, 1, 3] and torch.equal(model.dict["last"], wanted)
    for old, new in zip((before[0], before[2]), (model.list, model.deque), strict=True):
        assert all(a is b for a, b in zip(old, new, strict=True))
