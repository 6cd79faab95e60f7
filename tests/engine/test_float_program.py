"""The fused program in float32: it equals the live model, and "auto" takes it where bfloat16 is not fast."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from attack_helpers import copy_of, images, randomise
from torch import Tensor, nn

import fastadv
from fastadv.engine import cpu_convolution as convolution
from fastadv.engine import packed_convolution as packed
from fastadv.engine import precision
from fastadv.engine.copy_engines import CopyEngine, ProgramEngine
from fastadv.engine.cpu_program import Program
from fastadv.engine.precision import fast_bf16
from fastadv.models import create_model
from fastadv.models.wide_resnet import WideResNet

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not convolution.available(), reason="programs need the compiled part"),
]


class Odd(nn.Module):
    """Sizes that fill no vector and no tile, and what has no fused step."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.first = nn.Conv2d(3, 24, 3, padding=1)
        self.wide = nn.Conv2d(24, 32, 5, padding=2, bias=False)
        self.down = nn.Conv2d(32, 33, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(33, 33, 3, padding=1, groups=3)
        self.last = nn.Linear(33, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(self.norm(x)))
        x = torch.tanh(self.wide(x))
        x = F.relu(self.down(x) + 0.5)
        x = F.gelu(self.grouped(x)) + x * torch.sigmoid(x.mean((2, 3), keepdim=True))
        return self.last(x[:, :, 1:, 1:].amax((2, 3)) + x.mean((2, 3)))


def vgg_like() -> nn.Module:
    layers: list[nn.Module] = []
    for before, after in ((3, 16), (16, 32), (32, 32)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32 * 64, 5))


# model, images, their size
MODELS: dict[str, tuple[Callable[[], nn.Module], int, tuple[int, int]]] = {
    "resnet18": (lambda: create_model("resnet18", 10, 3), 2, (16, 16)),
    "preact_resnet18, one image": (lambda: create_model("preact_resnet18", 10, 3), 1, (16, 16)),
    "wide_resnet": (lambda: WideResNet(10, 2, 10, 3), 2, (16, 16)),
    "like VGG": (vgg_like, 3, (16, 16)),
    "odd": (Odd, 2, (13, 9)),
    "odd, one image": (Odd, 1, (7, 10)),
}


def made(name: str) -> tuple[nn.Module, Tensor]:
    make, count, size = MODELS[name]
    torch.manual_seed(0)
    return randomise(make()), torch.rand(count, 3, *size)


def assert_equals_the_live_model(program: Program, model: nn.Module, x: Tensor) -> None:
    leaf, y = x.clone().requires_grad_(), torch.arange(len(x))
    wanted = model.eval()(leaf)
    (gradient,) = torch.autograd.grad(F.cross_entropy(wanted, y, reduction="sum"), leaf)
    for _ in range(2):  # the second pass finds the memory of the first
        logits, run = program.forward(x.contiguous(memory_format=torch.channels_last))
        at_logits = logits.detach().clone().requires_grad_()
        F.cross_entropy(at_logits, y, reduction="sum").backward()
        assert at_logits.grad is not None
        found = program.backward(run, at_logits.grad)
        assert found is not None and found.dtype == torch.float32
        assert (logits - wanted).abs().max() <= 1e-4 * wanted.abs().max()
        cosines = F.cosine_similarity(found.double().flatten(1), gradient.double().flatten(1))
        assert cosines.min() > 0.9999
        lengths = found.flatten(1).norm(dim=1) / gradient.flatten(1).norm(dim=1)
        assert (lengths - 1).abs().max() < 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_program_equals_the_live_model(name: str) -> None:
    model, x = made(name)
    program = Program(copy_of(model, x, torch.float32, pack=True))
    assert_equals_the_live_model(program, model, x)


@pytest.mark.parametrize("lanes", [8, 0])
@pytest.mark.parametrize("name", ["preact_resnet18, one image", "odd"])
def test_program_on_other_processors(name: str, lanes: int, monkeypatch) -> None:
    if lanes > convolution.float_lanes():
        pytest.skip("this processor has no AVX2")
    monkeypatch.setattr(convolution, "float_lanes", lambda: lanes)
    model, x = made(name)
    assert_equals_the_live_model(Program(copy_of(model, x, pack=True)), model, x)


def test_program_where_no_kernel_serves(monkeypatch) -> None:
    monkeypatch.setattr(packed, "make_kernel", lambda *conv, **where: None)
    model, x = made("odd")
    assert_equals_the_live_model(Program(copy_of(model, x, pack=True)), model, x)


def forbid_bf16(monkeypatch) -> None:
    monkeypatch.setattr("fastadv.engine.selection.fast_bf16", lambda device: False)


def test_compiled_in_float32_is_the_program() -> None:
    model, x = made("like VGG")
    attack = fastadv.PGD(model, 0.03, 0.01, 2, precision="fp32", engine="compiled")
    assert isinstance(attack.engine_for(x), ProgramEngine)
    y = torch.arange(3)
    found, wanted = (
        fastadv.PGD(model, 0.03, 0.01, 2, precision="fp32", engine=engine)(x, y, seed=0)
        for engine in ("compiled", "eager")
    )
    assert ((found - wanted).abs() < 1e-6).float().mean() > 0.99
    attack(x, y)
    assert (attack.last.engine, attack.last.precision) == ("compiled", "fp32")


def test_float32_without_an_engine_named_is_the_live_model() -> None:
    model, x = made("like VGG")
    attack = fastadv.PGD(model, 0.03, 0.01, 2, precision="fp32")
    attack(x, torch.arange(3))
    assert (attack.last.engine, attack.last.precision) == ("eager", "fp32")
    assert "bit for bit" in attack.last.reason


def test_auto_takes_the_program_where_bf16_is_not_fast(monkeypatch) -> None:
    forbid_bf16(monkeypatch)
    model, x = made("like VGG")
    attack = fastadv.PGD(model, 0.03, 0.01, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attack(x, torch.arange(3))
        assert (attack.last.engine, attack.last.precision) == ("compiled", "fp32")
        assert isinstance(attack.engine_for(x), ProgramEngine)
        # Float64 has no program, and the live model has nothing to gain there.
        wide = fastadv.PGD(made("like VGG")[0].double(), 0.03, 0.01, 2)
        wide(x.double(), torch.arange(3))
        assert (wide.last.engine, wide.last.precision) == ("eager", "fp32")
        plain = fastadv.PGD(lambda z: model(z), 0.03, 0.01, 2)
        plain(x, torch.arange(3))
        assert (plain.last.engine, plain.last.precision) == ("eager", "fp32")


def test_what_cannot_be_copied_runs_live_where_bf16_is_not_fast(monkeypatch) -> None:
    forbid_bf16(monkeypatch)

    class Noisy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.flatten(1) + 0.1 * torch.rand_like(x.flatten(1)))

    attack = fastadv.PGD(Noisy(3 * 64, 4), 0.03, 0.01, 2)
    with pytest.warns(UserWarning, match="eager engine"):
        attack(images(2), torch.arange(2))
    assert (attack.last.engine, attack.last.precision) == ("eager", "fp32")


def test_a_gradient_that_bf16_gets_wrong_is_the_programs_in_float32() -> None:
    class Cancelling(nn.Module):
        """Two activations that differ in bits which bfloat16 has not."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.last = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.conv(x))
            return self.last(((x + 300) - 300).mean((2, 3)) * 10)

    torch.manual_seed(0)
    model, x = Cancelling().eval(), images(4)
    attack = fastadv.PGD(model, 0.03, 0.01, 2, precision="auto", engine="compiled")
    engine = attack.engine_for(x)
    assert isinstance(engine, ProgramEngine if engine.precision == "fp32" else CopyEngine)
    assert engine.precision == "fp32"
    assert "bf16" in engine.reason or not fast_bf16(x.device)  # else bf16 is not tried


def test_limited_instructions_are_those_of_a_smaller_processor() -> None:
    code = (
        "import torch, fastadv\n"
        "from fastadv.engine import cpu_convolution as c\n"
        "from fastadv.info import collect\n"
        "print(c.float_lanes(), c.supported(16, 16), c.amx_serves(32), collect()['precision']['cpu'])\n"
        "model = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.ReLU(),\n"
        "    torch.nn.Conv2d(16, 16, 3, padding=1), torch.nn.Flatten(), torch.nn.Linear(1024, 4))\n"
        "attack = fastadv.PGD(model, 0.1, 0.05, 2, engine='compiled')\n"
        "attack(torch.rand(2, 3, 8, 8), torch.arange(2))\n"
        "print(attack.last.engine, attack.last.precision)\n"
    )
    environment = {**os.environ, "FASTADV_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    lanes = min(convolution.float_lanes(), 8)
    assert done.stdout.splitlines() == [f"{lanes} False False fp32", "compiled fp32"]


def test_an_unknown_limit_is_refused(monkeypatch) -> None:
    monkeypatch.setenv("FASTADV_MAX_CPU_ISA", "AVX3")
    with pytest.raises(ValueError, match="FASTADV_MAX_CPU_ISA must be AVX2 or AVX512, got 'AVX3'"):
        precision.fast_bf16(torch.device("cpu"))
