"""Passes that compute few values see each change of an operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attack_helpers import images, randomise
from foreign_models import conv
from test_cached_recording import Net, known
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastadv
from fastadv.engine import proof
from fastadv.engine.outline import outlined
from fastadv.engine.recorder import Recorder, record

pytestmark = pytest.mark.usefixtures("one_thread")


class _Other(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def _within(context: Callable[[], Any]) -> Callable[[Tensor], Tensor]:
    def after(h: Tensor) -> Tensor:
        with context():
            return h * 1

    return after


AFTER: dict[str, Callable[[Tensor], Tensor]] = {
    "another number": lambda h: h * 2,
    "a number of another type": lambda h: h * True,
    "another function": lambda h: h + 1,
    "another argument": lambda h: torch.mul(h, h),
    "an argument by keyword": lambda h: torch.mul(h, other=torch.ones(())),
    "an operation more": lambda h: h * 1 * 1,
    "an operation less": lambda h: h,
    "in place": lambda h: h.mul_(1),
    "no gradient": _within(torch.no_grad),
    "autocast": _within(lambda: torch.autocast("cpu", torch.bfloat16)),
    "a mode below": _within(_Other),
}


@pytest.mark.parametrize("way", AFTER)
def test_every_change_of_an_operation_is_seen(way: str) -> None:
    model, x = randomise(Net()), images(2)
    model.after = plain = lambda h: h * 1
    found = known(model, x)
    assert found.is_unchanged(model) and found.is_unchanged(model, gradients=False)
    model.after = AFTER[way]
    assert not found.is_unchanged(model)
    model.after = plain
    assert found.is_unchanged(model)


class AsksForGradients(nn.Module):
    """Names what tells whether gradients are computed, and may do something else without them."""

    def __init__(self, other: Callable[[Tensor], Tensor] | None) -> None:
        super().__init__()
        self.net, self.other = randomise(Net()), other

    def forward(self, x: Tensor) -> Tensor:
        if self.other is not None and not x.requires_grad:
            return self.other(self.net(x))
        return self.net(x)


@pytest.mark.parametrize("engine", ["compiled", "fixed"])
def test_a_model_that_asks_for_gradients_is_proven_without_its_values(
    monkeypatch: pytest.MonkeyPatch, engine: Any
) -> None:
    """Only where other operations run without gradients are logits compared."""
    model, x, compared = AsksForGradients(None).eval(), images(8), []
    plain = proof.agrees_without_gradients

    def counted(*args: Any) -> bool:
        compared.append(1)
        return plain(*args)

    monkeypatch.setattr(proof, "agrees_without_gradients", counted)
    precision: Any = "fp32" if engine == "compiled" else "bf16"
    attack = fastadv.PGD(model, precision=precision, engine=engine, steps=1)
    attack.engine_for(x)
    for _ in range(3):
        attack.engine_for(x)
    assert not compared
    model.other = lambda logits: logits.mul(1.0)
    for _ in range(3):
        attack.engine_for(x)
    assert len(compared) == 3
    model.other = lambda logits: logits.flip(1)
    if engine == "fixed":
        with pytest.warns(UserWarning, match="others where no gradients are computed"):
            assert attack.engine_for(x).name == "eager"
    else:
        with pytest.raises(ValueError, match="others where no gradients are computed"):
            attack.engine_for(x)


class Joins(nn.Module):
    def __init__(self, join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.join = conv(3, 8), conv(3, 8), join

    def forward(self, x: Tensor) -> Tensor:
        return self.join(self.first(x), self.second(x)[:, :, :, :1]).mean((2, 3))


JOINS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "the last axis": lambda a, b: torch.cat([a, b], -1),
    "a keyword": lambda a, b: torch.cat((a, b, a), dim=3),
    "the images": lambda a, b: torch.cat([a, a]),
    "channels-last": lambda a, b: torch.cat(
        [a.contiguous(memory_format=torch.channels_last), b], 3
    ),
    "addcmul": lambda a, b: torch.addcmul(b, a, b, value=0.5),
}


@pytest.mark.parametrize("way", JOINS)
def test_joined_tensors_have_their_shapes_without_values(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ran, plain = Joins(JOINS[way]).eval(), [], Recorder.call
    like, whole = (record(model, images(size), careful=False) for size in (3, 8))

    def counted(self: Any, func: Any, args: Any, kwargs: Any) -> Any:
        ran.append(func.__name__)
        return plain(self, func, args, kwargs)

    monkeypatch.setattr(Recorder, "call", counted)
    found = outlined(model, images(8), like, careful=False)
    assert found is not None and found.ops == whole.ops and not {"cat", "addcmul"} & set(ran)
    for mine, theirs in zip(found.values, whole.values, strict=True):
        assert (mine.shape, mine.stride()) == (theirs.shape, theirs.stride())
