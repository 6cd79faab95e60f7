"""Engines that nobody uses any more give their memory back at once, without Python's search for reference cycles.

That search goes by the number of new objects, not by their size. A loop that makes a model or an attack for each
batch would else hold the weights and buffers of many dead copies, also on a GPU, whose allocator starts no search.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import pytest
import torch
from attack_helpers import images
from attack_zoo import ATTACKS, WAYS
from graph_emulator import EmulatedRecorder
from torch import Tensor, nn

import fastadv
from fastadv.engine.copy_engines import CopyEngine
from fastadv.engine.first_recordings import tape_now
from fastadv.engine.forward_copy import ForwardCopy


class Attention(nn.Module):
    """A small transformer, whose program has other steps than those of convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 32, 4, 4)
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.scale = nn.Parameter(torch.full((32,), 0.5))
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        return self.head((self.scale * self.layer(tokens)).mean(1))


def convolutions() -> nn.Module:
    """A small network with BatchNorm."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
    )


MODELS: dict[str, Callable[[], nn.Module]] = {"convolutions": convolutions, "attention": Attention}


@pytest.fixture
def no_search() -> Iterator[None]:
    """Nobody looks for reference cycles meanwhile."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def tensors() -> int:
    """The number of tensors that are alive."""
    return sum(isinstance(found, Tensor) for found in gc.get_objects())


def left_by(work: Callable[[], object]) -> int:
    """The number of tensors that a function's second call leaves."""
    work()
    gc.collect()
    before = tensors()
    work()
    return tensors() - before


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("network", MODELS)
def test_a_dropped_model_takes_its_copy_with_it(no_search: None, network: str, way: str) -> None:
    x, y = images(4), torch.arange(4)

    def work() -> None:
        model = MODELS[network]().eval()
        fastadv.pgd_fused(model, x[:, :1], y, steps=1, **WAYS[way])

    assert left_by(work) == 0


@pytest.mark.parametrize("name", ["pgd", "apgd-dlr", "square", "cw-l2", "fab-t"])
def test_a_dropped_attack_takes_its_copy_with_it(no_search: None, name: str) -> None:
    x, y, model = images(4)[:, :1], torch.arange(4), convolutions().eval()
    norm = "l2" if name == "cw-l2" else "linf"

    def work() -> None:
        ATTACKS[name](model, norm, engine="compiled", precision="fp32")(x, y)

    assert left_by(work) == 0


def test_a_dropped_engine_takes_its_recorded_passes_with_it(no_search: None) -> None:
    model, x = convolutions().eval(), images(4)[:, :1]

    def work() -> None:
        tape, recording = tape_now(model, x)
        engine = CopyEngine(tape, recording, "fp32", "the reason", inductor=False)
        passes = engine.record_passes(EmulatedRecorder())
        for _ in range(70):
            engine.gradient(x, lambda logits: logits[:, 0])
        assert passes._recorded["gradient"]

    assert left_by(work) == 0


@pytest.mark.parametrize("network", MODELS)
def test_a_dropped_forward_copy_gives_its_memory_back(no_search: None, network: str) -> None:
    model, x = MODELS[network]().eval(), images(4)[:, :1]

    def work() -> None:
        ForwardCopy(model, lambda model, x: model(x), x, torch.bfloat16)(x)

    assert left_by(work) == 0
