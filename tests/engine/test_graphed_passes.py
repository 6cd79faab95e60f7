"""Passes recorded one by one: the same attacks, from static memory, and a recording that is wrong is not used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attack_helpers import digits_test, trained_small_cnn
from graph_emulator import EmulatedRecorder
from torch import Tensor, nn

import fastadv
from fastadv.attacks import APGD, CW, FAB, PGD, Attack, Square
from fastadv.engine import graphed_passes
from fastadv.engine.copy_engines import CopyEngine
from fastadv.engine.cuda_graph import GraphCache

LONG = 8
pytestmark = pytest.mark.usefixtures("one_thread")


def with_recorder(monkeypatch: pytest.MonkeyPatch, recorder: Any, whole: bool = False) -> None:
    """Make the engines that a GPU would have, without its compiler; recorded after `LONG` calls of a size."""

    def candidates(tape: Any, recording: Any, precision: str, request: Any) -> Any:
        made = CopyEngine(tape, recording, precision, "the reason", inductor=False)
        if request.engine == "auto":
            resting = made.record_passes(recorder).resting
            if whole:
                made.graphs = GraphCache(recorder, 10, required=False, around=resting)
        yield lambda: made

    monkeypatch.setattr(graphed_passes, "LONG", LONG)
    monkeypatch.setattr("fastadv.engine.selection.candidates", candidates)
    monkeypatch.setattr("fastadv.engine.selection._obstacle", lambda *_: None)
    monkeypatch.setattr("fastadv.engine.choice.is_open", lambda engine: False)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> EmulatedRecorder:
    """What the engines of the test record with."""
    made = EmulatedRecorder()
    with_recorder(monkeypatch, made)
    return made


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """A user's loss."""
    return -logits.gather(1, y[:, None])[:, 0]


LONG_ATTACKS: dict[str, Callable[..., Attack]] = {
    "apgd": lambda model, **kw: APGD(model, 0.1, 12, **kw),
    "apgd-t": lambda model, **kw: APGD(model, 0.1, 10, loss="dlr-t", target_classes=2, **kw),
    "fab": lambda model, **kw: FAB(model, 0.1, 10, **kw),
    "square": lambda model, **kw: Square(model, 0.1, 20, **kw),
    "cw": lambda model, **kw: CW(model, 0.1, steps=10, **kw),
    "own loss": lambda model, **kw: PGD(model, 0.1, 0.02, 10, loss=margin, **kw),
}


# The steps of FAB and C&W need the gradients' lengths, which float16 does not keep.
DIRECTED = [name for name in LONG_ATTACKS if name not in ("fab", "cw")]
CASES = [(name, precision) for name in LONG_ATTACKS for precision in ("fp32", "bf16")]
CASES += [(name, "fp16") for name in DIRECTED]


@pytest.mark.parametrize(("name", "precision"), CASES)
def test_recorded_passes_give_the_copys_result(
    recorder: EmulatedRecorder, name: str, precision: str
) -> None:
    model = trained_small_cnn()
    x, y = digits_test(12)
    made = [LONG_ATTACKS[name](model, precision=precision, engine=e) for e in ("auto", "compiled")]
    for call, count in enumerate((9, 12, 9)):
        adv, expected = (attack(x[:count], y[:count], seed=call) for attack in made)
        torch.testing.assert_close(adv, expected, rtol=0, atol=2e-6 if precision == "fp32" else 0)
        with torch.no_grad():
            next(model.parameters()).mul_(1.01)  # the next call sees other weights
    assert recorder.count > 0


def test_a_loss_may_attack_the_same_network(recorder: EmulatedRecorder) -> None:
    model, (x, y) = trained_small_cnn(), digits_test(12)
    within: list[fastadv.PGD] = []

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        for attack in within:
            attack(x.flip(0), y)
        return margin(logits, y)

    attack = fastadv.PGD(model, 0.1, 0.02, 12, loss=loss, precision="bf16")
    wanted = attack(x, y, seed=0)
    within.append(fastadv.PGD(model, 0.1, 0.02, 2, precision="bf16"))
    within[0].share_engines(attack)
    assert torch.equal(attack(x, y, seed=0), wanted)
    assert recorder.count > 0


def test_batches_of_one_padded_size_share_a_recording(recorder: EmulatedRecorder) -> None:
    model = trained_small_cnn()
    x, y = digits_test(16)
    attack = APGD(model, 0.1, 12, precision="bf16")
    attack(x, y)
    made = recorder.count
    attack(x[:11], y[:11])  # filled up to 16
    assert recorder.count == made
    attack(x[:5], y[:5])  # to 8
    assert recorder.count > made


def test_recordings_kept_are_few(
    recorder: EmulatedRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphed_passes, "CAPACITY", {"logits": 1, "gradient": 1})
    attack = APGD(trained_small_cnn(), 0.1, 12, precision="bf16")
    for count in (8, 16, 8):
        attack(*digits_test(count))
    made: Any = attack.engine_for(digits_test(8)[0])
    assert [len(kept) for kept in made.passes._recorded.values()] == [0, 1]
    assert recorder.count == 6  # a forward and a backward pass, three times


def test_attack_that_is_recorded_as_a_whole_records_no_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = EmulatedRecorder()
    with_recorder(monkeypatch, made, whole=True)
    attack = fastadv.PGD(trained_small_cnn(), 0.1, 0.02, 3, precision="bf16")
    x, y = digits_test(8)
    for _ in range(4):
        attack(x, y)
    assert attack.last.engine == "graph" and made.count == 1


class Broken:
    """Records nothing, and its replays write wrong numbers."""

    def __init__(self, fails: bool) -> None:
        self.fails = fails

    def record(self, work: Callable[[], None]) -> Any:
        if self.fails:
            raise RuntimeError("operation not permitted")
        work()
        return self

    def replay(self) -> None:
        pass  # what `work` has written stays, whatever the images are


@pytest.mark.parametrize(
    ("fails", "told"), [(True, "not permitted"), (False, "of a replay are off")]
)
def test_broken_recording_is_told_and_not_used(
    monkeypatch: pytest.MonkeyPatch, fails: bool, told: str
) -> None:
    with_recorder(monkeypatch, Broken(fails))
    model = trained_small_cnn()
    x, y = digits_test(8)
    attack = APGD(model, 0.1, 12, precision="bf16")
    with pytest.warns(UserWarning, match=told):
        adv = attack(x, y, seed=0)
    assert torch.equal(adv, APGD(model, 0.1, 12, precision="bf16", engine="compiled")(x, y, seed=0))


def test_double_precision_is_left_to_autograd(recorder: EmulatedRecorder) -> None:
    model = trained_small_cnn().double()
    x, y = digits_test(8)
    APGD(model, 0.1, 12, precision="fp32")(x.double(), y)
    assert recorder.count == 0


def test_pooling_indices_are_real_when_the_backward_pass_is_recorded(
    recorder: EmulatedRecorder,
) -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 8, 3, padding=1)
            self.head = nn.Linear(8 * 16, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.max_pool2d(self.conv(x).relu(), 2).flatten(1))

    torch.manual_seed(0)
    model = Pooled().eval()
    x, y = digits_test(8)
    found = [
        APGD(model, 0.1, 12, precision="fp32", engine=engine)(x, y, seed=0)
        for engine in ("auto", "compiled")
    ]
    torch.testing.assert_close(*found, rtol=0, atol=2e-6)
    assert recorder.count > 0


def test_a_replay_casts_the_images_that_it_is_given(recorder: EmulatedRecorder) -> None:
    """A function without weights is cast by autocast, whose cache would keep the first images of a recording."""

    class Products(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(64, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.matmul(x, x.transpose(-1, -2)).flatten(1))

    torch.manual_seed(0)
    model, x, y = Products().eval(), torch.rand(8, 8, 8), torch.arange(8)
    found = [
        APGD(model, 0.1, 12, precision="bf16", engine=engine)(x, y, seed=0)
        for engine in ("auto", "compiled")
    ]
    assert recorder.count > 0
    assert torch.equal(*found)
