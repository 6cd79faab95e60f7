"""Attacks on a CUDA device: a recorded graph gives what its steps give one by one, and stays valid."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attack_helpers import digits_test, images, randomise, robust_accuracy, trained_small_cnn
from attack_zoo import BALL_ATTACKS, RECORDED
from torch import Tensor, nn

import fastadv
from fastadv.attacks import Attack
from fastadv.engine.cuda_graph import CudaRecorder, padded_size
from fastadv.models.resnet import resnet18

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("same_algorithms"),
]


@pytest.fixture
def same_algorithms() -> Iterator[None]:
    """Convolutions that give the same bits at every call."""
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    yield
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The graphs recorded during the test."""
    made: list[object] = []
    record = CudaRecorder.record

    def listed(self: CudaRecorder, work: Callable[[], None]) -> object:
        made.append(record(self, work))
        return made[-1]

    monkeypatch.setattr(CudaRecorder, "record", listed)
    return made


def digits(count: int) -> tuple[nn.Module, Tensor, Tensor]:
    x, y = digits_test(count)
    return trained_small_cnn().cuda(), x.cuda(), y.cuda()


def step_by_step(attack: Attack, x: Tensor) -> Attack:
    """The attack without its graphs."""
    engine = attack.engine_for(x)
    assert engine.graphs is not None
    engine.graphs = None
    return attack


def pair(
    make: Callable[..., Attack], model: nn.Module, x: Tensor, **options: Any
) -> tuple[Attack, Attack]:
    """An attack that records at its second call of a size, and its steps one by one."""
    options = {"precision": "bf16", **options}
    return make(model, **options), step_by_step(make(model, **options), x)


def assert_same_report(attack: Attack, plain: Attack) -> None:
    assert attack.last.engine == "graph" and plain.last.engine == "compiled"
    assert attack.last.elements == plain.last.elements
    assert attack.last.counts.tolist() == plain.last.counts.tolist()
    assert attack.last.loss_per_step == pytest.approx(plain.last.loss_per_step, rel=1e-4)
    assert attack.last.outside_share == 0


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("name", RECORDED)
def test_a_replay_has_the_bits_of_its_steps(name: str, norm: str) -> None:
    model, x, y = digits(32)
    attack, plain = pair(BALL_ATTACKS[name], model, x, norm=norm)
    for call in range(3):
        adv, expected = attack(x, y, seed=call), plain(x, y, seed=call)
        assert torch.equal(adv, expected), f"call {call}"
    assert not torch.equal(adv, x)
    assert_same_report(attack, plain)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("loss", ["ce", "cw", "dlr", "kl"])
def test_every_loss_is_recorded_on_a_residual_net(loss: str, precision: str) -> None:
    torch.manual_seed(0)
    model = randomise(resnet18()).cuda()
    x, y = images(16, size=32).cuda(), torch.arange(16, device="cuda") % 10
    attack, plain = pair(fastadv.PGD, model, x, loss=loss, steps=4, precision=precision)
    for call in range(2):
        adv, expected = attack(x, y, seed=call), plain(x, y, seed=call)
    assert torch.equal(adv, expected)
    assert_same_report(attack, plain)


def test_nothing_that_changes_between_calls_needs_a_new_graph(recordings: list[object]) -> None:
    model, x, y = digits(32)
    attack, plain = pair(BALL_ATTACKS["pgd"], model, x)
    attack(x[:16], y[:16])
    calls: list[dict[str, Any]] = [
        {"seed": 1},
        {"seed": 2},
        {"seed": 1, "sample_ids": torch.arange(16, device="cuda") + 7},
        {"seed": 1, "eps": 0.03},
        {"seed": 1, "eps": torch.linspace(0.0, 0.1, 16, device="cuda")},
        {"seed": 1, "start": x[:16]},
        {"seed": 1},
    ]
    results = []
    for options in calls:
        results.append(attack(x[:16], y[:16], **options))
        assert torch.equal(results[-1], plain(x[:16], y[:16], **options)), options
    assert all(not torch.equal(results[0], other) for other in results[1:6])
    assert torch.equal(results[0], results[6])
    for _ in range(2):
        F.cross_entropy(model(x), (y + 1) % 10).backward()
        torch.optim.SGD(model.parameters(), lr=0.5).step()
        again = attack(x[16:], y[16:], seed=1)
        assert torch.equal(again, plain(x[16:], y[16:], seed=1))
    assert attack.last.engine == "graph" and len(recordings) == 1
    for alpha in (0.01, 0.02):  # one cache for all calls of the function
        options = {"alpha": alpha, "steps": 3, "seed": 1, "precision": "bf16"}
        for _ in range(2):
            adv = fastadv.pgd_fused(model, x[:16], y[:16], **options)
        other = fastadv.PGD(model, **{k: v for k, v in options.items() if k != "seed"}, seed=1)
        assert torch.equal(adv, step_by_step(other, x)(x[:16], y[:16]))
    assert len(recordings) == 2


def test_batches_of_any_size_share_graphs(recordings: list[object]) -> None:
    """As when ARREST attacks the images that have not drifted. What fills a batch up changes nothing."""
    model, x, y = digits(128)
    attack, plain = pair(BALL_ATTACKS["pgd"], model, x)
    ids = torch.arange(128, device="cuda")
    for seed, count in enumerate([128, 101, 97, 128, 103, 111, 60, 128, 98, 57, 1, 5]):
        size = padded_size(count)
        filled = torch.cat((x[:count], x[:1].expand(size - count, *x.shape[1:])))
        labels = torch.cat((y[:count], y[:1].expand(size - count)))
        adv = attack(x[:count], y[:count], seed=seed, sample_ids=ids[:count])
        expected = plain(filled, labels, seed=seed, sample_ids=ids[:size])[:count]
        if attack.last.engine == "graph":
            assert torch.equal(adv, expected), count
        assert attack.last.elements == attack.last.elements // count * count
        assert attack.last.outside_share == 0
    assert len(recordings) == 4  # of 104, 128, 64 and 8


def test_ghosts_are_not_counted() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).cuda()
    with torch.no_grad():
        model[1].weight[:, 32:] = 0  # so that half of every gradient is 0
    _, x, y = digits(16)
    attack, _ = pair(BALL_ATTACKS["pgd"], model, x)
    for _ in range(2):
        attack(x, y)
        attack(x[:11], y[:11])
    assert attack.last.engine == "graph"
    assert attack.last.zero_gradient_share == pytest.approx(0.5, abs=2e-3)  # bf16 may make zeros


def test_a_replay_does_not_wait_for_the_device() -> None:
    """The proof before it does: here one serves for all calls, as the model is said to stand still."""
    model, x, y = digits(16)
    attack = BALL_ATTACKS["pgd"](model, precision="bf16", seed=0, check_inputs=False)
    with attack.unchanged():
        for _ in range(2):
            attack(x, y)
        torch.cuda.set_sync_debug_mode("error")
        try:
            attack(x, y)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert attack.last.engine == "graph"


def test_a_replay_is_in_the_order_of_the_current_stream() -> None:
    model, x, y = digits(16)
    attack, plain = pair(BALL_ATTACKS["pgd"], model, x, seed=0)
    for _ in range(2):
        attack(x, y)
    expected = plain(x, y)
    late = torch.zeros_like(x)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(20_000_000)  # about 10 ms
        late.copy_(x)
        adv = attack(late, y, seed=0)
    torch.cuda.synchronize()
    assert torch.equal(adv, expected)


def test_random_state_and_model_are_as_before() -> None:
    model, x, y = digits(16)
    attack = BALL_ATTACKS["pgd"](model, precision="bf16", seed=0)
    before = torch.cuda.get_rng_state(), [p.clone() for p in model.parameters()]
    for _ in range(3):
        attack(x, y)
    assert torch.equal(torch.cuda.get_rng_state(), before[0])
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before[1], strict=True))
    assert all(p.requires_grad for p in model.parameters())


def test_a_failed_recording_leaves_a_working_attack(monkeypatch: pytest.MonkeyPatch) -> None:
    record = CudaRecorder.record

    def waiting(self: CudaRecorder, work: Callable[[], None]) -> object:
        def work_and_wait() -> None:
            work()
            torch.cuda.synchronize()  # not permitted while recording

        return record(self, work_and_wait)

    monkeypatch.setattr(CudaRecorder, "record", waiting)
    model, x, y = digits(16)
    stream = torch.cuda.current_stream()
    attack, plain = pair(BALL_ATTACKS["pgd"], model, x, seed=0)
    expected = plain(x, y)
    attack(x, y)
    with pytest.warns(UserWarning, match="without a CUDA graph: recording a CUDA graph failed"):
        assert torch.equal(attack(x, y), expected)
    assert torch.equal(attack(x, y), expected)
    assert attack.last.engine == "compiled" and torch.cuda.current_stream() == stream
    torch.rand(4, device="cuda")  # torch before 2.12 refuses to draw after such a failure,
    torch.cuda.empty_cache()  # and to free memory, unless it is helped
    required = BALL_ATTACKS["pgd"](model, precision="bf16", engine="graph")
    with pytest.raises(ValueError, match="got 'graph': recording a CUDA graph failed"):
        required(x, y)
    monkeypatch.undo()
    fresh = BALL_ATTACKS["pgd"](model, precision="bf16", seed=0)
    for _ in range(2):
        assert torch.equal(fresh(x, y), expected)
    assert fresh.last.engine == "graph"


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_compiled_copy_is_recorded_where_a_graph_is_asked_for(precision: str) -> None:
    model, x, y = digits(128)
    attack = fastadv.PGD(model, 0.08, 0.02, 10, engine="graph", precision=precision, seed=0)
    plain = fastadv.PGD(model, 0.08, 0.02, 10, engine="eager", precision="fp32", seed=0)
    for _ in range(2):
        adv = attack(x, y)
        assert attack.last.engine == "graph" and attack.last.reason == "asked for"
    expected = robust_accuracy(model, plain(x, y), y)
    assert robust_accuracy(model, adv, y) == pytest.approx(expected, abs=0.03)
    assert attack.last.outside_share == 0


def test_an_evaluation_counts_as_on_the_cpu() -> None:
    model, (x, y) = trained_small_cnn(), digits_test(200)
    attacks = ("clean", "fgsm", "pgd-10", "mim-5", "cw-5", "apgd-ce-10")
    reports = [
        fastadv.evaluate(model, (x, y), attacks, eps=0.1, device=device, progress=False)
        for device in ("cuda", "cpu")
    ]
    for name in attacks:
        on_gpu, on_cpu = (report[name] for report in reports)
        assert on_gpu.status == "ok"
        assert on_gpu.accuracy == pytest.approx(on_cpu.accuracy, abs=0.015), name
