"""Auto-PGD in l1: as strong as its reference implementation, sparse as published, inside ball and bounds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attack_helpers import digits_test, largest_change, robust_accuracy, trained_small_cnn
from attack_zoo import WAYS
from torch import Tensor

import fastadv
from fastadv.attacks.apgd_l1 import SparseSchedule, steps_by_radius
from fastadv.attacks.batch import AttackBatch

pytestmark = pytest.mark.usefixtures("one_thread")
EPS = 1.3


def reference_adversarial(loss: str, steps: int, x: Tensor, y: Tensor) -> Tensor:
    """What pyautoattack's APGD returns, with the radii of its standard version."""
    base = pytest.importorskip("pyautoattack.autopgd_base")
    model = trained_small_cnn().requires_grad_(False)
    common: dict[str, Any] = dict(n_iter=steps, norm="L1", eps=EPS, seed=0, use_largereps=True)
    with torch.random.fork_rng():
        if loss == "dlr-t":
            attack = base.APGDAttack_targeted(model, **common, n_target_classes=3, device="cpu")
        else:
            attack = base.APGDAttack(model, **common, loss=loss, device="cpu")
        return attack.perturb(x.clone(), y)


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "count", "slack"), [("ce", 100, 5), ("dlr-t", 100, 5)])
@pytest.mark.filterwarnings("ignore:there are")
def test_it_finds_as_many_as_the_reference(loss: str, count: int, slack: int) -> None:
    """At equal steps, of as many images; another start changes as much."""
    model, (x, y) = trained_small_cnn(), digits_test(count)
    expected = count * robust_accuracy(model, reference_adversarial(loss, 20, x, y), y)
    assert 0.1 * count < expected < 0.8 * count
    for way in WAYS.values():
        attack = fastadv.APGD(model, EPS, 20, loss=loss, target_classes=3, norm="l1", seed=0, **way)
        adv = attack(x, y)
        assert abs(round(count * robust_accuracy(model, adv, y)) - round(expected)) <= slack
        assert attack.last.outside_share == 0 and largest_change(adv, x, "l1") > 0.99 * EPS


@pytest.mark.slow
def test_it_is_stronger_than_pgd() -> None:
    model, (x, y) = trained_small_cnn(), digits_test(200)
    options: dict[str, Any] = dict(norm="l1", seed=0, precision="fp32")
    plain = fastadv.PGD(model, EPS, EPS / 4, 30, **options)(x, y)
    automatic = fastadv.APGD(model, EPS, 30, **options)(x, y)
    assert robust_accuracy(model, automatic, y) < robust_accuracy(model, plain, y) - 0.05


def test_it_changes_few_elements() -> None:
    model, (x, y) = trained_small_cnn(), digits_test(64)
    adv = fastadv.APGD(model, EPS, 40, norm="l1", seed=0, precision="fp32")(x, y)
    changed = (adv != x).flatten(1).float().mean(1)
    assert changed.median() < 0.3


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (100, (30, 30, 40)),
        (20, (6, 6, 8)),
        (5, (2, 2, 1)),
        (3, (1, 1, 1)),
        (2, (0, 0, 2)),
        (1, (0, 0, 1)),
    ],
)
def test_the_steps_in_each_ball(steps: int, expected: tuple[int, int, int]) -> None:
    assert steps_by_radius(steps) == expected


@pytest.mark.parametrize(("steps", "passes"), [(10, 13), (2, 3), (1, 2)])
def test_what_a_run_costs(steps: int, passes: int) -> None:
    model, (x, y), calls = trained_small_cnn(), digits_test(8), []

    def watching(images: Tensor) -> Tensor:
        calls.append(len(images))
        return model(images)

    fastadv.APGD(watching, EPS, steps, norm="l1", seed=0)(x, y)
    assert calls == [8] * passes


def schedule(changed: list[int], grad: Tensor, value: list[float]) -> tuple[SparseSchedule, Tensor]:
    """A schedule of images with ten elements, of which some have been changed."""
    x = torch.full((len(changed), 10), 0.5)
    adv = x + 0.1 * (torch.arange(10) < torch.tensor(changed)[:, None])
    batch = AttackBatch(
        _Nothing(),
        x,
        torch.zeros(len(changed)).long(),
        2.0,
        "l1",
        (0.0, 1.0),
        False,
        None,
        None,  # type: ignore[arg-type]
    )
    return SparseSchedule(batch, adv, torch.tensor(value), grad), adv


class _Nothing:
    name = reason = ""


def test_a_step_moves_the_largest_gradients_by_equal_parts() -> None:
    grad = torch.tensor([[1.0, -9, 2, 8, 0, 3, 0, 0, 0, 0]] * 3)
    # A third fewer than were changed, at least one, and none whose gradient is 0.
    found, _ = schedule([3, 0, 10], grad, [0.0] * 3)
    step = found.step()
    assert step[0].tolist() == [0, -1, 0, 1, 0, 0, 0, 0, 0, 0]
    assert step[1].tolist() == [0, -2, 0, 0, 0, 0, 0, 0, 0, 0]
    torch.testing.assert_close(step[2], torch.tensor([0.4, -0.4, 0.4, 0.4, 0, 0.4, 0, 0, 0, 0]))
    nothing, _ = schedule([3], torch.full((1, 10), torch.nan), [0.0])
    assert not nothing.step().any()


def test_the_step_size_starts_again_where_the_best_point_has_become_sparser() -> None:
    grad = torch.ones(2, 10)
    found, adv = schedule([8, 8], grad, [0.0, 0.0])
    _, sparser = schedule([4, 8], grad, [0.0, 0.0])
    found.note(sparser, torch.tensor([1.0, 1.0]), 3 * grad)
    found.note(adv, torch.tensor([0.5, 0.5]), 5 * grad)
    going = found.check(adv)
    torch.testing.assert_close(found.alpha, torch.tensor([2.0, 2 / 1.5]))
    torch.testing.assert_close(found.moved, torch.tensor([4 / 1.5, 8 / 1.5]))
    assert torch.equal(going[0], sparser[0]) and torch.equal(going[1], adv[1])
    assert found.grad[:, 0].tolist() == [3, 5]
    for _ in range(10):
        found.check(adv)
    torch.testing.assert_close(found.alpha, torch.tensor([0.2, 0.2]))  # a tenth is the least


def test_a_result_does_not_depend_on_the_others_in_the_batch() -> None:
    model, (x, y) = trained_small_cnn().double(), digits_test(24)
    attack = fastadv.APGD(model, EPS, 10, restarts=2, norm="l1", seed=5)
    ids = torch.arange(100, 124)
    together = attack(x.double(), y, sample_ids=ids)
    some = torch.tensor([17, 3, 11])
    alone = attack(x[some].double(), y[some], sample_ids=ids[some])
    torch.testing.assert_close(alone, together[some], rtol=0, atol=1e-9)
