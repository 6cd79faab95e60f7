"""A model that has not changed is recognised without its forward pass; whatever changes it is noticed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attack_helpers import images, randomise
from changing_models import SWITCHES, Switched
from foreign_models import Pooled, conv
from torch import Tensor, nn

import fastadv
from fastadv.engine import cached_recording
from fastadv.engine.cached_recording import CachedRecording
from fastadv.engine.content import content
from fastadv.engine.copy_engines import EngineOnCopy
from fastadv.engine.precision import fast_bf16
from fastadv.engine.recorder import Recorder, record

pytestmark = pytest.mark.usefixtures("one_thread")

Y = torch.arange(8) % 4


class Net(nn.Module):
    """Convolutions whose results are, and are not, written to."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv(3, 8), conv(8, 8)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)
        self.after: Callable[[Tensor], Tensor] = lambda h: h

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm(self.first(x)), inplace=True)
        h = self.second(h)
        h = self.after(h).add(0).relu_()
        return self.head(h.mean((2, 3)))


class WritesThroughAView(nn.Module):
    """A convolution whose result changes through another tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = conv(3, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        flat = self.conv(x).flatten(2)
        flat.mul_(2)
        return self.head(flat.mean(2))


def known(model: nn.Module, x: Tensor) -> CachedRecording:
    found = CachedRecording.of(record(model, x, careful=False))
    assert found is not None
    return found


@pytest.fixture
def refreshed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """One entry for every time that the weights of a copy are brought up to date."""
    calls: list[int] = []
    plain = EngineOnCopy.refresh

    def counted(self: EngineOnCopy, recording: Any) -> None:
        calls.append(1)
        plain(self, recording)

    monkeypatch.setattr(EngineOnCopy, "refresh", counted)
    yield calls


@pytest.mark.parametrize("make", [Net, WritesThroughAView])
def test_an_unchanged_model_is_recognised(
    make: Callable[[], nn.Module], refreshed: list[int]
) -> None:
    model, x = randomise(make()), images(8)
    attack = fastadv.PGD(model, precision="bf16", steps=1, seed=0)
    results = [attack(x, Y) for _ in range(5)]
    assert not refreshed
    assert all(torch.equal(result, results[0]) for result in results)


def test_no_operation_on_the_images_runs_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = randomise(Net()), images(2)
    found = known(model, x)
    ran: list[str] = []
    plain = Recorder.call

    def counted(self: Any, func: Any, args: Any, kwargs: Any) -> Any:
        ran.append(func.__name__)
        return plain(self, func, args, kwargs)

    monkeypatch.setattr(Recorder, "call", counted)
    assert found.is_unchanged(model)
    assert set(ran) <= {"dim"}


def test_operations_on_weights_run_again_and_views_stay_views(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Standardised(WritesThroughAView):
        def forward(self, x: Tensor) -> Tensor:
            scale = self.conv.weight.std()
            if scale.item() > 1e3:  # a value of the weights, which code may look at
                return x.flatten(1)[:, :4]
            return super().forward(x / scale)

    model, x = randomise(Standardised()), images(2)
    found, ran = known(model, x), []
    plain = Recorder.call

    def counted(self: Any, func: Any, args: Any, kwargs: Any) -> Any:
        ran.append(func.__name__)
        return plain(self, func, args, kwargs)

    monkeypatch.setattr(Recorder, "call", counted)
    for _ in range(3):
        assert found.is_unchanged(model)
    assert {"std", "item", "flatten"} <= set(ran) and not {"conv2d", "mul_"} & set(ran)


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_switch_is_seen(switch: str) -> None:
    model, x = randomise(Switched()), images(8)
    attack = fastadv.PGD(model, precision="bf16", engine="fixed")
    for _ in range(3):
        engine = attack.engine_for(x)
    assert isinstance(engine, EngineOnCopy) and engine.cached_recording is not None
    turn, undo = SWITCHES[switch]
    handle = turn(model)
    try:
        attack.engine_for(x)
        wanted = model.eval()(x)
        engine = attack.engine_for(x)
        found = engine.logits(engine.images(x))
    finally:
        undo(handle)
    torch.testing.assert_close(found, wanted, atol=0.1, rtol=0.1)


def exchange_rows(weight: Tensor) -> None:
    weight.data[[0, 1]] = weight.data[[1, 0]]


def exchange_signs(weight: Tensor) -> None:
    weight.data.neg_()


def next_number(weight: Tensor) -> None:
    flat = weight.data.view(-1)
    flat[-1] = torch.nextafter(flat[-1], torch.tensor(9.0))


@pytest.mark.parametrize("change", [exchange_rows, exchange_signs, next_number])
@pytest.mark.parametrize(
    "name", ["first.weight", "second.weight", "norm.running_mean", "head.bias"]
)
def test_every_change_of_a_weight_is_seen(name: str, change: Callable[[Tensor], None]) -> None:
    model, x = randomise(Net()), images(2)
    found = known(model, x)
    change(model.state_dict()[name])
    assert not found.is_unchanged(model)


def test_a_write_into_a_result_that_was_there_is_no_harm(refreshed: list[int]) -> None:
    """The new operation changes what was kept of the old recording, which is then used no more."""
    model, x = randomise(Net()), images(8)
    attack = fastadv.PGD(model, precision="bf16")
    for _ in range(3):
        attack.engine_for(x)
    plain, model.after = model.after, lambda h: h.mul_(3.0)
    attack.engine_for(x)
    model.after = plain
    for _ in range(3):
        engine = attack.engine_for(x)
        torch.testing.assert_close(
            engine.logits(engine.images(x)), model.eval()(x), atol=0.05, rtol=0.05
        )


GAIN = [1.0]


@torch.library.custom_op("fastadv_tests::amplified", mutates_args=())
def amplified(x: Tensor) -> Tensor:
    """An operator that looks at more than its arguments."""
    return x * GAIN[0]


amplified.register_autograd(lambda ctx, grad: grad * GAIN[0])


def test_an_operator_of_others_is_run_and_compared() -> None:
    model, x = randomise(Net()), images(8)
    model.after = amplified
    assert CachedRecording.of(record(model, x[:2], careful=False)) is None
    attack = fastadv.PGD(model, precision="bf16")
    for _ in range(3):
        attack.engine_for(x)
    GAIN[0] = 3.0
    try:
        engine = attack.engine_for(x)
        wanted = model.eval()(x)
        torch.testing.assert_close(engine.logits(engine.images(x)), wanted, atol=0.2, rtol=0.1)
    finally:
        GAIN[0] = 1.0


def test_another_default_dtype_is_seen() -> None:
    model, x = randomise(Net()), images(2)
    found = known(model, x)
    torch.set_default_dtype(torch.float64)
    try:
        assert not found.is_unchanged(model)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.is_unchanged(model)


def test_weights_brought_over_meanwhile_are_seen(refreshed: list[int]) -> None:
    """A session brings other weights into the engine; the attack after it must bring back the old ones."""
    model, x = randomise(Net()), images(8)
    attack = fastadv.PGD(model, precision="bf16")
    for _ in range(3):
        engine = attack.engine_for(x)
    wanted = engine.logits(engine.images(x))
    kept = model.head.bias.detach().clone()
    with torch.no_grad():
        model.head.bias += 3
        with engine.session(model, 0):
            assert not torch.equal(engine.logits(engine.images(x)), wanted)
        model.head.bias.copy_(kept)
    assert attack.engine_for(x) is engine
    assert torch.equal(engine.logits(engine.images(x)), wanted)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool]
)
@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (7,), (31, 5), (64, 64, 3, 3), (2, 70_001)])
def test_content_is_of_every_byte(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = (3 * torch.randn(shape)).to(dtype)
    before = content([tensor])
    assert before is not None and content([tensor.clone()]) == before
    flat = tensor.view(-1)
    for place in {0, flat.numel() // 2, flat.numel() - 1} if flat.numel() else ():
        old = flat[place].clone()
        flat[place] = ~old if dtype == torch.bool else old + 1
        assert content([tensor]) != before
        flat[place] = old
    assert content([tensor]) == before


def test_content_tells_zeros_shapes_and_orders_apart() -> None:
    x = torch.randn(4, 6, 5, 5)
    views = [
        x,
        x.reshape(6, 4, 5, 5),
        x.contiguous(memory_format=torch.channels_last),
        x.flip(0),
        torch.cat([x.view(-1)[65:], x.view(-1)[:65]]).view_as(x),
        torch.zeros(1),
        -torch.zeros(1),
        torch.zeros(2),
        torch.zeros(65536),
        torch.zeros(65537),
    ]
    found = [content([view]) for view in views]
    assert len(set(found)) == len(views)
    assert content([x, views[3]]) != content([views[3], x])
    assert content([x.expand(4, 6, 5, 5)[:, ::2]]) == content([x[:, ::2].contiguous()])


def test_content_does_not_depend_on_threads() -> None:
    x = torch.randn(300_000)
    one = content([x, x[:17]])
    torch.set_num_threads(3)
    assert content([x, x[:17]]) == one


class Subclass(Tensor):
    """Anything but a plain tensor."""


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(3).as_subclass(Subclass),
        torch.randn(3, 3).to_sparse(),
        torch.randn(3, dtype=torch.complex64).conj(),
        torch.empty(3, device="meta"),
    ],
)
def test_nothing_is_known_of_other_tensors(tensor: Tensor) -> None:
    assert content([torch.zeros(1), tensor]) is None


def test_every_kind_of_images_has_its_own_memory() -> None:
    model = randomise(Pooled(conv(3, 8), nn.ReLU()))
    attack = fastadv.PGD(model, precision="bf16")
    small, large = images(8), torch.rand(8, 3, 12, 12)
    for x in (small, large) * 3:
        engine = attack.engine_for(x)
        torch.testing.assert_close(
            engine.logits(engine.images(x)), model.eval()(x), atol=0.05, rtol=0.05
        )
    kept = list(attack._engines._copies.values())
    assert len(kept) == 2 and all(copies[0].engine.cached_recording for copies in kept)


def test_a_model_that_is_trained_is_not_remembered_for_nothing(
    monkeypatch: pytest.MonkeyPatch, refreshed: list[int]
) -> None:
    model = randomise(Net()).eval()
    attack = fastadv.PGD(model, 8 / 255, 2 / 255, 1, precision="bf16", engine="compiled")
    hashed: list[int] = []
    plain = cached_recording.content
    monkeypatch.setattr(
        cached_recording, "content", lambda tensors: hashed.append(len(tensors)) or plain(tensors)
    )

    def use(change: bool) -> None:
        if change:
            with torch.no_grad():
                model.first.weight.mul_(1.01)
        attack.engine_for(images(8))

    use(False)
    for _ in range(4):
        use(True)
    refreshed.clear(), hashed.clear()
    use(True)
    assert len(refreshed) == 1 and not hashed
    use(False)  # it stands still again
    use(False)
    assert len(refreshed) == 2 and hashed
    with torch.no_grad():
        model.first.weight.data.mul_(1.01)  # past torch's counters
    use(False)
    assert len(refreshed) == 3


class Ripple(nn.Module):
    """Where its ripple is small and fast, bfloat16 has its logits and not its gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = conv(3, 16), nn.Linear(16, 4)
        self.height, self.rate = nn.Parameter(torch.zeros(())), nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        return self.head((h.relu() + self.height * torch.sin(self.rate * h)).mean((2, 3)))


@pytest.mark.skipif(not fast_bf16(torch.device("cpu")), reason="this CPU has no fast bfloat16")
@pytest.mark.parametrize("way", ["plain", "whole batches", "in training"])
def test_new_weights_whose_gradients_are_lost_in_bfloat16_are_noticed(way: str) -> None:
    torch.manual_seed(0)
    model, x = Ripple(), images(8)
    if way == "whole batches":
        model.register_forward_hook(lambda module, args, out: out if len(out) > 2 else -out)
    attack = fastadv.PGD(model, steps=1)
    attack(x, Y)
    assert attack.last.precision == "bf16"
    with torch.no_grad():
        for _ in range(4 if way == "in training" else 0):
            model.head.weight.mul_(1.01)
            attack(x, Y)
        model.height.fill_(0.005)
        model.rate.fill_(2000.0)
    for _ in range(16 if way == "in training" else 1):
        attack(x, Y)
        with torch.no_grad():
            model.head.weight.mul_(1.001)
    assert attack.last.precision == "fp32"
