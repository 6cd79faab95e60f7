"""Classifiers of 3x8x8 images that are switched by what no module attribute shows, each with its switch."""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from foreign_models import Pooled, conv
from torch import Tensor, nn

GAIN = SimpleNamespace(value=1.0)
gain = 1.0


class Mode(enum.Enum):
    """Which of two branches runs."""

    FIRST = 0
    SECOND = 1


@dataclass
class Config:
    """A configuration object, nested."""

    mode: Mode = Mode.FIRST
    scale: float = 1.0
    inner: dict[str, Any] = field(default_factory=lambda: {"names": {"plain"}})


class Switched(nn.Module):
    """A network that reads its configuration in every place that Python offers."""

    shift = 0.0  # an attribute of the class

    def __init__(self) -> None:
        super().__init__()
        self.net = Pooled(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU())
        self.other = Pooled(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU())
        self.config = Config()
        self.array = np.ones(3, dtype=np.float32)
        self.activation = functools.partial(F.leaky_relu, negative_slope=0.9)
        self.count = 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        x = x * float(self.array[0]) + self.shift
        x = x * self.config.scale * GAIN.value * gain
        if "inverted" in self.config.inner["names"]:
            x = 1 - x
        net = self.net if self.config.mode is Mode.FIRST else self.other
        return self.activation(net(x))


def _set_global(value: float) -> None:
    globals()["gain"] = value


def _set_forward(forward: Callable[..., Any]) -> None:
    Switched.forward = forward  # type: ignore[method-assign]


_plain_forward = Switched.forward


def _halved(self: Switched, x: Tensor) -> Tensor:
    return _plain_forward(self, x.flip(3)) * 0.5


def _with_global_hook(model: nn.Module) -> Any:
    def hook(module: nn.Module, args: Any, out: Any) -> Any:
        return out.flip(1) if isinstance(module, nn.Linear) else None

    return torch.nn.modules.module.register_module_forward_hook(hook)


def _set(owner: Any, name: str, value: Any) -> None:
    setattr(owner, name, value)


# What switches a model, and what undoes that where it is not the model's own.
Switch = Callable[[Switched], Any]
SWITCHES: dict[str, tuple[Switch, Callable[[Any], object]]] = {
    "an Enum": (lambda m: _set(m.config, "mode", Mode.SECOND), lambda _: None),
    "a field of a dataclass": (lambda m: _set(m.config, "scale", 2.0), lambda _: None),
    "a set within a dict": (lambda m: m.config.inner["names"].add("inverted"), lambda _: None),
    "an element of an array": (lambda m: m.array.__setitem__(0, 0.5), lambda _: None),
    "a global object": (
        lambda m: _set(GAIN, "value", 3.0),
        lambda _: _set(GAIN, "value", 1.0),
    ),
    "a global number": (lambda m: _set_global(3.0), lambda _: _set_global(1.0)),
    "a class attribute": (
        lambda m: _set(Switched, "shift", 0.7),
        lambda _: _set(Switched, "shift", 0.0),
    ),
    "the forward of the class": (
        lambda m: _set_forward(_halved),
        lambda _: _set_forward(_plain_forward),
    ),
    "keywords of a partial": (
        lambda m: m.activation.keywords.update(negative_slope=-0.9),
        lambda _: None,
    ),
    "a hook on all modules": (_with_global_hook, lambda handle: handle.remove()),
    "a weight of other shape": (
        lambda m: _set(m.net, "fc", nn.Linear(8, 6)),
        lambda _: None,
    ),
    "weights exchanged": (lambda m: _set(m, "net", m.other), lambda _: None),
}
