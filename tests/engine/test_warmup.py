"""Models that do something else in their first calls than ever after, such as fill a cache."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from attack_helpers import images, randomise
from foreign_models import Pooled, conv
from test_attack_copy import cosine
from torch import Tensor, nn

import fastadv
from fastadv.engine.copy_engines import EngineOnCopy, ProgramEngine
from fastadv.ops import linear_merger

pytestmark = pytest.mark.usefixtures("one_thread")

Y = torch.arange(8) % 4


class Cached(nn.Module):
    """Its first call gathers a bias and keeps it; in a dictionary, or in a buffer."""

    def __init__(self, keep: str) -> None:
        super().__init__()
        self.net = Pooled(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 8))
        self.bias = nn.Parameter(torch.randn(6))
        self.keep, self.kept = keep, {}
        self.register_buffer("late", None)

    def train(self, mode: bool = True) -> Cached:
        """Empty the cache, as some networks do whenever their mode is set."""
        self.kept = {}
        return super().train(mode)

    def gathered(self) -> Tensor:
        return self.bias[torch.tensor([0, 2, 4, 5])]

    def forward(self, x: Tensor) -> Tensor:
        if self.keep == "dictionary":
            if "bias" not in self.kept:
                self.kept["bias"] = self.gathered()
            return self.net(x) + self.kept["bias"]
        if self.late is None:
            self.late = self.gathered().detach()
        return self.net(x) + self.late


@pytest.mark.parametrize("keep", ["dictionary", "buffer"])
@pytest.mark.parametrize("training", [False, True])
def test_a_network_that_fills_a_cache_is_copied(keep: str, training: bool) -> None:
    torch.manual_seed(0)
    model, x = randomise(Cached(keep)).train(training), images(8)
    attack = fastadv.PGD(model, steps=1, engine="fixed")
    for number in range(4):
        if number == 2:
            with torch.no_grad():
                model.net.body[0].weight.mul_(-1)
        engine = attack.engine_for(x)
        assert isinstance(engine, EngineOnCopy)
        found = engine.gradient(engine.images(x), lambda z: z[:, 0] - z[:, 1])
        leaf, fresh = x.clone().requires_grad_(), model.eval()
        logits = fresh(leaf)
        (wanted,) = torch.autograd.grad((logits[:, 0] - logits[:, 1]).sum(), leaf)
        torch.testing.assert_close(found.logits, logits.detach(), atol=0.1, rtol=0.1)
        assert cosine(found.grad, wanted) > 0.98
        model.train(training)
        model.late = None


def test_one_call_is_enough_to_fill_a_cache() -> None:
    model, x = randomise(Cached("dictionary")).eval(), images(8)
    attack = fastadv.PGD(model, engine="fixed")
    calls: list[int] = []
    attack.engine_for(x)
    model.net.register_forward_pre_hook(lambda *_: calls.append(1))
    attack.engine_for(x)
    assert len(calls) == 2  # that one, and the one that is compared


class WarmsUp(Cached):
    """Its first calls in a row have other logits, which is no cache."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        out = self.net(x)
        return -out if self.calls <= 2 else out


@pytest.mark.filterwarnings("ignore:fastadv attacks this model with the eager engine")
def test_a_model_whose_first_logits_are_others_runs_live() -> None:
    model = randomise(WarmsUp("buffer")).eval()
    assert fastadv.PGD(model, steps=1).engine_for(images(8)).name == "eager"


class Indexed(nn.Module):
    """What a pass without values must not compute: whole numbers that depend on the images."""

    def __init__(self, read: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.read = Pooled(conv(3, 8), nn.ReLU(), conv(8, 8)), read

    def forward(self, x: Tensor) -> Tensor:
        out = self.net(x)
        return out + 0.1 * self.read(out)


@pytest.mark.parametrize(
    "read",
    [
        lambda z: torch.eye(4)[z.argmax(1)],
        lambda z: z.gather(1, z.sort(1)[1]),
        lambda z: torch.stack(z.topk(2, dim=1)[0].unbind(1), 1).repeat(1, 2),
        lambda z: z.clone().index_fill_(1, torch.tensor([1]), 0.5),
    ],
)
def test_places_that_depend_on_the_images_are_not_read(read: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model, x = randomise(Indexed(read)).eval(), images(8)
    attack = fastadv.PGD(model, steps=1, engine="fixed")
    for size in (8, 8, 5, 8):
        engine = attack.engine_for(x[:size])
        assert isinstance(engine, EngineOnCopy)
        found = engine.logits(engine.images(x[:size]))
        torch.testing.assert_close(found, model(x[:size]).detach(), atol=0.1, rtol=0.1)


class Joined(nn.Module):
    """A function of fastadv's own that takes a list of pooled maps."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([conv(3, 16), conv(3, 16)])
        self.merger = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        pooled = [part(x).relu().mean((2, 3)) for part in self.parts]
        return linear_merger(pooled, self.merger.weight, self.merger.bias)


def test_a_function_of_a_list_runs_in_a_program_and_is_remembered() -> None:
    torch.manual_seed(0)
    model, x = randomise(Joined()).eval(), images(8)
    attack = fastadv.PGD(model, steps=1, engine="fixed", precision="bf16")
    for _ in range(2):
        engine = attack.engine_for(x)
        assert isinstance(engine, ProgramEngine) and engine.precision == "bf16"
        assert engine.cached_recording is not None
        found = engine.logits(engine.images(x))
        torch.testing.assert_close(found, model(x).detach(), atol=0.1, rtol=0.1)
