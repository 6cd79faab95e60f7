"""The choice among engines that are right: what is measured, when, and what it changes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attack_helpers import images, randomise, trained_small_cnn
from test_attack_copy import cosine
from torch import Tensor, nn

import fastadv
from fastadv.engine import choice
from fastadv.engine.copy_engines import CopyEngine, ProgramEngine
from fastadv.engine.engines import Engine, InputGradient
from fastadv.engine.live_engines import LiveEngine
from fastadv.engine.precision import fast_bf16
from fastadv.evaluation import autoattack
from fastadv.trainers import AdversarialRecipe

needs_bf16 = pytest.mark.skipif(
    not fast_bf16(torch.device("cpu")), reason="a processor with fast bfloat16"
)


Y = torch.arange(8) % 4


class Mixed(nn.Module):
    """Most of its steps are none that a program fuses, nor any that it is known to win."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.InstanceNorm2d(16, affine=True)
        self.fc = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.tanh(self.norm(self.conv(x)))
        return self.fc(torch.sigmoid(z).square().mean((2, 3)))


class Clock:
    """A clock that moves only as engines compute: by so many milliseconds for a gradient of each kind."""

    def __init__(self) -> None:
        self.now, self.passes = 0.0, 0

    def __call__(self) -> float:
        return self.now

    def slowed(
        self, method: Callable[..., InputGradient], milliseconds: Callable[[Any], float]
    ) -> Any:
        def gradient(engine: Engine, x: Tensor, value_of: Any) -> InputGradient:
            self.now, self.passes = self.now + milliseconds(engine) / 1e3, self.passes + 1
            return method(engine, x, value_of)

        return gradient


@pytest.fixture(autouse=True)
def bf16_is_fast_and_no_choice_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastadv.engine.selection.fast_bf16", lambda device: True)
    monkeypatch.setattr(choice, "_choices", {})
    monkeypatch.setattr(choice, "images", lambda: 4)


@pytest.fixture
def takes(monkeypatch: pytest.MonkeyPatch) -> Callable[[float, float, float], Clock]:
    """Sets the milliseconds of a pass of program, copy and live model."""

    def set_times(program: float, copy: float, live: float) -> Clock:
        clock = Clock()
        monkeypatch.setattr("fastadv.engine.proof.seconds", clock)
        slow_down(clock, monkeypatch, program, copy, lambda _: live)
        return clock

    return set_times


def slow_down(
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    program: float,
    copy: float,
    live: Callable[[Engine], float],
) -> None:
    """Let the passes of program, copy and live model take so many milliseconds of a clock."""
    kinds: tuple[tuple[Any, Any, Callable[[Any], float]], ...] = (
        (ProgramEngine, ProgramEngine.gradient, lambda _: program),
        (CopyEngine, Engine.gradient, lambda _: copy),
        (LiveEngine, Engine.gradient, live),
    )
    for kind, method, milliseconds in kinds:
        monkeypatch.setattr(kind, "gradient", clock.slowed(method, milliseconds))


def model_and_images() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return randomise(Mixed()), images(8)


def narrow(attack: fastadv.PGD, x: Tensor) -> Engine:
    engine = attack.engine_for(x)
    assert engine.precision == "bf16"
    return engine


@pytest.mark.parametrize(
    ("program", "copy", "live", "kind"),
    [
        (41.0, 37.0, 35.0, LiveEngine),
        (41.0, 34.0, 35.0, CopyEngine),
        (30.0, 37.0, 35.0, ProgramEngine),
        (41.0, 42.0, 40.5, ProgramEngine),  # faster by less than 3 %
        (
            41.0,
            60.0,
            30.0,
            ProgramEngine,
        ),  # whatever the live model takes, its copy takes no longer
    ],
)
def test_the_fastest_runs_and_the_reason_says_what_was_measured(
    takes: Any, program: float, copy: float, live: float, kind: type[Engine]
) -> None:
    takes(program, copy, live)
    model, x = model_and_images()
    attack = fastadv.PGD(model, steps=2)
    attack(x, Y)
    assert type(narrow(attack, x)) is kind
    also = f", live model under autocast {live:g} ms" if copy < 1.15 * program else ""
    assert attack.last.reason == (
        f"the model can be copied; measured on 4 images: fused program {program:g} ms, "
        f"copy {copy:g} ms{also}"
    )
    assert attack.last.engine == ("eager" if kind is LiveEngine else "compiled")


def test_a_copy_that_no_program_serves_is_measured_against_the_live_model(
    takes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    takes(0.0, 37.0, 35.0)

    def broken(*_: object) -> None:
        raise RuntimeError("no program")

    monkeypatch.setattr(ProgramEngine, "__init__", broken)
    model, x = model_and_images()
    engine = narrow(fastadv.PGD(model), x)
    assert type(engine) is LiveEngine
    assert engine.reason.endswith(
        "measured on 4 images: copy 37 ms, live model under autocast 35 ms"
    )


@pytest.mark.parametrize("live", [10.0, 90.0])
def test_what_was_chosen_follows_the_live_weights(takes: Any, live: float) -> None:
    takes(100.0, 50.0, live)
    model, x = model_and_images()
    attack = fastadv.PGD(model, steps=1)
    first = narrow(attack, x)
    for _ in range(2):
        assert narrow(attack, x) is first  # nothing has changed
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        assert narrow(attack, x) is first
        with first.session(model, 0, current=True):
            found = first.gradient(first.images(x), lambda z: z[:, 0])
        leaf = x.clone().requires_grad_()
        (wanted,) = torch.autograd.grad(model(leaf)[:, 0].sum(), leaf)
        assert cosine(found.grad, wanted) > 0.98


def test_a_change_of_the_model_is_seen_where_the_live_model_runs(takes: Any) -> None:
    takes(100.0, 50.0, 10.0)
    model, x = model_and_images()
    attack = fastadv.PGD(model, steps=1)
    assert type(narrow(attack, x)) is LiveEngine
    model.forward = lambda x: Mixed.forward(model, x) + torch.rand(1)  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match="draws random numbers"):
        assert attack.engine_for(x).reason.startswith("its forward draws random numbers")


def test_a_faster_engine_that_is_wrong_does_not_run(
    takes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    takes(41.0, 37.0, 35.0)
    honest = LiveEngine.gradient

    def wrong(self: LiveEngine, x: Tensor, value_of: Any) -> InputGradient:
        found = honest(self, x, value_of)
        return InputGradient(found.value, found.logits, -found.grad)

    monkeypatch.setattr(LiveEngine, "gradient", wrong)
    model, x = model_and_images()
    attack = fastadv.PGD(model)
    engine = narrow(attack, x)
    assert type(engine) is CopyEngine
    assert "autocast 35 ms (the gradient's cosine with the live model's is -1.00)" in engine.reason


def test_a_faster_live_model_that_is_wrong_in_float32_does_not_run(
    takes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As code is that takes its images' memory as it comes."""
    monkeypatch.setattr("fastadv.engine.selection.fast_bf16", lambda device: False)
    takes(43.0, 45.0, 35.0)
    honest = LiveEngine.gradient

    def wrong(self: LiveEngine, x: Tensor, value_of: Any) -> InputGradient:
        found = honest(self, x, value_of)
        grad = found.grad.flip(-1) if self.channels_last else found.grad
        return InputGradient(found.value, found.logits, grad)

    monkeypatch.setattr(LiveEngine, "gradient", wrong)
    model, x = model_and_images()
    engine = fastadv.PGD(model).engine_for(x)
    assert type(engine) is LiveEngine and not engine.channels_last
    assert "live model in fp32 35 ms (the gradient's cosine" in engine.reason


def test_in_float32_one_pass_proves_both_gradients(takes: Any) -> None:
    """The images take turns, and the live model is proven on the few images alone."""
    clock = takes(400.0, 300.0, 200.0)
    model, x = model_and_images()
    engine = fastadv.PGD(model, precision="fp32", engine="compiled").engine_for(x)
    assert engine.precision == "fp32" and clock.passes == 2  # of four images, and of two


def test_equal_networks_have_one_choice_and_equal_results(takes: Any) -> None:
    takes(41.0, 37.0, 35.0)
    model, x = model_and_images()
    attack = fastadv.PGD(model, steps=3, seed=0)
    first, reason = attack(x, Y), attack.last.reason
    clock = takes(1.0, 99.0, 99.0)
    twin, _ = model_and_images()
    again = fastadv.PGD(twin, steps=3, seed=0)
    assert torch.equal(again(x, Y), first) and again.last.reason == reason
    assert torch.equal(fastadv.pgd_fused(twin, x, Y, steps=3, seed=0), first)
    assert clock.now < 1.5  # nothing was measured: 2 attacks of 3 steps, and their proofs


def test_one_image_has_a_choice_of_its_own(takes: Any) -> None:
    takes(41.0, 37.0, 35.0)
    model, x = model_and_images()
    attack = fastadv.PGD(model)
    assert type(narrow(attack, x)) is LiveEngine
    takes(5.0, 9.0, 9.0)
    assert type(narrow(attack, x[:1])) is ProgramEngine
    assert "measured on 1 image: fused program 5 ms" in narrow(attack, x[:1]).reason
    assert type(narrow(attack, x)) is LiveEngine
    assert "measured on 4 images: fused program 41 ms" in narrow(attack, x).reason


def test_engines_of_passes_that_take_no_time_are_not_compared(takes: Any) -> None:
    takes(1.0, 0.5, 0.5)
    model, x = model_and_images()
    attack = fastadv.PGD(model)
    engine = narrow(attack, x)
    assert type(engine) is ProgramEngine
    assert engine.reason == "the model can be copied; measured on 4 images: fused program 1 ms"


@pytest.mark.parametrize(
    ("copy", "live", "kind", "passes"),
    [
        (
            700.0,
            300.0,
            ProgramEngine,
            4 + 1,
        ),  # one pass of the copy tells enough, and one of the live model too
        (500.0, 390.0, ProgramEngine, 4 + 1),  # a little slower is enough for that
        (
            410.0,
            600.0,
            ProgramEngine,
            4 + 2 + 2,
        ),  # the live model is clearly slower; the others run once more
        (390.0, 310.0, LiveEngine, 4 + 2 + 4),  # it is clearly faster; with its proof
    ],
)
def test_long_passes_are_timed_seldom_and_on_fewer_images(
    takes: Any, copy: float, live: float, kind: type[Engine], passes: int
) -> None:
    clock = takes(400.0, copy, live)
    model, x = model_and_images()
    engine = narrow(fastadv.PGD(model), x)
    assert type(engine) is kind and clock.passes == passes
    assert f"measured on 2 images: fused program 400 ms, copy {copy:g} ms" in engine.reason


def test_a_copy_that_is_used_at_another_size_is_timed_without_its_proof(takes: Any) -> None:
    takes(400.0, 390.0, 300.0)
    model, x = model_and_images()
    attack = fastadv.PGD(model)
    assert type(narrow(attack, x[:1])) is LiveEngine
    assert type(narrow(attack, x)) is LiveEngine


@pytest.mark.parametrize(("contiguous", "passes"), [(30.0, 12), (50.0, 10)])
def test_in_float32_the_live_model_is_timed_in_both_layouts(
    takes: Any, contiguous: float, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The contiguous one is the recorded model itself. The other one is proven by a pass that was timed."""
    monkeypatch.setattr("fastadv.engine.selection.fast_bf16", lambda device: False)
    clock, timed = takes(43.0, 45.0, 40.0), LiveEngine.gradient

    def gradient(self: LiveEngine, x: Tensor, value_of: Any) -> InputGradient:
        found = timed(self, x, value_of)
        clock.now += 0.0 if self.channels_last else (contiguous - 40.0) / 1e3
        return found

    monkeypatch.setattr(LiveEngine, "gradient", gradient)
    model, x = model_and_images()
    attack = fastadv.PGD(model, steps=2)
    engine = attack.engine_for(x)
    assert clock.passes == passes
    attack(x, Y)
    assert attack.engine_for(x) is engine
    assert type(engine) is LiveEngine and engine.channels_last == (contiguous > 40)
    assert attack.last.precision == "fp32"
    assert attack.last.reason == (
        "the model can be copied; measured on 4 images: fused program in fp32 43 ms, "
        f"live model in fp32 40 ms, live model in fp32, contiguous {contiguous:g} ms"
    )


def refuse(*_: object, **__: object) -> None:
    raise AssertionError("something was measured")


@needs_bf16
def test_nothing_is_measured_of_a_fused_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "choose", refuse)
    attack = fastadv.PGD(trained_small_cnn())
    engine = narrow(attack, torch.rand(8, 1, 8, 8))
    assert type(engine) is ProgramEngine and engine.reason == "the model can be copied"
    grouped = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=2), nn.Flatten())
    with pytest.warns(UserWarning, match="something was measured"):  # no kernel for its gradient
        fastadv.PGD(nn.Sequential(grouped, nn.Linear(128, 4)).eval()).engine_for(images(8))


@pytest.mark.parametrize("pin", ["fixed", "compiled", "deterministic"])
def test_the_choice_can_be_pinned(pin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "choose", refuse)
    model, x = model_and_images()
    engine: Any = "auto" if pin == "deterministic" else pin
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(pin == "deterministic")
    try:
        assert type(narrow(fastadv.PGD(model, engine=engine), x)) is ProgramEngine
    finally:
        torch.use_deterministic_algorithms(before)


def test_training_runs_the_same_engine_in_every_process() -> None:
    assert AdversarialRecipe().engine == "auto" and AdversarialRecipe().attack_engine == "fixed"
    assert AdversarialRecipe(engine="eager").attack_engine == "eager"


def test_a_resumed_evaluation_runs_the_engine_of_its_first_part(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """Since neither part measures."""
    pytest.importorskip("pyautoattack")
    monkeypatch.setattr(choice, "choose", refuse)
    module = sys.modules[autoattack.__module__]  # of the same name as the function
    monkeypatch.setattr(module, "APGD_STEPS", 4)
    model, x = model_and_images()
    y = model.eval()(x).argmax(1)
    options: dict[str, Any] = dict(eps=0.03, version=["apgd-ce"], batch_size=4)
    whole = autoattack(model, (x, y), **options)
    for _ in range(2):  # the second goes on from the first
        kept = autoattack(model, (x, y), state_dir=tmp_path, **options)
        assert torch.equal(kept.adversarial, whole.adversarial)
