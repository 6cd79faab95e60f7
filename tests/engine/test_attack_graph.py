"""Attacks as recorded graphs: the same results and counters from static memory, whatever changes between calls."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attack_helpers import copy_engine, digits_test, trained_small_cnn
from attack_zoo import BALL_ATTACKS, RECORDED, classes_with
from graph_emulator import Devices, EmulatedRecorder, Operations
from torch import Tensor, nn

import fastadv
from fastadv.attacks import Attack
from fastadv.attacks.batch import AttackBatch
from fastadv.engine import cuda_graph as graph
from fastadv.engine import proof
from fastadv.engine.copy import AttackCopy
from fastadv.engine.copy_engines import CopyEngine
from fastadv.engine.cuda_graph import GraphCache, padded_size
from fastadv.engine.request import EngineRequest

pytestmark = pytest.mark.usefixtures("one_thread")


def install(monkeypatch: pytest.MonkeyPatch, recorder: Any) -> None:
    """Make the engines that a GPU would have, without its compiler."""

    def candidates(tape: Any, recording: Any, precision: str, request: EngineRequest) -> Any:
        made = CopyEngine(tape, recording, precision, "the reason", inductor=False)
        if request.engine != "compiled":
            made.graphs = GraphCache(recorder, classes=10, required=request.engine == "graph")
        yield lambda: made

    monkeypatch.setattr("fastadv.engine.selection.candidates", candidates)
    monkeypatch.setattr("fastadv.engine.selection._obstacle", lambda *_: None)
    # On a GPU no engine is timed against another.
    monkeypatch.setattr("fastadv.engine.choice.is_open", lambda engine: False)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> EmulatedRecorder:
    """What the engines of the test record with."""
    made = EmulatedRecorder()
    install(monkeypatch, made)
    return made


def assert_same_report(attack: Attack, plain: Attack) -> None:
    assert attack.last.engine == "graph" and plain.last.engine == "compiled"
    assert attack.last.elements == plain.last.elements
    assert attack.last.counts.tolist() == plain.last.counts.tolist()
    assert attack.last.loss_per_step == pytest.approx(plain.last.loss_per_step, rel=1e-5)
    assert attack.last.outside_share == 0


def assert_same_result(
    make: Callable[..., Attack], model: nn.Module, sizes: tuple[int, ...], **options: Any
) -> None:
    """A recorded attack against the same one step by step, on batches of several sizes."""
    x, y = digits_test(sum(sizes))
    attack = make(model, engine="graph", **options)
    plain = make(model, engine="compiled", **options)
    ids = torch.arange(len(x)) + 50
    for call, rows in enumerate(torch.arange(len(x)).split(list(sizes))):
        batch, labels = x[rows], y[rows]
        adv = attack(batch, labels, seed=call, sample_ids=ids[rows])
        expected = plain(batch, labels, seed=call, sample_ids=ids[rows])
        assert torch.equal(adv, expected), f"call {call}"
        assert not torch.equal(adv, batch)
        assert_same_report(attack, plain)


@pytest.mark.covering(facts=classes_with("norm"))
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("name", RECORDED)
def test_a_replay_gives_what_the_copy_gives(
    recorder: EmulatedRecorder, name: str, norm: str
) -> None:
    make = BALL_ATTACKS[name]
    assert_same_result(make, trained_small_cnn(), (16, 11, 16), norm=norm, precision="fp32")
    assert recorder.count == 1


@pytest.mark.parametrize("loss", ["cw", "dlr", "kl"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_every_loss_is_recorded_in_narrow_precision(
    recorder: EmulatedRecorder, precision: str, loss: str
) -> None:
    make = BALL_ATTACKS["pgd"]
    assert_same_result(make, trained_small_cnn(), (16, 12), loss=loss, precision=precision)
    assert recorder.count == 1


def test_targets_and_vectors_are_recorded(recorder: EmulatedRecorder) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10)).eval()
    x, y = torch.rand(12, 20), torch.arange(12) % 10
    options: dict[str, Any] = dict(targeted=True, precision="fp32", seed=3)
    attack = fastadv.PGD(model, 0.1, 0.02, 4, engine="graph", **options)
    plain = fastadv.PGD(model, 0.1, 0.02, 4, engine="compiled", **options)
    assert torch.equal(attack(x, y), plain(x, y))
    assert_same_report(attack, plain)


def test_nothing_that_changes_between_calls_needs_a_new_recording(
    recorder: EmulatedRecorder,
) -> None:
    model, (x, y) = trained_small_cnn(), digits_test(32)
    make = BALL_ATTACKS["pgd"]
    attack = make(model, engine="graph", precision="fp32")
    plain = make(model, engine="compiled", precision="fp32")
    per_image = torch.linspace(0.0, 0.1, 16)
    calls: list[dict[str, Any]] = [
        {"seed": 0},
        {"seed": 1},
        {"seed": 1, "sample_ids": torch.arange(16) + 7},
        {"seed": 1, "eps": 0.03},
        {"seed": 1, "eps": per_image},
        {"seed": 1, "start": x[:16]},
        {"seed": 1},
    ]
    results, reports = [], []
    for options in calls:
        results.append(attack(x[:16], y[:16], **options))
        assert torch.equal(results[-1], plain(x[:16], y[:16], **options)), options
        reports.append((attack.last, plain.last))
    for report, wanted in reports:  # a later call changes none
        assert report.loss_per_step == pytest.approx(wanted.loss_per_step, rel=1e-5)
        assert report.counts.tolist() == wanted.counts.tolist()
    assert all(not torch.equal(results[1], other) for other in results[2:6])
    assert torch.equal(results[1], results[6])  # and none was overwritten by a later call
    F.cross_entropy(model(x), (y + 1) % 10).backward()
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    again = attack(x[:16], y[:16], seed=1)
    assert torch.equal(again, plain(x[:16], y[:16], seed=1)) and not torch.equal(again, results[1])
    others = attack(x[16:], (y[16:] + 1) % 10, seed=1)
    assert torch.equal(others, plain(x[16:], (y[16:] + 1) % 10, seed=1))
    assert recorder.count == 1


def test_other_radii_share_a_recording_and_other_settings_do_not(
    recorder: EmulatedRecorder,
) -> None:
    model, (x, y) = trained_small_cnn(), digits_test(8)

    def check(**settings: Any) -> None:
        options = {"steps": 3, "seed": 2, "precision": "fp32", **settings}
        adv = fastadv.pgd_fused(model, x, y, engine="graph", **options)
        assert torch.equal(adv, fastadv.pgd_fused(model, x, y, engine="compiled", **options))

    for eps, alpha in ((0.1, 0.03), (0.05, 0.03), (0.1, 0.01)):
        check(eps=eps, alpha=alpha)
    assert recorder.count == 1
    others: list[dict[str, Any]] = [
        {"steps": 4},
        {"norm": "l2"},
        {"norm": "l1"},
        {"norm": "l1", "sparsity": 0.5},
        {"loss": "cw"},
        {"targeted": True},
        {"bounds": (-1.0, 2.0)},
    ]
    for number, settings in enumerate(others, 2):
        check(**settings)
        assert recorder.count == number, settings
    check()
    assert recorder.count == len(others) + 1


def test_a_different_decay_of_momentum_is_another_recording(recorder: EmulatedRecorder) -> None:
    model, (x, y) = trained_small_cnn(), digits_test(8)
    engines = fastadv.MIM(model)._engines
    for decay in (1.0, 0.3):
        options: dict[str, Any] = dict(decay=decay, precision="fp32")
        attack = fastadv.MIM(model, 0.1, 0.02, 4, engine="graph", **options)
        attack._engines = engines
        plain = fastadv.MIM(model, 0.1, 0.02, 4, engine="compiled", **options)
        assert torch.equal(attack(x, y), plain(x, y))
    assert recorder.count == 2


def test_each_tau_of_friendly_pgd_is_another_recording(recorder: EmulatedRecorder) -> None:
    model, (x, y) = trained_small_cnn(), digits_test(16)
    attack = fastadv.FriendlyPGD(model, 0.1, 0.02, 5, engine="graph", precision="fp32")
    plain = fastadv.FriendlyPGD(model, 0.1, 0.02, 5, engine="compiled", precision="fp32")
    results = []
    for tau in (0, 2, 0):
        attack.tau = plain.tau = tau
        results.append(attack(x, y, seed=1))
        assert torch.equal(results[-1], plain(x, y, seed=1))
    assert recorder.count == 2
    assert torch.equal(results[0], results[2]) and not torch.equal(results[0], results[1])


def test_what_fills_a_batch_up_is_never_seen(recorder: EmulatedRecorder) -> None:
    """An earlier batch of NaN leaves its rows behind, and they are neither counted nor averaged."""
    model, (x, y) = trained_small_cnn(), digits_test(16)
    options: dict[str, Any] = dict(precision="fp32", seed=0, check_inputs=False)
    for name in ("pgd", "mim", "pgd best"):
        attack = BALL_ATTACKS[name](model, engine="graph", **options)
        plain = BALL_ATTACKS[name](model, engine="compiled", **options)
        attack(torch.full_like(x, torch.nan), y)
        assert attack.last.nan_gradients > 0
        assert torch.equal(attack(x[:9], y[:9]), plain(x[:9], y[:9]))
        assert attack.last.nan_gradients == 0
        assert_same_report(attack, plain)


def test_sizes_are_filled_up_by_less_than_an_eighth_or_than_eight() -> None:
    sizes = {
        1: 8,
        8: 8,
        9: 16,
        64: 64,
        100: 104,
        128: 128,
        129: 144,
        256: 256,
        257: 288,
        1000: 1024,
    }
    assert {count: padded_size(count) for count in sizes} == sizes
    for count in range(1, 2000):
        size = padded_size(count)
        assert count <= size and (size - count < 8 or size < count * 1.125)
        assert padded_size(size) == size


def test_the_least_recently_used_recording_is_dropped(
    recorder: EmulatedRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph, "CAPACITY", 2)
    model, (x, y) = trained_small_cnn(), digits_test(24)
    attack = fastadv.PGD(model, 0.1, steps=2, engine="graph", precision="fp32", seed=0)
    plain = fastadv.PGD(model, 0.1, steps=2, engine="compiled", precision="fp32", seed=0)
    recordings = []
    for count in (8, 16, 7, 24, 5, 16):
        assert torch.equal(attack(x[:count], y[:count]), plain(x[:count], y[:count]))
        recordings.append(recorder.count)
    assert recordings == [1, 2, 2, 3, 3, 4]


def test_auto_records_at_the_second_call_of_a_size(recorder: EmulatedRecorder) -> None:
    model, (x, y) = trained_small_cnn(), digits_test(24)
    attack = fastadv.PGD(model, 0.1, steps=2, precision="fp32", seed=0)
    plain = fastadv.PGD(model, 0.1, steps=2, engine="compiled", precision="fp32", seed=0)
    ran = []
    for count in (16, 24, 12, 24, 16):
        assert torch.equal(attack(x[:count], y[:count]), plain(x[:count], y[:count]))
        ran.append(attack.last.engine)
        first = "; the first call of a batch size runs without a graph"
        assert attack.last.reason == "the reason" + (first if ran[-1] == "compiled" else "")
    assert ran == ["compiled", "compiled", "graph", "graph", "graph"] and recorder.count == 2


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (
            lambda m, **o: fastadv.PGD(m, steps=2, loss=lambda z, y: F.cross_entropy(z, y), **o),
            "its loss is a callable",
        ),
        (lambda m, **o: fastadv.PGD(m, steps=51, **o), "it takes 51 gradients, and a graph"),
        (lambda m, **o: fastadv.PGD(m, steps=20, restarts=3, **o), "it takes 60 gradients"),
    ],
)
def test_what_is_not_recorded_runs_step_by_step_or_is_refused(
    recorder: EmulatedRecorder, make: Callable[..., Attack], reason: str
) -> None:
    model, (x, y) = trained_small_cnn(), digits_test(4)
    attack = make(model, precision="fp32")
    for _ in range(2):
        attack(x, y)
        assert attack.last.engine == "compiled"
        assert attack.last.reason.startswith(f"the reason; {reason}")
    assert recorder.count == 0
    with pytest.raises(ValueError, match=f"engine must be 'auto', .*got 'graph': {reason}"):
        make(model, engine="graph")


@pytest.mark.parametrize("kind", [fastadv.APGD, fastadv.CWL2, fastadv.FAB, fastadv.Square])
def test_attacks_that_are_not_recorded_say_so(recorder: EmulatedRecorder, kind: Any) -> None:
    with pytest.raises(ValueError, match=f"got 'graph': {kind.__name__} is run step by step"):
        kind(trained_small_cnn(), engine="graph")
    length = "queries" if kind is fastadv.Square else "steps"
    attack = kind(trained_small_cnn(), precision="fp32", **{length: 2})
    for _ in range(2):
        attack(*digits_test(4))
        assert attack.last.engine == "compiled"
    assert recorder.count == 0


class Fails:
    """A recorder of what cannot be recorded."""

    count = 0

    def record(self, work: Callable[[], None]) -> Operations:
        self.count += 1
        raise RuntimeError("no such thing")


def test_a_failure_is_told_once_and_the_attack_runs_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recorder = Fails()
    install(monkeypatch, recorder)
    model, (x, y) = trained_small_cnn(), digits_test(8)
    attack = fastadv.PGD(model, steps=2, precision="fp32", seed=0)
    expected = attack(x, y)
    with pytest.warns(UserWarning, match="without a CUDA graph: .* failed: no such") as warned:
        assert torch.equal(attack(x, y), expected)
        attack(x, y)
        attack(x[:3], y[:3])
    assert len(warned) == 1 and warned[0].filename == __file__ and recorder.count == 1
    assert attack.last.engine == "compiled" and "no such thing" in attack.last.reason


def test_a_failure_is_an_error_where_a_graph_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Fails())
    model, (x, y) = trained_small_cnn(), digits_test(8)
    attack = fastadv.PGD(model, steps=2, precision="fp32", engine="graph")
    for _ in range(2):
        with pytest.raises(ValueError, match="got 'graph': recording a CUDA graph failed: no such"):
            attack(x, y)


def test_a_model_that_reads_from_the_device_cannot_be_recorded(recorder: EmulatedRecorder) -> None:
    """The emulator is as strict as a graph."""
    cache = GraphCache(recorder, classes=2, required=True)

    def reads(inputs: tuple[Tensor, ...], active: Tensor) -> tuple[Tensor, ...]:
        return (inputs[0] * inputs[0].max().item(),)

    with pytest.raises(ValueError, match="waits for the device"):
        cache.run("reads", (torch.rand(8),), reads)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize(
    "options",
    [{}, {"loss": "cw"}, {"loss": "dlr"}, {"loss": "kl"}, {"keep": "best", "restarts": 2}],
    ids=str,
)
def test_a_recorded_attack_copies_nothing_from_the_host(
    precision: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a device without values, where a number made on the host would show as a tensor of the CPU."""
    monkeypatch.setattr(AttackCopy, "autocast", lambda self, device: nullcontext())
    monkeypatch.setattr(proof, "difference_of_logits", lambda *_: None)  # which needs values
    model = trained_small_cnn().to("meta")
    x, y, eps = (t.to("meta") for t in (*digits_test(8), torch.ones(8)))
    engine = copy_engine(model, x, precision)
    kinds = [fastadv.PGD, fastadv.MIM, fastadv.PGD, fastadv.MIM]
    for norm, kind in zip(("linf", "l2", "l1"), kinds[precision == "fp16" :], strict=False):
        attack = kind(model, steps=2, norm=norm, **{"random_start": True, **options})
        batch = AttackBatch(engine, engine.images(x), y, eps, norm, (0.0, 1.0), False, None, None)
        with Devices() as devices:
            attack._search(batch.on(batch.x, y, eps, eps > 0), [batch.x, batch.x.clone()], eps)
        assert devices.types == {"meta"}


def test_values_are_checked_before_anything_is_recorded(recorder: EmulatedRecorder) -> None:
    model, (x, y) = trained_small_cnn(), digits_test(8)
    attack = fastadv.PGD(model, steps=2, precision="fp32", engine="graph")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"y must be in 0 \.\. 9"):
            attack(x, y + 10)
        attack(x, y)
    assert recorder.count == 1


def test_a_graph_needs_a_cuda_device() -> None:
    model, (x, y) = trained_small_cnn(), digits_test(4)
    attack = fastadv.PGD(model, steps=2, engine="graph")
    with pytest.raises(ValueError, match=r"got 'graph': .*CUDA device, got cpu"):
        attack(x, y)
    with pytest.raises(ValueError, match=r"got 'graph': .*CUDA device, got cpu"):
        fastadv.pgd_fused(lambda images: model(images), x, y, engine="graph")
