"""The boundary attack against its reference implementation and against distances known in closed form."""

from __future__ import annotations

import math
from contextlib import nullcontext
from functools import cache
from typing import Any

import pytest
import torch
from attack_helpers import (
    ORDERS,
    copy_engine,
    digits_test,
    images,
    robust_accuracy,
    trained_small_cnn,
)
from attack_zoo import RADIUS, WAYS
from graph_emulator import Devices
from linear_model import LinearModel, linear_problem
from torch import Tensor, nn

import fastadv
from fastadv.attacks import fab
from fastadv.attacks.batch import AttackBatch
from fastadv.attacks.best import Best
from fastadv.engine import proof
from fastadv.engine.copy import AttackCopy

pytestmark = pytest.mark.usefixtures("one_thread")
LIBRARY_NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}
DUAL_ORDERS = {"linf": 1.0, "l2": 2.0}


def reference_attack(norm: str, steps: int, eps: float, targeted: bool) -> Any:
    """pyautoattack's FAB on the small CNN."""
    library = pytest.importorskip("pyautoattack.fab_pt")
    model = trained_small_cnn().requires_grad_(False)
    common = dict(norm=LIBRARY_NORMS[norm], n_iter=steps, eps=eps, targeted=targeted)
    return library.FABAttack_PT(model, **common, n_target_classes=4, seed=0, device="cpu")


@pytest.mark.slow
@pytest.mark.parametrize("target_classes", [4, None])
@pytest.mark.parametrize("norm", RADIUS)
def test_it_breaks_the_images_that_the_reference_breaks(
    norm: str, target_classes: int | None
) -> None:
    """Neither draws a random number, so that they differ by rounding alone."""
    model, (x, y), eps = trained_small_cnn(), digits_test(50), 0.8 * RADIUS[norm]
    with torch.random.fork_rng():
        theirs = reference_attack(norm, 8, eps, target_classes is not None).perturb(x.clone(), y)
    attack = fastadv.FAB(model, eps, 8, target_classes, norm=norm)
    with torch.no_grad():
        broken, expected = (model(adv).argmax(1) != y for adv in (attack(x, y), theirs))
    assert expected.sum() > 5 and (broken != expected).sum() <= 1
    assert attack.last.outside_share == 0


@pytest.mark.parametrize("norm", RADIUS)
def test_the_smallest_changes_are_the_reference_s(norm: str) -> None:
    model, (x, y), eps = trained_small_cnn(), digits_test(40), 2 * RADIUS[norm]
    theirs = reference_attack(norm, 8, eps, False).attack_single_run(x.clone(), y)
    ours = fastadv.FAB(model, eps, 8, None, norm=norm, early_stop=False)(x, y)
    sizes, expected = ((adv - x).flatten(1).norm(ORDERS[norm], 1) for adv in (ours, theirs))
    inside = (expected <= eps) & (expected > 0)
    assert inside.sum() > 15
    off = (sizes[inside] / expected[inside] - 1).abs()
    assert (off <= 1e-3).float().mean() >= 0.9 and off.median() <= 1e-5


@cache
def plain_accuracy(target_classes: int | None) -> float:
    model, (x, y) = trained_small_cnn(), digits_test(60)
    return robust_accuracy(model, fastadv.FAB(model, 0.08, 5, target_classes)(x, y), y)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("target_classes", [3, None])
def test_every_way_to_run_it_finds_nearly_as_many(target_classes: int | None, way: str) -> None:
    model, (x, y) = trained_small_cnn(), digits_test(60)
    adv = fastadv.FAB(model, 0.08, 5, target_classes, **WAYS[way])(x, y)
    slack = 0.1 if "bf16" in way else 0.02
    assert abs(robust_accuracy(model, adv, y) - plain_accuracy(target_classes)) <= slack


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-2.0, 6.0)])
@pytest.mark.parametrize("norm", DUAL_ORDERS)
def test_it_finds_the_distance_from_a_plane(norm: str, bounds: tuple[float, float]) -> None:
    """Grey images, so that no bound is in the way."""
    model = LinearModel(torch.randn(2, 64, generator=torch.Generator().manual_seed(0))).eval()
    x = 0.4 + 0.2 * images(24, channels=1)
    logits, weight = model(x).detach(), model.linear.weight.detach()
    y, normal = logits.argmax(1), weight[0] - weight[1]
    distance = (logits[:, 0] - logits[:, 1]).abs() / normal.norm(DUAL_ORDERS[norm])
    low, width = bounds[0], bounds[1] - bounds[0]
    attack = fastadv.FAB(
        lambda seen: model((seen - low) / width),
        width * 0.5,
        40,
        norm=norm,
        bounds=bounds,
        early_stop=False,
    )
    adv = (attack(low + width * x, y) - low) / width
    found = (adv - x).flatten(1).norm(ORDERS[norm], 1)
    assert (model(adv).argmax(1) != y).all()
    assert (found >= distance * (1 - 1e-4) - 1e-6).all()
    assert (found <= distance * 1.051 + 1e-6).all()  # it goes a twentieth too far


def test_on_a_linear_model_it_breaks_what_can_be_broken_and_nothing_else() -> None:
    model, x, y = linear_problem(classes=4, n=80)
    for target_classes in (3, None):
        broken = model(fastadv.FAB(model, 0.03, 30, target_classes)(x, y)).argmax(1) != y
        assert not (broken & model.exactly_robust(x, y, 0.03 * (1 + 1e-4))).any()
        easily = ~model.exactly_robust(x, y, 0.03 / 1.06)
        assert easily.sum() > 20 and (easily <= broken).all()


def test_the_scale_of_the_logits_does_not_matter() -> None:
    model, (x, y) = trained_small_cnn(), digits_test(32)
    plain = fastadv.FAB(model, 0.08, 5, 3)(x, y)
    for scale in (1e-3, 1e4):
        scaled = fastadv.FAB(lambda seen, s=scale: s * model(seen), 0.08, 5, 3)(x, y)  # type: ignore[misc]
        assert ((scaled - plain).abs().flatten(1).amax(1) <= 1e-4).float().mean() >= 0.95


def watched(model: nn.Module) -> tuple[Any, list[int]]:
    """The model as a callable that notes the sizes of its batches."""
    sizes: list[int] = []

    def call(seen: Tensor) -> Tensor:
        sizes.append(len(seen))
        return model(seen)

    return call, sizes


def test_broken_images_leave_at_once_and_runs_attack_what_is_left() -> None:
    model, (x, y) = trained_small_cnn(), digits_test(64)
    call, sizes = watched(model)
    adv = fastadv.FAB(call, 0.08, 8, target_classes=3, restarts=2)(x, y)
    assert len(sizes) == 1 + 3 * 2 * 8 * 2 and sizes[0] == 64
    assert sizes == sorted(sizes, reverse=True) and sizes[1] > sizes[17] > sizes[-1]
    robust = model(adv).argmax(1) == y
    assert sizes[-1] >= robust.sum() > 0
    assert torch.equal(adv[robust], x[robust])  # nothing was found for these
    call, sizes = watched(model)
    fastadv.FAB(call, 0.08, 4, 2, train_mode=True)(x, y)
    assert sizes == [64] * 17


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_runs_that_share_a_batch_find_what_they_find_alone(norm: str) -> None:
    model, (x, y) = trained_small_cnn().double(), digits_test(6)
    eps = {"linf": 0.08, "l2": 0.4, "l1": 2.0}[norm]
    alone = fastadv.FAB(model, eps, 8, 3, restarts=2, norm=norm, seed=5)
    call, sizes = watched(model)
    together = fastadv.FAB(call, eps, 8, 3, restarts=2, norm=norm, seed=5, batch_size=18)
    wanted = torch.cat(
        [alone(x[i : i + 1].double(), y[i : i + 1], sample_ids=torch.tensor([i])) for i in range(6)]
    )
    found = together(x.double(), y)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)
    assert not torch.equal(found, x.double())
    assert 6 < max(sizes) <= 18


def test_an_image_that_is_misclassified_stays_as_it_is() -> None:
    model, (x, y) = trained_small_cnn(), digits_test(16)
    wrong = (y + 1) % 10
    assert torch.equal(fastadv.FAB(model, 0.08, 3)(x, wrong), x)


def test_restarts_and_more_classes_find_no_fewer() -> None:
    model, (x, y) = trained_small_cnn(), digits_test(48)
    few, more, most = (
        fastadv.FAB(model, 0.08, 4, classes, restarts=restarts, seed=0)(x, y)
        for classes, restarts in ((1, 1), (1, 3), (4, 3))
    )
    counts = [robust_accuracy(model, adv, y) for adv in (few, more, most)]
    assert counts == sorted(counts, reverse=True) and counts[2] < counts[0]
    broken = model(few).argmax(1) != y
    assert torch.equal(more[broken], few[broken])


@pytest.mark.parametrize("target_classes", [3, None])
def test_a_result_does_not_depend_on_the_others_in_the_batch(target_classes: int | None) -> None:
    model, (x, y) = trained_small_cnn().double(), digits_test(24)
    attack = fastadv.FAB(model, 0.08, 8, target_classes, restarts=2, seed=5)
    ids = torch.arange(100, 124)
    together = attack(x.double(), y, sample_ids=ids)
    some = torch.tensor([17, 3, 11])
    alone = attack(x[some].double(), y[some], sample_ids=ids[some])
    torch.testing.assert_close(alone, together[some], rtol=0, atol=1e-9)


def test_it_begins_where_it_is_told() -> None:
    model, (x, y) = trained_small_cnn(), digits_test(16)
    begun: list[Tensor] = []

    def call(seen: Tensor) -> Tensor:
        begun.append(seen.detach().clone())
        return model(seen)

    start = (x + 0.02).clamp(0, 1)
    fastadv.FAB(call, 0.08, 1, 1)(x, y, start=start)
    correct = model(x).argmax(1) == y
    torch.testing.assert_close(begun[1], start[correct])


def test_gradients_that_are_no_numbers_move_nothing() -> None:
    x, y = 0.5 + 0 * digits_test(4)[0], torch.tensor([0, 1, 2, 3])

    def model(seen: Tensor) -> Tensor:
        flat = seen.flatten(1)
        return (
            nn.functional.one_hot(y, 10)[: len(seen)] + (0 * flat[:, :1]).sqrt() + 0 * flat[:, :10]
        )

    for norm in RADIUS:
        for target_classes in (2, None):
            attack = fastadv.FAB(model, 0.08, 3, target_classes, norm=norm)
            assert torch.equal(attack(x, y), x) and attack.last.nan_gradients > 0


@pytest.mark.parametrize("classes", [1, 2])
@pytest.mark.parametrize("norm", RADIUS)
def test_a_step_copies_nothing_from_the_host(
    norm: str, classes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU would have to finish all its work before each copy. Here it is a device without values."""
    monkeypatch.setattr(AttackCopy, "autocast", lambda self, device: nullcontext())
    monkeypatch.setattr(proof, "difference_of_logits", lambda *_: None)  # which needs values
    model = trained_small_cnn().to("meta")
    x, y, aims = (t.to("meta") for t in (*digits_test(8), torch.zeros(8, classes).long()))
    engine = copy_engine(model, x, "bf16")
    attack = fastadv.FAB(model, 0.1, norm=norm)
    batch = AttackBatch(engine, engine.images(x), y, 0.1, norm, (0.0, 1.0), False, None, None)
    with Devices() as devices:
        adv = attack._step(batch, batch.x.clone(), *fab._nearest_boundary(batch, batch.x, aims))
        fab._offer(Best(), batch, adv, batch.succeeded(batch.logits(adv)))
    assert devices.types == {"meta"}


@pytest.mark.parametrize(
    ("case", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps must be >= 1"),
        ({"restarts": 1.5}, TypeError, "restarts must be an integer"),
        ({"target_classes": 0}, ValueError, "target_classes must be >= 1"),
        ({"alpha_max": 1.5}, ValueError, r"alpha_max must lie in 0\.\.1"),
        ({"beta": -0.1}, ValueError, r"beta must lie in 0\.\.1"),
        ({"eta": 0.9}, ValueError, "eta must be finite and >= 1, got 0.9"),
        ({"eta": math.inf}, ValueError, "eta must be finite and >= 1, got inf"),
        ({"eta": "1"}, TypeError, "eta must be a number"),
        ({"early_stop": None}, TypeError, "early_stop must be True or False"),
        ({"precision": "fp16"}, ValueError, "precision must be 'auto', 'fp32' or 'bf16'"),
        ({"targeted": True}, TypeError, "FAB has no argument 'targeted'"),
        ({"engine": "graph"}, ValueError, "engine must be 'auto', 'eager' or 'compiled'"),
    ],
)
def test_bad_settings_are_refused(case: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fastadv.FAB(trained_small_cnn(), **case)
