"""Attacks and evaluations on the pretended GPU: those whose passes are recorded, and how often the host waits."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from attack_helpers import digits_test, robust_accuracy, trained_small_cnn
from attack_zoo import ATTACKS, RECORDED
from torch import Tensor, nn

import fastadv
from fastadv.attacks import Attack
from fastadv.engine import graphed_passes
from fastadv.engine.cuda_graph import CudaRecorder
from fastadv.evaluation import autoattack
from gpu_rehearsal.torch_cuda import host_waits

# A recording that fails falls back to a pass without one, with a warning.
pytestmark = pytest.mark.filterwarnings("error:fastadv attacks without a CUDA graph")


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """Records passes at their third call; the recordings made."""
    made: list[object] = []
    record = CudaRecorder.record

    def listed(self: CudaRecorder, work: Any) -> object:
        made.append(record(self, work))
        return made[-1]

    monkeypatch.setattr(CudaRecorder, "record", listed)
    monkeypatch.setattr(graphed_passes, "LONG", 2)
    yield made


def digits(count: int) -> tuple[nn.Module, Tensor, Tensor]:
    x, y = digits_test(count)
    return trained_small_cnn().cuda(), x.cuda(), y.cuda()


def without_recordings(attack: Attack, x: Tensor) -> Attack:
    engine: Any = attack.engine_for(x)
    engine.graphs = engine.passes = None
    return attack


@pytest.mark.parametrize("name", [name for name in ATTACKS if name not in RECORDED])
def test_recorded_passes_give_the_result_of_plain_ones(name: str, recordings: list[object]) -> None:
    model, x, y = digits(12)
    options: dict[str, Any] = {"precision": "bf16"}
    norm = {"norm": "l2"} if name == "cw-l2" else {}
    attack = ATTACKS[name](model, **norm, **options)
    plain = without_recordings(ATTACKS[name](model, **norm, **options), x)
    for call, count in enumerate((8, 12, 8)):
        adv, expected = (a(x[:count], y[:count], seed=call) for a in (attack, plain))
        assert torch.equal(adv, expected), call
        with torch.no_grad():
            next(model.parameters()).mul_(1.01)  # the next call sees other weights
    assert recordings


@pytest.mark.parametrize("name", ["pgd", "apgd-dlr-t", "fab-t", "square", "cw-l2"])
@pytest.mark.usefixtures("recordings")
def test_an_attack_is_as_strong_as_on_the_cpu(name: str) -> None:
    model, x, y = digits(64)
    norm = {"norm": "l2"} if name == "cw-l2" else {}
    attack = ATTACKS[name](model, **norm, seed=0)
    for _ in range(2):
        adv = attack(x, y)
    found = robust_accuracy(model, adv, y)
    on_cpu = trained_small_cnn()
    plain = ATTACKS[name](on_cpu, **norm, seed=0, engine="eager", precision="fp32")
    expected = robust_accuracy(on_cpu, plain(x.cpu(), y.cpu()), y.cpu())
    assert found == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_autoattack_counts_as_on_the_cpu(precision: str, recordings: list[object]) -> None:
    stages = ("apgd-ce", "fab-t")  # Square asks 5000 times
    counted = []
    for device in ("cuda", "cpu"):
        result = autoattack(
            trained_small_cnn().to(device),
            digits_test(8),
            eps=0.08,
            version=stages,
            device=device,
            engine="auto" if precision == "bf16" else "fp32",
        )
        counted.append(float(result.robust.float().mean()))
    assert counted[0] == pytest.approx(counted[1], abs=0.13)  # one image
    assert bool(recordings) == (precision == "bf16")


def test_a_replay_of_an_attack_waits_for_nothing_and_a_proof_three_times() -> None:
    """Once for the logits of the recording, and once for each of two gradients."""
    model, x, y = digits(16)
    attack = ATTACKS["pgd"](model, precision="bf16", seed=0, check_inputs=False)
    for _ in range(3):
        attack(x, y)
    with host_waits() as waits:
        attack(x, y)
    assert attack.last.engine == "graph"
    assert waits.count <= 3, waits.places


def test_weights_that_autocast_has_kept_are_not_recorded(recordings: list[object]) -> None:
    """A copy in a caller's autocast: its casts are kept for as long as the context, a recording for longer."""
    model, x, y = digits(8)
    attack = ATTACKS["pgd"](model, precision="bf16", seed=0)
    with torch.autocast("cuda", torch.bfloat16):
        model(x)
        for _ in range(2):
            attack(x, y)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.9)
    found = attack(x, y)
    fresh = without_recordings(ATTACKS["pgd"](model, precision="bf16", seed=0), x)
    assert torch.equal(found, fresh(x, y)) and recordings


class Products(nn.Module):
    """A network whose images, not only its weights, are cast by autocast: a product without weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.matmul(x, x.transpose(-1, -2)).flatten(1))


def test_images_that_autocast_has_kept_are_not_recorded(recordings: list[object]) -> None:
    """The recorded pass reads its images from one tensor, whose cast a caller's autocast would keep."""
    model, y = Products().cuda().eval(), torch.arange(8, device="cuda")
    attack = ATTACKS["apgd-ce"](model, precision="bf16")
    with torch.autocast("cuda", torch.bfloat16):
        for call in range(2):
            attack(torch.rand(8, 8, 8, device="cuda"), y, seed=call)
    x = torch.rand(8, 8, 8, device="cuda")
    fresh = without_recordings(ATTACKS["apgd-ce"](model, precision="bf16"), x)
    assert torch.equal(attack(x, y, seed=2), fresh(x, y, seed=2)) and recordings


class TakesTurns(nn.Module):
    """Two members of one structure, each for twelve calls."""

    def __init__(self) -> None:
        super().__init__()
        self.members = nn.ModuleList(nn.Linear(64, 10) for _ in range(2))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.members[self.calls // 12 % 2](x.flatten(1))


@pytest.mark.filterwarnings("ignore:fastadv attacks this model with the eager engine")
def test_members_that_take_turns_run_live() -> None:
    """A copy would be one of them for the whole of an attack."""
    x, model = torch.rand(8, 1, 8, 8, device="cuda"), TakesTurns().cuda()
    engine = ATTACKS["pgd"](model, precision="bf16").engine_for(x)
    assert engine.name == "eager" and "from call to call" in engine.reason


def test_a_dropped_model_leaves_no_memory() -> None:
    before = torch.cuda.memory_allocated()
    model, x, y = digits(8)
    attack = ATTACKS["pgd"](model, precision="bf16", seed=0)
    for _ in range(3):
        attack(x, y)
    del model, x, y, attack
    assert torch.cuda.memory_allocated() <= before + 4096  # constants that are kept


def test_an_evaluation_gives_no_warning() -> None:
    model, x, y = digits(32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = fastadv.evaluate(
            model,
            (x, y),
            ("clean", "pgd-5", "apgd-ce-5", "fab-5", "square-20"),
            eps=0.1,
            device="cuda",
            progress=False,
        )
    assert all(row.status == "ok" for row in report.rows)
