"""What the caller has entered or set around an attack: modes over torch's functions, caches, swapped tensors."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastadv
from fastadv.engine.frozen import frozen

pytestmark = pytest.mark.usefixtures("one_thread")

X, Y = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(5) % 4


def small() -> nn.Sequential:
    torch.manual_seed(0)
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), *head).eval()


class OtherFunction(TorchFunctionMode):
    """Has another function run in place of ReLU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.relu:
            return F.softplus(args[0]).sin()
        return func(*args, **(kwargs or {}))


class Coarse(TorchDispatchMode):
    """Rounds what ReLU gives, as an emulated number format does."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return out.clamp(max=0.05) if func is torch.ops.aten.relu.default else out


@pytest.mark.parametrize("mode", [OtherFunction, Coarse])
def test_the_callers_mode_is_attacked_with_the_model(
    mode: Callable[[], AbstractContextManager[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastadv.engine.selection.fast_bf16", lambda device: False)
    model = small()
    used = fastadv.PGD(model, steps=3, random_start=False)
    plain = fastadv.PGD(model, steps=3, random_start=False, precision="fp32", engine="eager")
    without = used(X, Y)
    assert torch.equal(used(X, Y), without)
    engine = used.last.engine
    with mode():
        wanted = plain(X, Y)
        found = (used(X, Y), fastadv.PGD(model, steps=3, random_start=False)(X, Y))
        assert not torch.equal(wanted, without)
        assert all(torch.equal(images, wanted) for images in found)
        assert used.last.engine == "eager" and mode.__name__ in used.last.reason
        with pytest.raises(ValueError, match=mode.__name__):
            fastadv.PGD(model, steps=1, engine="compiled")(X, Y)
    assert torch.equal(used(X, Y), without) and used.last.engine == engine != "eager"


def test_modes_that_change_nothing_leave_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastadv.engine.selection.fast_bf16", lambda device: False)
    attack = fastadv.PGD(small(), steps=1)
    with torch.device("cpu"), fastadv.backend("native"):
        attack(X, Y)
    assert attack.last.engine == "compiled"


class Squashed(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.tanh()


@pytest.mark.parametrize("engine", ["auto", "eager"])
def test_cached_weights_of_a_parametrization_keep_their_gradient(engine: Any) -> None:
    model = small().train()
    parametrize.register_parametrization(model[0], "weight", Squashed())
    attack = fastadv.PGD(model, steps=1, engine=engine)
    attack(X, Y)
    for images in (X, X[:3]):
        model.zero_grad()
        with parametrize.cached():
            adv = attack(images, Y[: len(images)])
            F.cross_entropy(model(adv), Y[: len(images)]).backward()
        assert model[0].parametrizations.weight.original.grad is not None


@pytest.mark.parametrize("precision", ["auto", "fp32"])
def test_weights_can_be_swapped_after_attacks_of_a_training(precision: Any) -> None:
    """As `Module.to` does where torch is told to swap; torch refuses tensors with weak references."""
    model = small()
    attack = fastadv.PGD(model, steps=1, precision=precision)
    for _ in range(4):
        attack(X, Y)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.01)
    weight = model[0].weight
    torch.utils.swap_tensors(weight, nn.Parameter(-weight.detach()))
    attack(X, Y)


def test_buffers_that_did_not_change_are_not_written() -> None:
    """Their memory may be that of a file that was opened for reading."""
    written: list[str] = []

    class Watch(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            written.extend([func.__name__] if func.__name__.endswith("_") else [])
            return func(*args, **(kwargs or {}))

    model = small()
    with Watch(), frozen(model, freeze_parameters=False):
        pass
    assert "copy_" not in written
    with Watch(), frozen(model, freeze_parameters=False):
        model[1].running_mean.add_(1)
    assert "copy_" in written and torch.equal(model[1].running_mean, torch.zeros(8))


def test_an_attack_within_a_compiled_step_is_no_part_of_its_graphs() -> None:
    """Torch's compiler would go through the attack's own code for half a minute."""
    model, graphs = small(), []
    attack = fastadv.PGD(model, steps=2, seed=0)

    def step(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(attack(x, y)), y)

    def backend(graph: torch.fx.GraphModule, example: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    assert torch.allclose(torch.compile(step, backend=backend)(X, Y), step(X, Y))
    assert len(graphs) == 1  # what follows the attack
