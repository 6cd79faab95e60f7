"""Corners of a program's steps, where a gradient once was lost, or a program was not used."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from attack_helpers import copy_of, randomise
from paths import environment
from program_helpers import program_gradient
from torch import Tensor, nn

import fastadv
from fastadv.engine import cpu_convolution as convolution
from fastadv.engine.copy_engines import ProgramEngine
from fastadv.engine.cpu_program import Program

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not convolution.available(), reason="programs need the compiled part"),
]

Y = torch.arange(2)


class Base(nn.Module):
    """Layers for the networks below."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.context = nn.Conv2d(16, 16, 1)
        self.last = nn.Conv2d(16, 16, 3, padding=1)
        self.fc = nn.Linear(16, 4)

    def classify(self, h: Tensor) -> Tensor:
        return self.fc(self.last(h).relu().mean((2, 3)))


class Spectral(Base):
    """A weak branch through complex numbers beside a plain one."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        f = torch.fft.rfft2(h) * torch.linspace(0, 1, h.shape[-1] // 2 + 1)
        return self.classify(h + 0.1 * torch.fft.irfft2(f, s=h.shape[-2:]))


class Context(Base):
    """The result of a convolution is spread over a map by the addition behind it."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).relu()
        return self.classify(h + self.context(h.mean((2, 3), keepdim=True)))


class RectifiedContext(Base):
    """The same with a ReLU, which a program makes part of the step."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).relu()
        return self.classify((self.context(h.amax((2, 3), keepdim=True)) + h).relu())


class Root(Base):
    """The root of a ReLU's result, whose slope at 0 is infinite."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).relu()
        return self.fc(h.repeat(1, 1, 2, 1).sqrt().sum((2, 3)))


@pytest.mark.parametrize("kind", [Spectral, Context, RectifiedContext, Root])
def test_gradients_are_the_live_models(kind: type[Base]) -> None:
    torch.manual_seed(0)
    model, x = randomise(kind()).eval(), torch.rand(2, 3, 9, 10)
    leaf = x.clone().requires_grad_()
    wanted = model(leaf)
    (gradient,) = torch.autograd.grad(F.cross_entropy(wanted, Y, reduction="sum"), leaf)
    program = Program(copy_of(model, x, torch.float32, pack=True))
    for _ in range(2):
        logits, found = program_gradient(
            program, x.contiguous(memory_format=torch.channels_last), Y
        )
        torch.testing.assert_close(logits, wanted.detach(), atol=1e-4, rtol=1e-4)
        assert (found - gradient).norm() < 1e-4 * gradient.norm()


@pytest.mark.parametrize("kind", [Spectral, Context, RectifiedContext, Root])
def test_they_run_as_programs(kind: type[Base]) -> None:
    torch.manual_seed(0)
    attack = fastadv.PGD(kind().eval(), steps=1, precision="fp32", engine="compiled")
    assert isinstance(attack.engine_for(torch.rand(2, 3, 9, 10)), ProgramEngine)


_FIRST_CALL = """
import sys
import torch
import fastadv

model = torch.nn.Sequential(
    torch.nn.Conv2d(1, 16, 3), torch.nn.MaxPool2d(2), torch.nn.Flatten(), torch.nn.Linear(144, 4)
)
fastadv.PGD(model.eval(), steps=1, engine="compiled")(torch.rand(2, 1, 8, 8), torch.arange(2))
print(*(name for name in ("sympy", "torch._dynamo") if name in sys.modules))
"""


def test_first_call_imports_no_symbolic_shapes() -> None:
    """`torch.autograd.grad` does, where gradients are given, for half a second."""
    command = [sys.executable, "-c", _FIRST_CALL]
    found = subprocess.run(
        command, capture_output=True, text=True, env=environment(), timeout=300, check=True
    )
    assert not found.stdout.strip()
