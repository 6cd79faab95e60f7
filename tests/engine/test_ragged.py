"""Networks in which the size of a tensor depends on values: early exits, and rules on bright pixels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastadv

pytestmark = pytest.mark.usefixtures("one_thread")

X = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.9


class Branches(nn.Module):
    """A short and a deep classifier, of which a rule decides."""

    def __init__(self, rule: Callable[[Branches, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.short = nn.Linear(16, 4)
        self.deep = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(16 * 64, 4)
        self.rule = rule
        self.limit = 0.3

    def unsure(self, h: Tensor) -> Tensor:
        return self.short(h.mean((2, 3))).softmax(1).amax(1) < self.limit

    def forward(self, x: Tensor) -> Tensor:
        return self.rule(self, x, self.stem(x).relu())


def exits_by_length(m: Branches, x: Tensor, h: Tensor) -> Tensor:
    out, todo = m.short(h.mean((2, 3))), m.unsure(h).nonzero(as_tuple=True)[0]
    if len(todo) == 0:
        return out
    deep = m.deep(h[todo])
    return out.index_put((todo,), m.head(deep.view(deep.size(0), -1)))


def exits_by_shape(m: Branches, x: Tensor, h: Tensor) -> Tensor:
    out, kept = m.short(h.mean((2, 3))), h[m.unsure(h)]
    return out if kept.shape[0] == 0 else out + m.head(m.deep(kept)).mean(0)


def looks_for_bright_pixels(m: Branches, x: Tensor, h: Tensor) -> Tensor:
    bright = torch.nonzero(x.detach() > 0.95).size(0) > 0
    return m.short(h.mean((2, 3))) if bright else m.head(m.deep(h))


def counts_images(m: Branches, x: Tensor, h: Tensor) -> Tensor:
    several = (x.detach() > 0.95).flatten(1).any(1).nonzero().numel() > 1
    return m.short(h.mean((2, 3))) if several else m.head(m.deep(h))


def splits(m: Branches, x: Tensor, h: Tensor) -> Tensor:
    return sum((m.head(m.deep(part)) for part in h[m.unsure(h)].split(1)), m.short(h.mean((2, 3))))


def by_mask_alone(m: Branches, x: Tensor, h: Tensor) -> Tensor:
    out, todo = m.short(h.mean((2, 3))).clone(), m.unsure(h)
    out[todo] = m.head(m.deep(h[todo]))
    return out


READING = [exits_by_length, exits_by_shape, looks_for_bright_pixels, counts_images, splits]


@pytest.mark.parametrize("rule", READING)
@pytest.mark.filterwarnings("ignore:fastadv attacks this model with the eager engine")
def test_a_network_that_reads_such_a_size_runs_live(rule) -> None:
    model = Branches(rule).eval()
    attack = fastadv.PGD(model, 0.03, 0.01, 3, random_start=False)
    attack(X, torch.arange(6) % 4)
    assert attack.last.engine == "eager"
    assert "a size that depends on values" in attack.last.reason


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_network_that_reads_no_such_size_is_copied(share: float) -> None:
    """Also where no image, or each of them, is left for the deep branch."""
    model = Branches(by_mask_alone).eval()
    with torch.no_grad():
        h = model.stem(X).relu()
        sureness = model.short(h.mean((2, 3))).softmax(1).amax(1)
    model.limit = float(sureness.quantile(share)) + (0.1 if share == 1 else 0)
    attack = fastadv.PGD(model, steps=1, precision="fp32", engine="compiled")
    engine, leaf = attack.engine_for(X), X.clone().requires_grad_()

    def value_of(z: Tensor) -> Tensor:
        return F.cross_entropy(z, torch.arange(6) % 4, reduction="none")

    (wanted,) = torch.autograd.grad(value_of(model(leaf)).sum(), leaf)
    with engine.session(model, 0):
        found = engine.gradient(engine.images(X), value_of).grad
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-4)


def test_a_mask_of_the_models_own_decides_no_size() -> None:
    class Chosen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("kept", torch.tensor([True, False, True]))
            self.fc = nn.Linear(128, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = x[:, self.kept]
            return self.fc(x.reshape(x.shape[0], -1))

    attack = fastadv.PGD(Chosen(), steps=1, precision="fp32", engine="compiled")
    assert attack.engine_for(X).name == "compiled"
