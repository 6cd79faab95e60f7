"""A loss that attacks the network whose gradient it is asked for, as one that compares two attacks does."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from attack_helpers import images
from torch import Tensor, nn

import fastadv

pytestmark = pytest.mark.usefixtures("one_thread")

X, Y, OTHERS = images(5), torch.arange(5) % 4, images(5, seed=1)


class Rows(nn.Module):
    """A network of matrix products, which runs live."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(24, 16)
        layers = (nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.GELU()) for _ in range(12))
        self.layers, self.last = nn.ModuleList(layers), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x.permute(0, 2, 1, 3).flatten(2))
        for layer in self.layers:
            h = h + layer(h)
        return self.last(h.mean(1))


def convolutions() -> nn.Module:
    """Fused layers, whose ReLUs are masked by activations in the program's memory."""
    second = (nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU())
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4))
    return nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU(), *second, *head)


class WithinItself:
    """A cross-entropy that attacks the network while it is computed, if it is on."""

    def __init__(self) -> None:
        self.attack: fastadv.PGD | None = None
        self.is_on, self.count, self.kept = False, 0, []

    def __call__(self, logits: Tensor, y: Tensor) -> Tensor:
        before = logits.detach().clone()
        if self.is_on and self.attack is not None:
            self.is_on = False
            self.attack(OTHERS, Y)
            self.is_on, self.count = True, self.count + 1
        assert torch.equal(logits, before)  # not overwritten by the passes of the attack within
        self.kept.append((logits.detach(), before))
        return F.cross_entropy(logits, y, reduction="none")


@pytest.mark.parametrize(
    ("make", "engine", "precision"),
    [
        (convolutions, "auto", "auto"),
        (convolutions, "compiled", "fp32"),
        (convolutions, "compiled", "bf16"),
        (Rows, "auto", "auto"),
        (Rows, "compiled", "fp32"),
    ],
)
def test_a_loss_may_attack_the_same_network(make, engine: str, precision: str) -> None:
    torch.manual_seed(0)
    model, loss = make().eval(), WithinItself()
    options = {"steps": 3, "random_start": False, "engine": engine, "precision": precision}
    attack = fastadv.PGD(model, loss=loss, **options)
    loss.attack = fastadv.PGD(model, **options)
    loss.attack.share_engines(attack)
    wanted = attack(X, Y)
    loss.is_on = True
    for _ in range(5):  # passes of a program are recorded, checked and then replayed
        assert torch.equal(attack(X, Y), wanted)
    assert loss.count >= 15
    assert all(torch.equal(logits, before) for logits, before in loss.kept)
