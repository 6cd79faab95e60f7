"""The default device and the default dtype of somebody else's program change nothing."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fastadv
from fastadv import compat

_MAKERS = {
    *("zeros", "ones", "full", "empty", "arange", "tensor", "linspace", "logspace"),
    *("rand", "randn", "randint", "randperm", "normal", "eye", "as_tensor"),
}
_FLOATS = {"zeros", "ones", "empty", "linspace", "rand", "randn", "eye"}
_OF_THE_MODEL = {"cost.py"}  # images of the dtype that a new network has


def network_and_images() -> tuple[nn.Module, Tensor, Tensor]:
    """A small network, and images that it has right."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4)
    ).eval()
    x = torch.rand(6, 3, 8, 8)
    return network, x, network(x).argmax(1)


@contextmanager
def default(what: str) -> Iterator[None]:
    if what == "device":
        with torch.device("meta"):
            yield
        return
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", ["pgd-2", "apgd-ce", "fab", "square", "autoattack"])
@pytest.mark.parametrize("what", ["device", "dtype"])
def test_an_evaluation(what: str, name: str) -> None:
    model, *data = network_and_images()

    def right() -> list[int]:
        return [
            r.correct for r in fastadv.evaluate(model, tuple(data), attacks=[name], eps=0.3).rows
        ]

    wanted = right()
    with default(what):
        assert right() == wanted


# Few steps, as each attack makes all its tensors in the first of them.
FEW: dict[str, dict[str, int]] = {"FAB": {"steps": 5}, "Square": {"queries": 100}}


@pytest.mark.parametrize("name", ["FAB", "Square", "APGD", "TPGD", "FFGSM"])
@pytest.mark.parametrize("what", ["device", "dtype"])
def test_attacks(what: str, name: str) -> None:
    model, x, y = network_and_images()
    for place in (fastadv, compat):
        if not hasattr(place, name):
            continue
        others = {"queries": "n_queries"} if place is compat else {}
        few = {others.get(setting, setting): value for setting, value in FEW.get(name, {}).items()}
        torch.manual_seed(0)
        wanted = getattr(place, name)(model, **few)(x, y)
        assert not torch.equal(wanted, x)
        torch.manual_seed(0)
        with default(what):
            assert torch.allclose(getattr(place, name)(model, **few)(x, y), wanted, atol=1e-5)


def test_every_new_tensor_has_a_device_and_a_dtype_of_its_own() -> None:
    """Else it has the caller's default one, which is CUDA in many programs."""
    found = []
    for path in sorted(Path(fastadv.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            maker, named = node.func, {keyword.arg for keyword in node.keywords}
            if not isinstance(maker.value, ast.Name) or maker.value.id != "torch" or None in named:
                continue
            wanted = {"device"} if maker.attr in _MAKERS else set()
            if maker.attr in _FLOATS and path.name not in _OF_THE_MODEL:
                wanted.add("dtype")
            if not wanted <= named:
                found.append(f"{path.name}:{node.lineno} {ast.unparse(node)[:60]}")
    assert not found, "\n".join(found)
