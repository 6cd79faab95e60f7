"""Replays of a program's passes: the same bits as the program's own, and refused where they would not be."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from attack_helpers import copy_of, randomise, refresh
from replay_helpers import images_of, is_replayed, pass_of
from torch import Tensor, nn

from fastadv.engine import cpu_channels, cpu_steps_rows, replayed_program
from fastadv.engine import cpu_convolution as convolution
from fastadv.engine.cpu_program import Program
from fastadv.engine.cpu_steps import LinearStep
from fastadv.engine.cpu_steps_rows import RowsLinearStep
from fastadv.engine.replayed_program import ReplayedProgram
from fastadv.models import create_model

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not convolution.available(), reason="programs need the compiled part"),
]


@pytest.fixture(autouse=True)
def _replay_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replay passes however little it saves."""
    monkeypatch.setattr(replayed_program, "_WORTH", 0.0)


class Mixed(nn.Module):
    """Steps under autograd, a residual, a sum of branches, layers of one's own arithmetic, and several results."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 24, 3, padding=1)
        self.norm = nn.BatchNorm2d(24)
        self.down = nn.Conv2d(24, 32, 3, stride=2, padding=1, bias=False)
        self.grouped = nn.Conv2d(32, 32, 3, padding=1, groups=4)
        self.rows = nn.LayerNorm(32)
        self.mixing = nn.Linear(32, 96)
        self.scale = nn.Parameter(torch.rand(32, 1, 1) + 0.5)
        self.last = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first((x - 0.4) / 0.2)))
        x = F.relu(self.down(x))
        x = F.gelu(self.grouped(x)) * self.scale + x * torch.sigmoid(x.mean((2, 3), keepdim=True))
        tokens = self.rows(x.flatten(2).transpose(1, 2))
        q, k, v = self.mixing(tokens).chunk(3, dim=-1)
        mixed = F.scaled_dot_product_attention(q, k, v)
        joined = torch.cat([mixed, tokens], dim=1)
        joined = joined + torch.tensor(0.25)
        return self.last(F.softmax(joined, -1).mean(1) + x.amax((2, 3)))


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(16 + 8 * i) for i in range(4))
        self.convs = nn.ModuleList(nn.Conv2d(16 + 8 * i, 8, 3, padding=1) for i in range(3))
        self.last = nn.Linear(40, 5)

    def forward(self, x: Tensor) -> Tensor:
        results = [self.stem(x)]
        for norm, conv in zip(self.norms, self.convs, strict=False):
            results.append(conv(F.relu(norm(torch.cat(results, 1)))))
        return self.last(F.relu(self.norms[3](torch.cat(results, 1))).mean((2, 3)))


def patches() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 24, 4, 4), nn.GELU(), nn.Conv2d(24, 32, 3, 2, 1), nn.ReLU(),
        nn.Conv2d(32, 32, 5, padding=2, groups=32), nn.Hardswish(), nn.Flatten(),
        nn.Linear(32 * 4, 5),
    )  # fmt: skip


# model and the shape of an image
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]] = {
    "small_cnn, grey": (lambda: create_model("small_cnn", 5, 1), (1, 8, 8)),
    "small_cnn": (lambda: create_model("small_cnn", 5, 3), (3, 12, 12)),
    "preact_resnet18": (lambda: create_model("preact_resnet18", 5, 3), (3, 8, 8)),
    "mixed": (Mixed, (3, 9, 7)),
    "dense": (Dense, (3, 8, 8)),
    "patches": (patches, (3, 14, 13)),
}
DTYPES = [
    torch.float32,
    pytest.param(
        torch.bfloat16,
        marks=pytest.mark.skipif(not cpu_channels.available(), reason="no AVX512-BF16"),
    ),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_replays_have_the_bits_of_the_programs_own_passes(name: str, dtype: torch.dtype) -> None:
    make, shape = MODELS[name]
    torch.manual_seed(0)
    model = randomise(make()).eval()
    example = images_of((2, *shape), 0)
    own = Program(copy_of(model, example, dtype, pack=True))
    program = ReplayedProgram(Program(copy_of(model, example, dtype, pack=True)))
    for turn in range(6):
        for count in (3, 1):  # of which the first one makes the memory
            x = images_of((count, *shape), 10 * turn + count)
            for found, wanted in zip(pass_of(program, x, True), pass_of(own, x), strict=True):
                assert torch.equal(found, wanted)
            assert torch.equal(program.forward(x, False)[0], own.forward(x)[0])
    for count, with_gradient in ((3, True), (3, False), (1, True)):
        assert is_replayed(program, images_of((count, *shape), 0), with_gradient)


@pytest.mark.parametrize("name", MODELS)
def test_replays_follow_new_weights(name: str) -> None:
    make, shape = MODELS[name]
    torch.manual_seed(0)
    model = randomise(make()).eval()
    x = images_of((2, *shape), 0)
    copies = [copy_of(model, x, torch.float32, pack=True) for _ in range(2)]
    own, program = Program(copies[0]), ReplayedProgram(Program(copies[1]))
    for turn in range(3):
        for _ in range(4):
            for found, wanted in zip(pass_of(program, x, True), pass_of(own, x), strict=True):
                assert torch.equal(found, wanted)
        assert is_replayed(program, x), turn
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight), alpha=0.05)
        for copied in copies:
            refresh(copied, model, x)
        program.refresh()


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="oneDNN packs the weights")
def test_new_weights_are_packed_once_and_not_in_each_replay(monkeypatch) -> None:
    packed = []

    def pack(weight: Tensor) -> Tensor:  # in float32, which every processor can pack
        packed.append(weight)
        return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())

    def product(x: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, weights, bias, "none", [], "")

    monkeypatch.setattr(cpu_steps_rows, "_packed", pack)
    monkeypatch.setattr(cpu_steps_rows, "_product", product)
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Flatten(), nn.Linear(192, 400, bias=False)),
        images_of((2, 3, 8, 8), 0),
    )
    copied = copy_of(model, x, torch.float32, pack=True)
    inner = Program(copied)
    inner._steps = [
        RowsLinearStep(step.node, step._part, step._x) if isinstance(step, LinearStep) else step
        for step in inner.steps
    ]
    program = ReplayedProgram(inner)
    # One pass with the first weights, so that the pass with the next ones, which packs them, is the recorded one.
    for passes in (1, 5, 5):
        with torch.no_grad():
            model[1].weight.normal_()
        refresh(copied, model, x)
        program.refresh()
        for _ in range(passes):
            logits, gradient = pass_of(program, x, True)
            torch.testing.assert_close(logits, model(x))
            weights = torch.linspace(-1, 2, logits.numel()).view_as(logits)
            torch.testing.assert_close(gradient.flatten(1), weights @ model[1].weight)
    assert is_replayed(program, x)
    assert len(packed) == 3 * 2  # forward and backward
    (kind,) = program._kinds.values()
    assert kind.recording is not None and kind.recording.holds_replaced
    assert not any("reorder" in str(call.operator) for call in kind.recording.calls)


class Sparse(nn.Module):
    """Weights in a sparse layout, whose memory a copy of other weights replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.filled = torch.rand(5, 192)

    def forward(self, x: Tensor) -> Tensor:
        weight = (self.filled * (self.filled > 0.5)).to_sparse()
        return torch.sparse.mm(weight, x.flatten(1).t()).t()


def test_replays_follow_new_sparse_weights() -> None:
    torch.manual_seed(0)
    model, x = Sparse(), images_of((3, 3, 8, 8), 0)
    copied = copy_of(model, x, torch.float32, pack=True)
    program = ReplayedProgram(Program(copied))
    for _ in range(3):
        for _ in range(4):
            _, gradient = pass_of(program, x, True)
            leaf = x.clone().requires_grad_()
            weights = torch.linspace(-1, 2, 15).view(3, 5)
            (wanted,) = torch.autograd.grad((model(leaf) * weights).sum(), leaf)
            assert torch.allclose(gradient, wanted, atol=1e-5)
        assert is_replayed(program, x)
        model.filled = torch.rand(5, 192)
        refresh(copied, model, x)
        program.refresh()


class Rows(nn.Module):
    """Reads the rows of an image. The gradient of its LSTM does not take the tensors that a recording shows."""

    def __init__(self) -> None:
        super().__init__()
        self.reader, self.last = nn.LSTM(24, 6, batch_first=True), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.reader(x.permute(0, 2, 1, 3).flatten(2))[0][:, -1])


def test_passes_whose_replay_fails_run_as_they_are() -> None:
    torch.manual_seed(0)
    model, x = Rows().eval(), images_of((3, 3, 8, 8), 0)
    program = ReplayedProgram(Program(copy_of(model, x, torch.float32, pack=True)))
    leaf = x.clone().requires_grad_()
    weights = torch.linspace(-1, 2, 15).view(3, 5)
    (wanted,) = torch.autograd.grad((model(leaf) * weights).sum(), leaf)
    for _ in range(5):
        assert torch.allclose(pass_of(program, x, True)[1], wanted, atol=1e-6)


@pytest.mark.parametrize("warm", [0, 1, 2, 3, 4])
def test_a_pass_within_another_one_does_not_spoil_it(warm: int) -> None:
    torch.manual_seed(0)
    model, x = randomise(Mixed()).eval(), images_of((3, 3, 8, 8), 0)
    others = images_of((2, 3, 8, 8), 1)
    copied = copy_of(model, x, torch.float32, pack=True)
    own, program = Program(copied), ReplayedProgram(Program(copied))
    weights = torch.linspace(-1, 2, 15).view(3, 5)
    wanted = own.backward(own.forward(x)[1], weights)
    assert wanted is not None
    for _ in range(warm):
        pass_of(program, x, True)
    _, started = program.forward(x, True)
    within = pass_of(program, others, True)
    gradient = program.backward(started, weights)
    assert gradient is not None and torch.equal(gradient, wanted)
    for found, kept in zip(pass_of(program, others, True), within, strict=True):
        assert torch.equal(found, kept)


def test_a_larger_batch_and_a_release_forget_the_replays() -> None:
    model, example = create_model("small_cnn", 5, 3).eval(), images_of((2, 3, 8, 8), 0)
    own = Program(copy_of(model, example, torch.float32, pack=True))
    program = ReplayedProgram(Program(copy_of(model, example, torch.float32, pack=True)))
    for count in (2, 5):
        x = images_of((count, 3, 8, 8), count)
        assert not is_replayed(program, x)
        for _ in range(4):
            assert torch.equal(pass_of(program, x, True)[1], pass_of(own, x)[1])
        assert is_replayed(program, x)
    assert not is_replayed(program, images_of((2, 3, 8, 8), 0))
    program.release()
    assert not is_replayed(program, x)
    assert torch.equal(pass_of(program, x, True)[1], pass_of(own, x)[1])


def test_replays_of_many_shapes_are_forgotten_in_turn(monkeypatch) -> None:
    monkeypatch.setattr(replayed_program, "_KINDS", 2)
    model, example = create_model("small_cnn", 5, 3).eval(), images_of((4, 3, 8, 8), 0)
    program = ReplayedProgram(Program(copy_of(model, example, torch.float32, pack=True)))
    for count in (4, 3, 2):
        for _ in range(4):
            pass_of(program, example[:count], True)
    replayed = [is_replayed(program, example[:count]) for count in (2, 3, 4)]
    assert replayed == [True, True, False]


def test_passes_that_gain_little_are_not_replayed(monkeypatch) -> None:
    monkeypatch.setattr(replayed_program, "_WORTH", float("inf"))
    model, x = create_model("small_cnn", 5, 3).eval(), images_of((2, 3, 8, 8), 0)
    program = ReplayedProgram(Program(copy_of(model, x, torch.float32, pack=True)))
    for _ in range(4):
        pass_of(program, x, True)
    assert not is_replayed(program, x)
