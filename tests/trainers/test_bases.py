"""KD, BGAT and LBGAT around every base: one step against plain float64 formulas, numbers, passes and refusals."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from test_methods import Counting, take_step
from test_pair_methods import SLOW, ce, kl
from test_recipe_starts import compared, printed
from torch import Tensor, nn
from training_helpers import (
    CPU,
    check_step,
    make_batch,
    make_model,
    small_data,
    small_recipe,
    states_equal,
)

from fastadv.trainers import (
    KdAtRecipe,
    LbgatRecipe,
    Runtime,
    find_method,
    train,
)
from fastadv.trainers.phases import PhaseTimer

pytestmark = pytest.mark.usefixtures("one_thread")
DOUBLE = torch.float64
BASES = ["pgd_at", "trades", "mart", "alp", "hat"]
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "kd": ("kd_at", {}),
    "kd of a standard model": ("kd_at", {"label_weight": 1.0, "robust_weight": 0.0}),
    "lbgat": ("lbgat", {}),
    "bgat": ("lbgat", {"fixed": True}),
}
OWN: dict[str, dict[str, Any]] = {
    "pgd_at": {},
    "trades": {"beta": 6.0},
    "mart": {"beta": 5.0},
    "alp": {"weight": 0.5},
    "hat": {"beta": 2.5, "gamma": 0.5, "reach": 2.0},
}
around = pytest.mark.parametrize("base", BASES)
kinds = pytest.mark.parametrize("kind", KINDS)


def built(
    kind: str,
    base: str,
    model: nn.Module,
    others: dict[str, nn.Module],
    **numbers: Any,
) -> Any:
    name, own = KINDS[kind]
    recipe: Any = small_recipe(name, base=base, **own, **numbers)
    cls = find_method(name)
    needed = cls.teachers_needed(recipe)
    runtime = Runtime(CPU, None, PhaseTimer(CPU))
    method = cls(recipe, model, runtime, {k: others[k] for k in needed})
    method.initialise()
    method.train_mode()
    return method


def teachers(dtype: torch.dtype = DOUBLE) -> dict[str, nn.Module]:
    return {
        "teacher": make_model(1, dtype).eval(),
        "robust_teacher": make_model(2, dtype).eval(),
    }


def slow_base(
    base: str, model: Any, x: Tensor, adv: Tensor, y: Tensor, standard: Any
) -> tuple[Tensor, Tensor]:
    """f(x') and the loss of a base alone, with the numbers of its recipe."""
    if base == "pgd_at":
        z = model(adv)
        return z, ce(z, y).mean()
    if base == "alp":
        clean, z = model(torch.cat((x, adv))).chunk(2)
        return z, SLOW["alp"](clean, z, y, 0.5)
    clean, z = model(x), model(adv)
    loss = SLOW[base](clean, z, y, OWN[base]["beta"])
    if base == "hat":
        labels = standard(adv).argmax(1)
        loss = loss + 0.5 * ce(model(x + 2 * (adv - x)), labels).mean()
    return z, loss


@kinds
@around
def test_loss_and_gradients_equal_the_formula(kind: str, base: str) -> None:
    model, others = make_model(0, DOUBLE), teachers()
    method, batch = built(kind, base, model, others), make_batch(dtype=DOUBLE)
    slow = {k: copy.deepcopy(m) for k, m in method.trainable().items()}
    found = method.attack(batch)
    x, adv, y = batch.x, found.x, batch.y
    loss = method.training_loss(batch, found).loss

    z, expected = slow_base(base, slow["model"], x, adv, y, others["teacher"])
    if method.name == "kd_at":
        share, robust = (0.3, 0.6) if kind == "kd" else (1.0, 0.0)
        expected = share * expected
        for weight, teacher in zip((0.1, robust), others.values(), strict=True):
            expected = expected + weight * 4 * kl(teacher(adv).detach() / 2, z / 2).mean()
    else:
        fixed = kind == "bgat"
        guide = others["teacher"](x).detach() if fixed else slow["natural"](x)
        expected = expected + (z - guide).square().mean()
        expected = expected + (0 if fixed else ce(guide, y).mean())
    check_step(method, loss, slow, expected)


@kinds
@around
def test_the_attack_is_that_of_the_base_alone(kind: str, base: str) -> None:
    batch = make_batch()
    method = built(kind, base, make_model(0), teachers(torch.float32))
    cls = find_method(base)
    recipe: Any = small_recipe(base)
    frozen = {k: teachers(torch.float32)[k] for k in cls.teachers_needed(recipe)}
    alone = cls(recipe, make_model(0), Runtime(CPU, None, PhaseTimer(CPU)), frozen)
    adv = method.attack(batch)
    assert torch.equal(adv.x, alone.attack(batch).x)
    assert float((adv.x - batch.x).abs().max()) > 0.09
    assert method.gauges().keys() == alone.gauges().keys()


@kinds
@around
def test_passes_and_statistics_are_as_stated(kind: str, base: str) -> None:
    model = Counting(make_model(0))
    others: dict[str, nn.Module] = {k: Counting(m) for k, m in teachers(torch.float32).items()}
    method = built(kind, base, model, others, engine="eager")
    learning = [m for m in method.trainable().values() if m is not model]
    tracked = [b for n, b in model.named_buffers() if n.endswith("num_batches_tracked")]
    before = [int(b) for b in tracked]
    take_step(method, make_batch(8))
    counted = (model, *others.values(), *learning)
    forward = sum(m.images for m in counted) / 8  # type: ignore[union-attr]
    trained = 2 if base == "alp" else method.images_trained
    assert forward + method.recipe.steps + 2 * (trained + len(learning)) == method.passes(0)
    moved = {int(b) - count for b, count in zip(tracked, before, strict=True)}
    assert moved == {method.bn_updates}


@pytest.mark.parametrize("kind", [KdAtRecipe, LbgatRecipe])
@around
def test_the_numbers_are_those_of_the_base(kind: Any, base: str) -> None:
    recipe, alone = kind(base=base), find_method(base).recipe_class()
    if kind is KdAtRecipe and base == "pgd_at":
        assert recipe == KdAtRecipe() and recipe.epochs == 200
        return
    named = {k: v for k, v in compared(recipe).items() if hasattr(alone, k)}
    assert named == {k: getattr(alone, k) for k in named}
    assert {k: getattr(recipe, k) for k in OWN[base]} == OWN[base]
    assert kind(base=base, epochs=7, beta=2.0).epochs == 7
    official = kind.preset("official", base=base)
    assert official.code_constants == (base == "mart")
    if kind is LbgatRecipe:
        assert official.natural == "resnet18_layer2_stride1"
        assert LbgatRecipe(base=base, fixed=True).epochs == alone.epochs


def test_the_command_line_begins_with_the_base(capsys: pytest.CaptureFixture[str]) -> None:
    alone = printed(capsys, "mart")
    for method in ("kd_at", "lbgat"):
        begun = printed(capsys, method, "--base", "mart", "--beta", "4")
        for name in ("epochs", "lr", "weight_decay", "eps", "schedule"):
            assert begun[name] == alone[name]
        assert (begun["base"], begun["beta"]) == ("mart", 4.0)
    assert printed(capsys, "lbgat")["base"] is None
    assert printed(capsys, "kd_at")["epochs"] == 200


@pytest.mark.parametrize(
    ("name", "numbers", "words"),
    [
        ("kd_at", {"base": "awp"}, "base must be one of pgd_at, trades, mart, alp, hat"),
        ("lbgat", {"base": "vfd"}, "base must be .*one of pgd_at, trades, mart, alp, hat"),
        ("kd_at", {"beta": 2.0}, "beta has no effect with base pgd_at, got 2.0"),
        ("kd_at", {"base": "trades", "weight": 0.9}, "weight has no effect with base trades"),
        ("lbgat", {"gamma": 0.9}, "gamma has no effect with base None, got 0.9"),
        ("lbgat", {"base": "alp", "beta": 3.0}, "beta has no effect with base alp, got 3.0"),
        ("kd_at", {"base": "hat", "reach": -1.0}, "reach must be >= 0, got -1.0"),
        ("kd_at", {"base": "mart", "label_smoothing": 0.1}, "label_smoothing must be 0 for mart"),
    ],
)
def test_numbers_that_a_base_does_not_have_are_refused(
    name: str, numbers: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        train(
            name,
            small_recipe(name, **numbers),
            data=small_data(32, 8),
            model=make_model(0),
            teacher=[make_model(1), make_model(2)] if name == "kd_at" else None,
            run_dir=tmp_path / "run",
            progress=False,
            device="cpu",
        )


def test_teachers_are_those_that_are_used() -> None:
    kd, lbgat = find_method("kd_at"), find_method("lbgat")
    both = ("teacher", "robust_teacher")
    assert kd.teachers_needed(KdAtRecipe()) == both
    assert kd.teachers_needed(KdAtRecipe(robust_weight=0.0)) == both[:1]
    assert kd.teachers_needed(KdAtRecipe(standard_weight=0.0)) == both[1:]
    assert kd.teachers_needed(KdAtRecipe(base="hat", standard_weight=0.0)) == both
    assert lbgat.teachers_needed(LbgatRecipe(base="trades")) == ()
    for recipe in (LbgatRecipe(base="hat"), LbgatRecipe(base="alp", fixed=True)):
        assert lbgat.teachers_needed(recipe) == both[:1]


@pytest.mark.parametrize(
    ("name", "numbers", "count"),
    [
        ("kd_at", {"base": "hat", "awp_gamma": 0.01}, 2),
        ("lbgat", {"base": "mart", "awp_gamma": 0.01}, 0),
        ("lbgat", {"base": "hat", "natural": "small_cnn"}, 1),
    ],
)
def test_a_run_is_resumed_bit_for_bit(
    name: str, numbers: dict[str, Any], count: int, tmp_path: Path
) -> None:
    class Stop(Exception):
        pass

    def stop(progress: Any) -> None:
        if progress.step == 3:
            raise Stop

    def run(folder: Path, **changes: Any) -> Any:
        return train(
            name,
            small_recipe(name, **numbers),
            data=small_data(32, 8),
            model=make_model(0),
            teacher=[make_model(1), make_model(2)][:count] or None,
            run_dir=folder,
            progress=False,
            device="cpu",
            **changes,
        )

    whole = run(tmp_path / "whole")
    with pytest.raises(Stop):
        run(tmp_path / "parts", on_step=stop)
    resumed = run(tmp_path / "parts", resume=True)
    assert whole.progress.bad_steps == 0
    assert states_equal(whole.model.state_dict(), resumed.model.state_dict())
