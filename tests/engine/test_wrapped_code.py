"""Models with code that runs again, or bears no watching: checkpointing, control flow, compiled functions."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastadv
from fastadv.engine.recorder import Recorder

pytestmark = pytest.mark.usefixtures("one_thread")

X, Y = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(4)


class Body(nn.Module):
    """A network with BatchNorm, which tells the modes apart."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x).mean((2, 3)))


class Checkpointed(Body):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(checkpoint(self.body, x, use_reentrant=False).mean((2, 3)))


def test_a_checkpointed_model_in_train_mode_is_copied() -> None:
    """Differentiation runs its body again, when the recording is over."""
    model = Checkpointed().train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    attack = fastadv.PGD(model, steps=2, random_start=False, precision="fp32", engine="compiled")
    found = attack(X, Y)
    plain = Body()
    plain.load_state_dict(model.state_dict())
    wanted = fastadv.PGD(plain, steps=2, random_start=False, precision="fp32")(X, Y)
    assert ((found - wanted).abs() < 1e-6).float().mean() > 0.99
    assert model.training and all(torch.equal(b, before[n]) for n, b in model.named_buffers())


class Conditional(Body):
    """Torch's operator for a condition, which is compiled where it stands."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.cond(x.mean() > 0.4, lambda t: 2 * t, lambda t: t + 0, (x,)))


def test_a_model_that_cannot_be_recorded_runs_live(monkeypatch) -> None:
    monkeypatch.setattr("fastadv.engine.selection.fast_bf16", lambda device: False)
    attack = fastadv.PGD(Conditional().eval(), steps=1)
    with pytest.warns(UserWarning, match="with the eager engine"):
        attack(X, Y)
    assert attack.last.engine == "eager"


class Unwatched(Body):
    """Fails where somebody watches torch's functions."""

    def forward(self, x: Tensor) -> Tensor:
        if any(isinstance(m, Recorder) for m in torch.overrides._get_current_function_mode_stack()):
            raise RuntimeError("watched")
        return super().forward(x)


def test_a_model_that_fails_while_it_is_recorded_runs_live() -> None:
    attack = fastadv.PGD(Unwatched().eval(), steps=1, precision="bf16")
    with pytest.warns(UserWarning, match="recording it fails: watched"):
        attack(X, Y)
    assert attack.last.engine == "eager"


def test_a_model_that_fails_by_itself_raises_its_own_error() -> None:
    with pytest.raises(RuntimeError, match="channels"):
        fastadv.PGD(Body(), steps=1)(X[:, :2], Y)


class CallsCompiled(Body):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(scaled(x))


_GRAPHS: list[torch.fx.GraphModule] = []


def noting(graph: torch.fx.GraphModule, inputs: Any) -> Any:
    _GRAPHS.append(graph)
    return graph.forward


@torch.compile(backend=noting)
def scaled(x: Tensor) -> Tensor:
    return F.relu(2 * x - 0.1)


def test_compiled_functions_are_recorded_as_they_are_written() -> None:
    """The compiler would otherwise compile the recorder as well."""
    attack = fastadv.PGD(CallsCompiled().eval(), steps=1, precision="fp32", engine="compiled")
    assert attack.engine_for(X).name == "compiled"
    assert not _GRAPHS


class AttributeDict(dict[str, Any]):
    """Raises KeyError for attributes that it does not have, as in many configurations."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


class Referred:
    pass


class OddObjects(Body):
    """Holds objects that bear no inspection by `hasattr` and `isinstance`."""

    def __init__(self) -> None:
        super().__init__()
        self.cfg = AttributeDict(scale=2.0)
        kept = Referred()
        self.gone = weakref.proxy(kept)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.cfg.scale * x)


class RandomOddObjects(OddObjects):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 0.01 * torch.rand_like(x))


def test_objects_that_bear_no_inspection() -> None:
    attack = fastadv.PGD(OddObjects().eval(), steps=1, precision="fp32", engine="compiled")
    attack(X, Y)
    assert attack.last.engine == "compiled"


@pytest.mark.filterwarnings("ignore:fastadv attacks this model with the eager engine")
def test_objects_that_bear_no_inspection_in_a_model_that_runs_live(monkeypatch) -> None:
    monkeypatch.setattr("fastadv.engine.selection.fast_bf16", lambda device: False)
    attack = fastadv.PGD(RandomOddObjects().eval(), steps=1)
    attack(X, Y)
    assert "draws random numbers" in attack.last.reason
