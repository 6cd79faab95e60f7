"""Functions of torch that others have replaced: the model is attacked as it then is, and each runs once."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attack_helpers import images
from torch import Tensor, nn

import fastadv
from fastadv.engine.replaced_functions import replaced_function

pytestmark = pytest.mark.usefixtures("one_thread")

X, Y = images(5), torch.arange(5) % 4


class Small(nn.Module):
    """Calls a method of tensors, functions of `torch.nn.functional`, and through them functions of `torch`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()
        self.last = nn.Linear(288, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.relu(self.norm(self.conv(x.sigmoid()))).flatten(1))


def shifted(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function that gives something else when it runs twice."""

    @functools.wraps(original, assigned=("__name__",))
    def replacement(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return original(torch.roll(x, 1, -1), *args, **kwargs)

    return replacement


def direction(model: Callable[[Tensor], Tensor]) -> Tensor:
    leaf = X.clone().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(model(leaf), Y, reduction="sum"), leaf)[0].sign()


HOMES = {"torch": torch, "torch.nn.functional": F, "torch.Tensor": torch.Tensor}


@pytest.mark.parametrize(
    "name",
    [
        "torch.relu",
        "torch.nn.functional.batch_norm",
        "torch.nn.functional.conv2d",
        "torch.Tensor.sigmoid",
    ],
)
@pytest.mark.parametrize("precision", ["auto", "fp32"])
@pytest.mark.parametrize("as_function", [False, True])
def test_a_replaced_function_is_attacked(
    name: str, precision: str, as_function: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, _, function = name.rpartition(".")
    monkeypatch.setattr("fastadv.engine.selection.fast_bf16", lambda device: False)
    torch.manual_seed(0)
    model = Small().eval()
    attacked = (lambda x: model(x)) if as_function else model
    attack = fastadv.PGD(
        attacked,
        0.01,
        0.01,
        1,
        False,
        bounds=(-1.0, 2.0),
        precision=precision,  # type: ignore[arg-type]
    )

    def agreement() -> float:
        wanted = direction(model)
        return float(((attack(X, Y) - X).sign() == wanted).float().mean())

    for _ in range(3):
        assert agreement() > 0.99
    usual = None if as_function else attack.last.engine
    before = direction(model)
    with monkeypatch.context() as patch:
        patch.setattr(HOMES[place], function, shifted(getattr(HOMES[place], function)))
        assert float((direction(model) == before).float().mean()) < 0.9
        for _ in range(4):  # the first pass is watched for other reasons than the later ones
            assert agreement() > 0.99
            assert attack.last.engine == "eager"
        if not as_function and precision == "auto":
            assert f"replaces {name} " in attack.last.reason
    for _ in range(2):
        assert agreement() > 0.99
    assert usual in (None, attack.last.engine)


def test_what_torch_itself_brings_is_no_replacement(monkeypatch: pytest.MonkeyPatch) -> None:
    assert replaced_function() is None
    monkeypatch.setattr(torch.Tensor, "of_ours", lambda self: self, raising=False)
    assert replaced_function() is None  # replaces nothing
    monkeypatch.setattr(F, "gelu", F.gelu)
    assert replaced_function() is None
    monkeypatch.setattr(F, "gelu", F.silu)
    assert replaced_function() == "torch.nn.functional.gelu"


@pytest.mark.parametrize(
    "place, name",
    [(torch, "compile"), (torch, "load"), (torch, "save"), (torch.Tensor, "__repr__")],
)
def test_functions_that_compute_nothing_may_be_replaced(
    place: object, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, name, lambda *args: None)
    assert replaced_function() is None


def test_what_others_replaced_before_the_import_is_found() -> None:
    from fastadv.engine.replaced_functions import _Home

    class Place:
        relu = staticmethod(shifted(torch.relu))
        einsum = torch.einsum
        helper = staticmethod(shifted(torch.abs))

    Place.relu = Place.__dict__["relu"].__func__  # type: ignore[method-assign]

    class BuiltIn:
        relu = torch.relu

    assert _Home("torch", Place, BuiltIn).replaced() == "torch.relu"


EARLIER = """
import sys, torch, torch.nn.functional as F
place = {"F": F, "torch": torch, "Tensor": torch.Tensor}[sys.argv[1]]
original = getattr(place, sys.argv[2])
def theirs(x, *args, **kwargs):
    return original(x * x.abs(), *args, **kwargs)
theirs.__name__ = sys.argv[2]
F.of_ours = theirs  # replaces nothing
if sys.argv[3] == "replaced":
    setattr(place, sys.argv[2], theirs)
import fastadv
from fastadv.engine.replaced_functions import replaced_function
from torch import nn
torch.manual_seed(0)
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(288, 4)
    def forward(self, x):
        x = F.interpolate(x, scale_factor=1.0) + x.norm(dim=1, keepdim=True)
        x = x + torch.einsum("bchw,bdhw->bchw", x, x)
        return self.last(F.relu(self.norm(self.conv(x))).flatten(1))
model, x, y = Model().eval(), torch.rand(4, 3, 8, 8), torch.arange(4)
leaf = x.clone().requires_grad_()
wanted = torch.autograd.grad(F.cross_entropy(model(leaf), y), leaf)[0].sign()
for attacked in (model, lambda x: model(x)):
    attack = fastadv.PGD(attacked, 0.01, 0.01, 1, False, bounds=(-1.0, 2.0))
    for _ in range(2):
        assert float(((attack(x, y) - x).sign() == wanted).float().mean()) > 0.99
print(replaced_function())
"""


@pytest.mark.parametrize(
    ("place", "name", "found"),
    [
        ("F", "relu", "torch.nn.functional.relu"),
        ("F", "batch_norm", "torch.nn.functional.batch_norm"),
        ("F", "interpolate", "torch.nn.functional.interpolate"),
        ("Tensor", "norm", "torch.Tensor.norm"),
        ("", "", "None"),
    ],
)
def test_a_function_in_python_that_was_replaced_before_the_import_is_attacked(
    place: str, name: str, found: str
) -> None:
    """Such functions hand themselves to a mode by their name, so that the replacement ran twice."""
    words = [place, name, "replaced"] if name else ["F", "relu", "left alone"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", EARLIER, *words], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == found
