"""The choice among engines in float32, where the live model needs fewer proofs than a copy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attack_helpers import images, plain_pgd, randomise
from test_choice import Clock, Mixed, slow_down
from torch import Tensor, nn

import fastadv
from fastadv.engine import choice
from fastadv.engine.cached_recording import CachedRecording
from fastadv.engine.copy_engines import CopyEngine, ProgramEngine
from fastadv.engine.engines import Engine, InputGradient
from fastadv.engine.live_engines import LiveEngine

Y = torch.arange(8) % 4


class Patches(nn.Module):
    """A small transformer: one convolution cuts the images into patches, and matrix products do the rest."""

    def __init__(self, stem: int = 0, depthwise: int = 0) -> None:
        super().__init__()
        first = [nn.Conv2d(3, 3, 3, padding=1) for _ in range(stem)]
        second = [nn.Conv2d(16, 16, 3, padding=1, groups=16) for _ in range(depthwise)]
        self.cut = nn.Sequential(*first, nn.Conv2d(3, 16, 4, 4), *second)
        self.qkv = nn.ModuleList(nn.Linear(16, 48) for _ in range(3))
        self.out = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.mlp = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        z = self.cut(x).flatten(2).transpose(1, 2)
        for qkv, out, mlp in zip(self.qkv, self.out, self.mlp, strict=True):
            q, k, v = qkv(z).chunk(3, -1)
            z = z + out(F.scaled_dot_product_attention(q, k, v))
            z = z + F.gelu(mlp(z))
        return self.head(z.mean(1))


class Viewed(Mixed):
    """It looks at weights in another shape, which takes no time in any pass."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.scale.view(3, 1, 1))


class Normed(Mixed):
    """It has a BatchNorm, which a copy folds."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.batch_norm(x))


@pytest.fixture(autouse=True)
def bf16_is_slow_and_no_choice_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastadv.engine.selection.fast_bf16", lambda device: False)
    monkeypatch.setattr(choice, "_choices", {})
    monkeypatch.setattr(choice, "images", lambda: 4)


@pytest.fixture
def takes(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Clock]:
    """Sets the milliseconds of a pass of program, copy, and live model on channels-last and contiguous images."""

    def set_times(program: float, copy: float, last: float, contiguous: float) -> Clock:
        clock = Clock()
        monkeypatch.setattr("fastadv.engine.proof.seconds", clock)
        slow_down(
            clock, monkeypatch, program, copy, lambda e: last if e.channels_last else contiguous
        )
        return clock

    return set_times


def refuse(*_: object, **__: object) -> None:
    raise AssertionError("a copy was built")


@pytest.mark.parametrize("engine", ["auto", "fixed"])
def test_a_network_of_matrix_products_runs_live_without_a_copy_or_a_measurement(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in (ProgramEngine, CopyEngine):
        monkeypatch.setattr(kind, "__init__", refuse)
    monkeypatch.setattr(choice, "choose", refuse)
    model, x = randomise(Patches()), images(8)
    attack = fastadv.PGD(model, steps=3, random_start=False, engine=engine)
    for _ in range(5):
        found = attack(x, Y)
        limits: Any = dict(eps=8 / 255, alpha=2 / 255, steps=3)
        wanted = plain_pgd(model.eval(), x, Y, x, loss=F.cross_entropy, **limits)
        assert (found - wanted).abs().max() < 1e-6
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.01)
    ran = attack.engine_for(x)
    assert type(ran) is LiveEngine and not ran.channels_last
    assert attack.last.reason == "no copy computes matrix products faster"


def test_a_change_of_such_a_network_is_seen() -> None:
    model, x = randomise(Patches()), images(8)
    attack = fastadv.PGD(model, steps=2)
    for _ in range(2):
        attack(x, Y)
    model.forward = lambda x: Patches.forward(model, x) + torch.rand(1)  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match="draws random numbers"):
        attack(x, Y)
    assert attack.last.reason.startswith("its forward draws random numbers")


@pytest.mark.parametrize("takes_layout", [True, False])
def test_images_are_channels_last_where_such_a_network_convolves_features_a_little(
    takes_layout: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Viewing(Patches):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if takes_layout else x.view(-1).view(x.shape))

    model, x = randomise(Viewing(depthwise=1)), images(8)
    attack = fastadv.PGD(model, steps=3, random_start=False, engine="fixed")
    wanted = plain_pgd(
        model.eval(), x, Y, x, loss=F.cross_entropy, eps=8 / 255, alpha=2 / 255, steps=3
    )
    assert (attack(x, Y) - wanted).abs().max() < 1e-5
    ran = attack.engine_for(x)
    assert (
        (type(ran) is LiveEngine and ran.channels_last)
        if takes_layout
        else type(ran) is ProgramEngine
    )


@pytest.mark.parametrize(("contiguous", "channels_last"), [(42.0, True), (38.0, False)])
def test_contiguous_images_must_be_clearly_faster(
    contiguous: float, channels_last: bool, takes: Any
) -> None:
    takes(60.0, 70.0, 44.0, contiguous)
    engine = fastadv.PGD(randomise(Mixed())).engine_for(images(8))
    assert type(engine) is LiveEngine and engine.channels_last == channels_last


def test_other_networks_and_requests_get_a_copy() -> None:
    x = images(8)
    named = fastadv.PGD(randomise(Patches()), engine="compiled").engine_for(x)
    assert type(named) is ProgramEngine
    with_stem = fastadv.PGD(randomise(Patches(stem=1)), engine="fixed").engine_for(x)
    assert type(with_stem) is ProgramEngine


@pytest.mark.parametrize(("proof", "kind"), [(0.0, ProgramEngine), (30.0, LiveEngine)])
def test_a_program_that_wins_less_than_its_proof_takes_does_not_run(
    proof: float, kind: type[Engine], takes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """30 ms are 10 ms for each of three passes of 8 images, 5 ms for 4 images."""
    clock, honest = takes(40.0, 50.0, 44.0, 48.0), CachedRecording.again

    def again(*args: Any) -> Any:
        clock.now += proof / 1e3
        return honest(*args)

    monkeypatch.setattr(CachedRecording, "again", again)
    engine = fastadv.PGD(randomise(Mixed())).engine_for(images(8))
    assert type(engine) is kind
    assert engine.reason.endswith(f", a copy's proof {proof:g} ms" if proof else "contiguous 48 ms")


def test_the_contiguous_live_model_is_not_timed_if_its_backward_pass_alone_is_slower(
    takes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, differentiate = takes(43.0, 50.0, 60.0, 30.0), torch.autograd.grad

    def slow(*args: Any, **options: Any) -> Any:
        clock.now += 0.049 if options.get("retain_graph") else 0.0  # of the recording's own graph
        return differentiate(*args, **options)

    monkeypatch.setattr(torch.autograd, "grad", slow)
    engine = fastadv.PGD(randomise(Mixed())).engine_for(images(8))
    assert engine.reason.endswith("fused program in fp32 43 ms, live model in fp32 60 ms")


@pytest.mark.parametrize(("forward", "is_timed"), [(20.0, True), (30.0, False)])
def test_the_first_forward_pass_tells_of_the_contiguous_live_model_too(
    forward: float, is_timed: bool, takes: Any
) -> None:
    """It has two images, and the pass of the program four. A first pass may take a quarter more than others."""
    clock = takes(43.0, 50.0, 60.0, 70.0)

    class Slow(Mixed):
        def forward(self, x: Tensor) -> Tensor:
            clock.now += 0.0 if torch.is_grad_enabled() else forward / 1e3
            return super().forward(x)

    engine = fastadv.PGD(randomise(Slow())).engine_for(images(8))
    assert ("contiguous" in engine.reason) == is_timed


@pytest.mark.parametrize(("live", "passes"), [(370.0, 4), (470.0, 4), (440.0, 6)])
def test_a_narrow_loss_of_the_live_model_is_measured_again(
    live: float, passes: int, takes: Any
) -> None:
    """A narrow win is not: nothing is slower then than the caller's own loop."""
    clock = takes(400.0, 500.0, live, 500.0)
    fastadv.PGD(randomise(Mixed())).engine_for(images(8))
    assert clock.passes == passes


@pytest.mark.parametrize(
    ("program", "copy", "kind", "passes"),
    [
        (300.0, 200.0, ProgramEngine, 2 + 2),  # under three quarters of the live model's time
        (330.0, 400.0, ProgramEngine, 2 + 2 + 1),
        (330.0, 200.0, CopyEngine, 2 + 2 + 1 + 1),  # proven on four images; a timed pass on two tells the rest
    ],
)  # fmt: skip
def test_a_copy_that_may_fold_something_is_timed_last_and_only_if_it_may_win(
    program: float, copy: float, kind: type[Engine], passes: int, takes: Any
) -> None:
    clock = takes(program, copy, 410.0, 420.0)
    engine = fastadv.PGD(randomise(Normed())).engine_for(images(8))
    assert type(engine) is kind and clock.passes == passes
    assert ("copy in fp32" in engine.reason) == (passes > 4)


@pytest.mark.parametrize("kind", [Mixed, Viewed])
def test_a_copy_that_saves_no_work_is_not_timed(kind: type[nn.Module], takes: Any) -> None:
    takes(330.0, 200.0, 410.0, 420.0)
    engine = fastadv.PGD(randomise(kind())).engine_for(images(8))
    assert type(engine) is ProgramEngine and "copy in fp32" not in engine.reason


def test_a_wrong_copy_does_not_run_though_its_timed_pass_was_a_proof(
    takes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    takes(330.0, 200.0, 410.0, 420.0)
    honest = CopyEngine.gradient

    def wrong(self: CopyEngine, x: Tensor, value_of: Any) -> InputGradient:
        found = honest(self, x, value_of)
        grad = found.grad if len(x) == 4 else -found.grad  # wrong in the timed pass alone
        return InputGradient(found.value, found.logits, grad)

    monkeypatch.setattr(CopyEngine, "gradient", wrong)
    engine = fastadv.PGD(randomise(Normed())).engine_for(images(8))
    assert type(engine) is ProgramEngine
    assert (
        "copy in fp32 200 ms (the gradient's cosine with the live model's is -1.00)"
        in engine.reason
    )
