"""An engine among others: threads, copies of the model, defaults of the program, what a model keeps."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from attack_helpers import assert_same_state, digits_test, images, state_of, trained_small_cnn
from foreign_models import Pooled, conv
from torch import Tensor, nn

import fastadv
from fastadv.engine.network_lock import locked
from fastadv.models import small_cnn

pytestmark = pytest.mark.usefixtures("one_thread")

Y = torch.arange(8) % 4


@pytest.mark.parametrize("precision", ["auto", "bf16", "fp32"])
def test_threads_with_one_model_give_what_serial_calls_give(precision: str) -> None:
    torch.manual_seed(0)
    model = small_cnn(10, 3).train()
    batches = [images(6, seed=seed) for seed in range(6)]
    y, results = torch.arange(6), [torch.empty(0)] * 6
    shared = fastadv.PGD(model, precision=precision, random_start=False, steps=4)
    attacks = (shared, lambda x, y: fastadv.pgd_fused(model, x, y, random_start=False, steps=4))
    before = state_of(model)
    for attack in attacks:
        serial = [attack(x, y) for x in batches]

        def work(i: int, attack: Any = attack) -> None:
            results[i] = attack(batches[i], y)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(torch.equal(a, b) for a, b in zip(results, serial, strict=True))
    after = state_of(model)
    for part in ("modes", "requires_grad", "values", "identities"):
        assert after[part] == before[part]


def test_a_call_may_end_while_another_thread_begins_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_cnn(10, 3).eval()
    attack = fastadv.PGD(model, steps=2)

    @contextmanager
    def alone() -> Iterator[None]:
        yield
        attack._last = None  # as at the beginning of a call

    monkeypatch.setattr(attack, "_alone", alone)
    assert attack(images(3), torch.arange(3)).shape == images(3).shape


def test_building_an_engine_does_not_repeat_random_numbers_of_other_threads() -> None:
    drawn: list[float] = []
    stop = threading.Event()

    def draw() -> None:
        while not stop.is_set():
            drawn.append(float(torch.rand((), dtype=torch.float64)))

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        for _ in range(3):
            attack = fastadv.PGD(small_cnn(10, 3), steps=1, seed=0, precision="bf16")
            attack(images(2), torch.arange(2))
            assert attack.last.engine == "compiled"
    finally:
        stop.set()
        thread.join()
    assert len(set(drawn)) == len(drawn)


class Owner(nn.Module):
    """A module with an attack on a part of itself, as in Lightning."""

    def __init__(self) -> None:
        super().__init__()
        self.net = trained_small_cnn()
        self.attack = fastadv.PGD(self.net, steps=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deep copy": copy.deepcopy,
    "pickle": lambda owner: pickle.loads(pickle.dumps(owner)),
    "average": lambda owner: torch.optim.swa_utils.AveragedModel(owner).module,
}


@pytest.mark.parametrize("way", COPIES)
def test_used_attacks_are_copied_and_pickled(way: str) -> None:
    owner, (x, y) = Owner(), digits_test(8)
    expected = owner.attack(x, y, seed=0)
    other = COPIES[way](owner)
    assert torch.equal(other.attack(x, y, seed=0), expected)
    assert other.attack.model is other.net


@pytest.mark.parametrize("used", [True, False])
@pytest.mark.parametrize("precision", ["auto", "fp32"])
@pytest.mark.parametrize("what", ["dtype", "device"])
def test_defaults_of_somebody_elses_program_change_nothing(
    what: str, precision: str, used: bool
) -> None:
    model, (x, y) = trained_small_cnn(), digits_test(8)
    attack = fastadv.PGD(model, steps=2, precision=precision)
    expected = attack(x, y, seed=0)
    if not used:
        attack = fastadv.PGD(model, steps=2, precision=precision)
    try:
        if what == "dtype":
            torch.set_default_dtype(torch.float64)
        else:
            torch.set_default_device("meta")
        assert torch.equal(attack(x, y, seed=0), expected)
        attack(x, y)  # draws its seed
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


class Adapting(nn.Module):
    """BatchNorm that an overridden `train` keeps in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_cnn(10, 3)

    def train(self, mode: bool = True) -> Adapting:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.training = True
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class WritesIntoItsInput(nn.Module):
    """Normalises its images in place, and keeps what it has seen in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_cnn(10, 3)
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        x.sub_(0.5).div_(0.25)
        self.seen.copy_(x.detach().mean((0, 2, 3)))
        return self.net(x)


@pytest.mark.parametrize("precision", ["auto", "fp32"])
@pytest.mark.parametrize("make", [Adapting, WritesIntoItsInput])
@pytest.mark.filterwarnings("ignore:fastadv attacks this model with the eager engine")
def test_buffers_and_images_are_left_alone(make: Any, precision: str) -> None:
    model, x = make(), images(4)
    kept, before = x.clone(), state_of(model)
    attack = fastadv.PGD(model, steps=2, precision=precision, keep="best")
    adv = attack(x, torch.arange(4))
    assert_same_state(
        {**state_of(model), "torch random state": before["torch random state"]}, before
    )
    assert torch.equal(x, kept) and attack.last.outside_share == 0
    assert float((adv - x).abs().max()) <= 8 / 255 + 1e-6


def test_an_engine_that_only_warns_once() -> None:
    model, x = Adapting(), images(4)
    attack = fastadv.PGD(model, steps=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            attack(x, torch.arange(4))
    assert len(caught) <= 1


def test_features_that_a_forward_pass_keeps_are_the_callers() -> None:
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Pooled(conv(3, 8), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            self.features = self.net.body(x)
            return self.net.fc(self.features.mean((2, 3)))

    model, x = Keeps().eval(), images(4)
    model(x)
    features = model.features
    fastadv.PGD(model, steps=1, precision="bf16")(x, torch.arange(4))
    assert model.features is features


@pytest.mark.slow
@pytest.mark.processes
def test_a_first_attack_does_not_wait_for_torchs_compiler_to_be_imported() -> None:
    code = """
import sys, torch, fastadv
from fastadv.models import resnet18, small_cnn
for model, precision in ((small_cnn(10, 3), "bf16"), (resnet18(), "fp32")):
    attack = fastadv.PGD(model, steps=1, precision=precision, engine="compiled")
    attack(torch.rand(4, 3, 8, 8), torch.arange(4))
    assert attack.last.engine == "compiled"
print([name for name in ("torch._dynamo", "sympy") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]"]


def test_a_model_that_draws_nothing_leaves_the_generator_to_other_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not even for a moment is the generator of all threads put back, whatever engine serves."""

    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Pooled(conv(3, 8), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) if x.sum() > -1e9 else self.net(-x)

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("the generator is being put back")

    monkeypatch.setattr("fastadv.engine.frozen._forked_random_state", refused)
    for model in (Looks(), Looks().net):
        attack = fastadv.PGD(model, steps=1, random_start=False, keep="best")
        attack(images(8), Y)


def test_threads_whose_networks_attack_each_other_get_an_error_and_no_deadlock() -> None:
    networks = [nn.Sequential(nn.Flatten(), nn.Linear(192, 4)) for _ in range(2)]
    both_hold = threading.Barrier(2, timeout=60)
    errors: list[RuntimeError] = []

    def work(own: nn.Module, other: nn.Module) -> None:
        try:
            with locked(own):
                both_hold.wait()
                with locked(other):
                    pass
        except RuntimeError as error:
            errors.append(error)

    threads = [
        threading.Thread(target=work, args=pair, daemon=True) for pair in (networks, networks[::-1])
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    (error,) = errors  # the other thread goes on
    assert "two threads would wait for each other" in str(error)
    with locked(*networks):
        pass
