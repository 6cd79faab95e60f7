"""What a recording can take: other people's ways to write a network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from attack_helpers import images, randomise
from foreign_models import Pooled, conv
from test_engine_proof import gradient, live_gradient, worst_cosine
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastadv
from fastadv.engine.first_recordings import tape_now
from fastadv.engine.recorder import record
from fastadv.models import create_model, small_cnn
from fastadv.models.wide_resnet import WideResNet

pytestmark = pytest.mark.usefixtures("one_thread")

Y = torch.arange(8) % 4


class Written(nn.Module):
    """A network whose forward pass is a function of the module and the images."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], **attributes: Any) -> None:
        super().__init__()
        self.net = Pooled(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU())
        self.conv = conv(3, 8)
        self.fc = nn.Linear(8, 4)
        self.register_buffer("mean", torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1))
        self.register_buffer("flag", torch.tensor(True))
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.own_forward = forward
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Any:
        return self.own_forward(self, x)


class _Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, beta: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.beta = beta
        return x * torch.sigmoid(beta * x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(ctx.beta * x)
        return grad * (s + ctx.beta * x * s * (1 - s)), None


class _StraightThrough(torch.autograd.Function):
    """Rounds with a gradient of its own, in the newer form of a separate context."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.round(8 * x) / 8

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


def on_device(m: Any, x: Tensor) -> Tensor:
    assert x.dim() == 4 and x.shape[-1] == 8
    return m.net(x - (m.mean.cuda() if x.is_cuda else m.mean))


def loops(m: Any, x: Tensor) -> Tensor:
    parts = [part * (1 + i) for i, part in enumerate(x.split(1, dim=1))]
    total = torch.zeros(x.size(0), 4)
    for i in range(x.shape[1]):
        total = total + m.net(torch.cat([parts[i]] * 3, 1))
    return total


def flattens(m: Any, x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    tokens = x.view(batch * channels, height * width).reshape(batch, channels, height, width)
    return m.net(tokens) + torch.arange(batch)[:, None].float() * 0


def filled(m: Any, x: Tensor) -> Tensor:
    out = torch.zeros(len(x), 3, 8, 8)
    out[:, 0] = x[:, 0] * 2
    out[:, 1:] = x[:, 1:] - 0.5
    return m.net(out)


def without_gradient(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        fixed = m.fc(m.conv(x).relu().mean((2, 3))).sigmoid()
    return m.net(x) * fixed


def kept(m: Any, x: Tensor) -> Tensor:
    m.features = m.net.body(x)
    return m.net.fc(m.features.mean((2, 3)))


def in_autocast(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return m.net(x)


def several(m: Any, x: Tensor) -> Tensor:
    a, b, c = x.unbind(1)
    low, high = torch.aminmax(m.conv(torch.stack([a, c, b], 1)), dim=3)
    return m.fc((low + high).mean(2)) + m.net(x)


COPIED: dict[str, Callable[[], nn.Module]] = {
    "branches on shape and device": lambda: Written(on_device),
    "loops over parts and channels": lambda: Written(loops),
    "views that count the images": lambda: Written(flattens),
    "written part by part": lambda: Written(filled),
    "autograd function": lambda: Written(lambda m, x: m.net(_Swish.apply(x, 1.5))),
    "autograd function with its own context": lambda: Written(
        lambda m, x: m.net(_StraightThrough.apply(x))
    ),
    "the value of a parameter": lambda: Written(lambda m, x: m.net(x * m.scale.item())),
    "a branch on a buffer": lambda: Written(lambda m, x: m.net(x if m.flag else 1 - x)),
    "checkpointing": lambda: Written(
        lambda m, x: m.net.fc(
            checkpoint(m.net.body, x, use_reentrant=False).mean((2, 3))  # type: ignore[union-attr]
        )
    ),
    "a part without gradient": lambda: Written(without_gradient),
    "numbers of numpy": lambda: Written(lambda m, x: m.net(x * np.float32(0.5) - np.int64(1))),
    "an operator with a gradient in Python": lambda: create_model("stack:2*small_cnn", 4, 3),
    "features kept": lambda: Written(kept),
    "several results": lambda: Written(several),
    "autocast within": lambda: Written(in_autocast),
    "an array as an argument": lambda: Written(
        lambda m, x: m.net(x - torch.tensor(m.array, dtype=x.dtype)), array=np.full((3, 1, 1), 0.3)
    ),
    "arrays and ranges as an index": lambda: Written(
        lambda m, x: m.net(x[:, m.order] + x[np.arange(len(x)) * 0][..., range(8)]),
        order=np.array([2, 0, 1]),
    ),
    "numpy attributes": lambda: Written(
        lambda m, x: m.net(x - torch.from_numpy(m.array)), array=np.full((3, 1, 1), 0.3, "f")
    ),
    "old weight_norm": lambda: Pooled(
        nn.utils.weight_norm(conv(3, 8)), nn.BatchNorm2d(8), nn.ReLU()
    ),
    "DataParallel within": lambda: nn.Sequential(
        nn.Identity(), nn.DataParallel(Pooled(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU()))
    ),
    "compiled within": lambda: nn.Sequential(
        nn.Identity(), torch.compile(Pooled(conv(3, 8), nn.ReLU()), backend="aot_eager")
    ),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", COPIED)
def test_it_is_copied_with_its_gradient(name: str) -> None:
    torch.manual_seed(0)
    model, x = randomise(COPIED[name]()), images(8)
    attack = fastadv.PGD(model, steps=2, precision="bf16", engine="compiled")
    adv = attack(x, Y)
    assert attack.last.engine == "compiled" and attack.last.precision == "bf16"
    assert (adv != x).any()
    assert worst_cosine(gradient(attack, model, x, Y), live_gradient(model, x, Y)) > 0.95
    for size in (1, 5):  # other batch sizes need no other engine
        assert (
            worst_cosine(
                gradient(attack, model, x[:size], Y[:size]),
                live_gradient(model, x[:size], Y[:size]),
            )
            > 0.9
        )


def test_what_bfloat16_has_not_is_copied_in_float32() -> None:
    """Complex numbers."""
    torch.manual_seed(0)
    model = Written(
        lambda m, x: m.fc(torch.complex(m.conv(x), m.conv(x.flip(3))).abs().mean((2, 3)))
    )
    attack, x = fastadv.PGD(model.eval(), steps=2), images(8)
    attack(x, Y)
    assert attack.last.engine == "compiled" and attack.last.precision == "fp32"
    assert worst_cosine(gradient(attack, model, x, Y), live_gradient(model, x, Y)) > 0.95


def mixes_images(m: Any, x: Tensor) -> Tensor:
    return m.net(x) if len(x) > 6 else m.net(1 - x)


def test_a_branch_on_the_number_of_images_is_followed() -> None:
    torch.manual_seed(0)
    model, x = randomise(Written(mixes_images)), images(8)
    attack = fastadv.PGD(model, precision="bf16")
    for size in (4, 8, 5, 7, 4, 8):
        part, y = x[:size], Y[:size]
        assert worst_cosine(gradient(attack, model, part, y), live_gradient(model, part, y)) > 0.95


def test_a_model_for_one_batch_size_alone_is_copied_for_it() -> None:
    torch.manual_seed(0)
    model = randomise(Written(lambda m, x: m.net(x.view(8, 3, 8, 8))))
    attack, x = fastadv.PGD(model, precision="bf16", steps=2), images(8)
    attack(x, Y)
    assert attack.last.engine == "compiled"
    assert worst_cosine(gradient(attack, model, x, Y), live_gradient(model, x, Y)) > 0.95


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("precision", ["auto", "fp32"])
def test_models_with_weights_in_16_bits_are_attacked(dtype: torch.dtype, precision: str) -> None:
    torch.manual_seed(0)
    model, x = randomise(small_cnn(4, 3)).to(dtype), images(8).to(dtype)
    attack = fastadv.PGD(model, 0.1, 0.03, 3, precision=precision)
    adv = attack(x, Y)
    assert adv.dtype == dtype and (adv != x).any() and attack.last.outside_share == 0


def wrapped() -> dict[str, Callable[[nn.Module], nn.Module]]:
    return {
        "DataParallel": nn.DataParallel,
        "AveragedModel": torch.optim.swa_utils.AveragedModel,
        "torch.compile": lambda m: torch.compile(m, backend="aot_eager"),
        "both": lambda m: nn.DataParallel(torch.compile(m, backend="aot_eager")),
    }


@pytest.mark.compiles
@pytest.mark.parametrize("name", wrapped())
def test_wrappers_run_on_the_same_fused_program(name: str) -> None:
    model, x = WideResNet(10, 1, 10, 3).eval(), images(2, size=8)
    plain = fastadv.PGD(model, precision="bf16", steps=1)
    attack = fastadv.PGD(wrapped()[name](model).eval(), precision="bf16", steps=1)
    engines: list[Any] = [a.engine_for(x) for a in (plain, attack)]
    kinds = [[type(step) for step in engine._program._steps] for engine in engines]
    assert kinds[0] == kinds[1]
    assert torch.equal(attack(x, Y[:2], seed=0), plain(x, Y[:2], seed=0))


def test_a_recording_holds_what_the_model_did() -> None:
    model, x = small_cnn(10, 3), images(4)
    tape, recording = tape_now(model, x)
    assert tape.describes(recording) and tape.only_batch is None
    assert tape.describes(record(model, images(7), careful=False))
    parameters = {id(p) for p in model.parameters()}
    assert parameters <= {id(t) for t in recording.values}


@pytest.mark.compiles
def test_an_exported_program_is_attacked_in_its_one_mode() -> None:
    torch.manual_seed(0)
    model, x = randomise(Pooled(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU())), images(4)
    program = torch.export.export(model, (x,)).module()
    attack = fastadv.PGD(program, precision="bf16")
    assert worst_cosine(gradient(attack, program, x, Y[:4]), live_gradient(model, x, Y[:4])) > 0.95


def test_a_single_image_has_its_own_proof() -> None:
    """torch's gradient of instance_norm for one image depends on the layout of the gradient that comes in."""
    torch.manual_seed(0)
    model = nn.Sequential(conv(3, 16), nn.InstanceNorm2d(16, affine=True), nn.Flatten(2))
    model.append(nn.Linear(64, 4)).append(nn.Flatten()).append(nn.Linear(64, 4))
    for size in (1, 2, 5):
        x, attack = images(size), fastadv.PGD(model.eval(), precision="bf16", engine="compiled")
        found, wanted = gradient(attack, model, x, Y[:size]), live_gradient(model, x, Y[:size])
        assert worst_cosine(found, wanted) > 0.95
        one = gradient(attack, model, x[:1], Y[:1])
        assert worst_cosine(one, wanted[:1]) > 0.95


@pytest.mark.parametrize("kind", [fastadv.PGD, fastadv.MIM, fastadv.APGD])
def test_a_start_outside_the_ball_is_brought_into_it_before_points_are_ranked(kind: Any) -> None:
    model, x = small_cnn(4, 3), images(4)
    options: dict[str, Any] = {} if kind is fastadv.APGD else {"keep": "best"}
    attack = kind(model, eps=0.06, steps=2, **options)
    adv = attack(x, Y[:4], start=1 - x)
    assert attack.last.outside_share == 0 and float((adv - x).abs().max()) <= 0.06 + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_result_has_the_layout_of_the_images(dtype: torch.dtype) -> None:
    model, x = small_cnn(4, 3), images(4).to(dtype)
    for given in (x, x.contiguous(memory_format=torch.channels_last)):
        adv = fastadv.PGD(model, steps=1)(given, Y[:4])
        assert adv.stride() == given.stride() and adv.dtype == dtype


class Passing(nn.Module):
    """Lets go of activations on its way, and writes to views of them."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.convs:
            x = layer(x).relu_()
            first, rest = x.split((1, 2), 1)
            x = torch.cat((first * 2, rest), 1).mul_(0.5)
        return x.mean(3).flatten(1)


def test_a_recording_of_a_whole_batch_keeps_no_activations() -> None:
    torch.manual_seed(0)
    model, x = Passing().eval(), images(16)
    whole = record(model, x, careful=False, gradients=False)
    few = record(model, x[:2], careful=False)
    for place, depends in enumerate(whole.depends):
        assert (whole.values[place].numel() == 0) == (depends or few.values[place].numel() == 0)
    assert torch.equal(whole.logits, model(x))
    tape, _ = tape_now(model, x)
    assert tape.describes(whole) and tape.describes(few)
    attack = fastadv.PGD(model, precision="bf16", engine="compiled", steps=1)
    for size in (16, 5, 9):  # each is recorded as a whole
        attack(images(size), torch.zeros(size, dtype=torch.int64))
