"""Attacks on the live model in float32 without a proof before each: as right as with a proof, whatever changes."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from attack_helpers import images, randomise
from stubborn_models import NoisyBackward
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import fastadv
from fastadv.engine import choice, selection
from fastadv.engine.choice import Choice
from fastadv.engine.live_engines import LiveEngine
from fastadv.engine.proof_schedule import _Generators

Y = torch.arange(8) % 4
LAST, CONTIGUOUS = "live model in fp32", "live model in fp32, contiguous"


class Net(nn.Module):
    """Most of its steps are none that a program is known to win; ``form`` says what else it does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)
        self.form, self.passes, self.factor = "plain", 0, 1.0

    def forward(self, x: Tensor) -> Tensor:
        z = self.conv(x)
        self.passes += 1
        if self.form == "memory as it comes":
            z = z.as_strided(z.shape, torch.empty(z.shape).stride()) + z
        elif self.form == "viewed":
            z = z.view(len(z), -1).view(z.shape)
        z = torch.tanh(F.instance_norm(z))
        if self.form == "mirrored":
            z = torch.sin(z)
        elif self.form == "asks":
            assert z.dim() == 4
        elif self.form == "dropout":
            z = F.dropout(z, 0.2, True)
        elif self.form == "scaled":
            z = z * float(np.random.rand())
        elif self.form == "noisy backward":
            z = NoisyBackward.apply(z)
        elif self.form == "noisy later" and self.passes > 1:
            z = z + 0.3 * torch.rand_like(z)
        return self.fc(torch.sigmoid(z).square().mul(self.factor).mean((2, 3)))


@pytest.fixture(params=[LAST, CONTIGUOUS])
def runs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The engine that is measured to be the fastest of those that are right."""

    def measured(reference: Any, x: Tensor, first: Any, rivals: Any, _: object) -> Any:
        engine = rivals[request.param]()
        try:
            right = reference.fault_of(engine) is None
        except RuntimeError:
            right = False
        found = engine if right else first
        return Choice(choice.name_of(found), len(x), {}), found

    monkeypatch.setattr(choice, "_measured", measured)
    monkeypatch.setattr(choice, "_choices", {})
    monkeypatch.setattr(selection, "fast_bf16", lambda device: False)
    return str(request.param)


last = pytest.mark.parametrize("runs", [LAST], indirect=True)


@pytest.fixture
def proofs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every use of an engine that is proven."""
    calls: list[int] = []
    plain = selection.EngineCache.ready

    def ready(*args: Any) -> Any:
        calls.append(1)
        return plain(*args)

    monkeypatch.setattr(selection.EngineCache, "ready", ready)
    return calls


def net() -> Net:
    torch.manual_seed(0)
    return randomise(Net()).eval()


def attack_after_proofs(model: nn.Module, x: Tensor, **options: Any) -> fastadv.PGD:
    """An attack whose next call needs no proof."""
    attack = fastadv.PGD(model, steps=3, seed=7, **options)
    attack(x, Y[: len(x)])
    assert type(attack.engine_for(x)) is LiveEngine
    return attack


def like_a_new_attack(model: Net, x: Tensor, attack: fastadv.PGD) -> None:
    """Check that a call does what the first call of another attack does."""
    results, reports = [], []
    torch.manual_seed(5)
    before = torch.get_rng_state()
    for one in (fastadv.PGD(model, steps=3, seed=7), attack):
        np.random.seed(5)
        model.passes = 0
        results.append(one(x, Y))
        assert torch.equal(before, torch.get_rng_state())
        reports.append((one.last.engine, one.last.precision, one.last.reason))
    assert reports[0] == reports[1]
    # Proofs run the model too, so that it has drawn other numbers, or counted further.
    assert torch.equal(*results) or model.form in ("scaled", "noisy later")


def test_proofs_become_rare_and_the_result_is_the_same(runs: str, proofs: list[int]) -> None:
    model, x = net(), images(8)
    attack = fastadv.PGD(model, steps=3, seed=7)
    results = [attack(x, Y) for _ in range(20)]
    assert len(proofs) == 3  # at the uses 1, 4 and 13
    assert all(torch.equal(result, results[0]) for result in results)
    assert attack.last.engine == "eager"


def test_new_weights_modes_and_hooks_need_no_proof(runs: str, proofs: list[int]) -> None:
    model, x = net(), images(8)
    attack = attack_after_proofs(model, x)
    before = len(proofs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    model.train()
    model.conv.register_forward_hook(lambda module, args, result: result.neg_())
    found = attack(x, Y)
    assert len(proofs) == before + 1  # for the hook's operation
    assert model.training
    model.eval()
    assert torch.equal(found, fastadv.PGD(model, steps=3, seed=7)(x, Y))


@pytest.mark.filterwarnings("ignore:fastadv attacks this model")
@pytest.mark.parametrize(
    "form",
    ["mirrored", "memory as it comes", "viewed", "dropout", "scaled", "noisy later", "noisy backward"],
)  # fmt: skip
def test_a_change_is_seen_before_the_result_is_returned(runs: str, form: str) -> None:
    model, x = net(), images(8)
    attack = attack_after_proofs(model, x)
    model.form = form
    like_a_new_attack(model, x, attack)


def test_a_model_that_begins_to_draw_is_told_of(runs: str) -> None:
    model, x = net(), images(8)
    attack = attack_after_proofs(model, x)
    model.form = "dropout"
    with pytest.warns(UserWarning, match="draws random numbers"):
        attack(x, Y)


@pytest.mark.parametrize(
    "draw", [lambda: torch.rand(1), lambda: random.random(), lambda: np.random.rand()]
)
def test_each_generator_is_watched_and_put_back(draw: Callable[[], Any]) -> None:
    generators, first = _Generators(), draw()
    assert generators.have_moved()
    generators.put_back()
    assert not generators.have_moved() and draw() == first


def test_another_number_is_proven(runs: str, proofs: list[int]) -> None:
    model, x = net(), images(8)
    attack = attack_after_proofs(model, x)
    before = len(proofs)
    model.factor = 2.0
    attack(x, Y)
    assert len(proofs) == before + 1


def test_a_call_that_computes_nothing_costs_one_proof(runs: str, proofs: list[int]) -> None:
    """The result stands, and later attacks may make that call."""
    model, x = net(), images(8)
    attack = attack_after_proofs(model, x)
    before, model.form = len(proofs), "asks"
    results = [attack(x, Y) for _ in range(3)]
    assert len(proofs) == before + 1
    assert all(torch.equal(result, results[0]) for result in results)


@last
def test_weights_of_another_dtype_are_proven(runs: str, proofs: list[int]) -> None:
    model, x = net(), images(8)
    attack = attack_after_proofs(model, x)
    before = len(proofs)
    model.bfloat16()
    attack(x, Y)
    assert len(proofs) == before + 1


@last
def test_a_callers_mode_is_seen(runs: str) -> None:
    class Doubled(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            return func(*args, **(kwargs or {}))

    model, x = net(), images(8)
    attack = attack_after_proofs(model, x)
    with Doubled():
        attack(x, Y)
    assert attack.last.reason.startswith("the caller's Doubled")


@last
def test_numbers_that_others_draw_let_the_result_stand(runs: str, proofs: list[int]) -> None:
    """They are neither drawn again nor taken back."""
    model, x = net(), images(8)

    def loss(z: Tensor, y: Tensor) -> Tensor:
        torch.rand(1)
        return F.cross_entropy(z, y, reduction="none")

    attack = attack_after_proofs(model, x, loss=loss)
    before = len(proofs)
    model.passes, first = 0, torch.get_rng_state()
    found = attack(x, Y)
    assert len(proofs) == before + 1 and not torch.equal(first, torch.get_rng_state())
    assert torch.equal(found, fastadv.PGD(model, steps=3, seed=7)(x, Y))


@last
def test_an_error_of_the_caller_comes_through(runs: str) -> None:
    model, x = net(), images(8)
    attack = attack_after_proofs(model, x)
    with pytest.raises(ValueError, match="y must be in"):
        attack(x, Y + 9)
    assert torch.equal(attack(x, Y), fastadv.PGD(model, steps=3, seed=7)(x, Y))


@last
def test_a_model_that_alternates_is_proven_before_every_attack(
    runs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = net(), images(8)
    attack, sessions = attack_after_proofs(model, x), []
    monkeypatch.setattr(attack, "_perturb", _counted(attack._perturb, sessions))
    for number in range(12):
        model.form = ("mirrored", "plain")[number % 2]
        attack(x, Y)
    assert len(sessions) == 14  # two too many


def _counted(method: Callable[..., Any], calls: list[int]) -> Callable[..., Any]:
    def counted(*args: Any) -> Any:
        calls.append(1)
        return method(*args)

    return counted


class ByBatch(Net):
    """Computes otherwise from five images on."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2 if x.shape[0] >= 5 else 1)


class OwnFunction(Net):
    """Its gradient is its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(Doubles.apply(x))


class Doubles(torch.autograd.Function):
    """Twice its argument."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


@last
@pytest.mark.parametrize("kind", [ByBatch, OwnFunction, "compiled"])
def test_what_few_calls_do_not_tell_is_proven_before_every_attack(
    runs: str, kind: Any, proofs: list[int]
) -> None:
    torch.manual_seed(0)
    model = randomise(Net() if kind == "compiled" else kind()).eval()
    if kind == "compiled":
        model.fc.compile(backend="eager")
    x = images(8)
    attack = attack_after_proofs(model, x)
    assert attack.engine_for(x).any_batch == (kind is not ByBatch)
    before = len(proofs)
    for _ in range(3):
        attack(x, Y)
    assert len(proofs) == before + 3
