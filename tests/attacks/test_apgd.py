"""Auto-PGD: as strong as its reference implementation, with the published schedule, on what is left."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from attack_helpers import digits_test, robust_accuracy, trained_small_cnn
from attack_zoo import WAYS
from torch import Tensor, nn

import fastadv
from fastadv.attacks.apgd import StepSizes, checkpoints
from fastadv.attacks.objectives import (
    dlr_targeted_objective,
    likeliest_wrong_classes,
    targeted_value,
)
from fastadv.ops import random_start

pytestmark = pytest.mark.usefixtures("one_thread")
RADII = [("linf", 0.08), ("l2", 0.5)]


def reference_adversarial(
    loss: str, norm: str, eps: float, steps: int, x: Tensor, y: Tensor
) -> Tensor:
    """What pyautoattack's APGD returns."""
    base = pytest.importorskip("pyautoattack.autopgd_base")
    model = trained_small_cnn().requires_grad_(False)
    common = dict(n_iter=steps, norm={"linf": "Linf", "l2": "L2"}[norm], eps=eps, seed=0)
    with torch.random.fork_rng():
        if loss == "dlr-t":
            attack = base.APGDAttack_targeted(model, **common, n_target_classes=3, device="cpu")
        else:
            attack = base.APGDAttack(model, **common, loss=loss, device="cpu")
        return attack.perturb(x.clone(), y)


def projected(point: Tensor, x: Tensor, norm: str, eps: float) -> Tensor:
    """The nearest point of ball and box, one image."""
    delta = point - x
    if norm == "linf":
        delta = delta.clamp(-eps, eps)
    elif delta.norm() > eps:
        delta = delta * (eps / delta.norm())
    return (x + delta).clamp(0, 1)


def plain_apgd(
    model: nn.Module, x: Tensor, y: Tensor, point: Tensor, norm: str, eps: float, steps: int
) -> tuple[list[float], Tensor]:
    """Algorithm 1 as printed, for one image [1, ...]: the values of all points, and the best point."""

    def look(point: Tensor) -> tuple[float, Tensor]:
        leaf = point.clone().requires_grad_()
        value = F.cross_entropy(model(leaf), y)
        (grad,) = torch.autograd.grad(value, leaf)
        return float(value.detach()), grad.sign() if norm == "linf" else grad / grad.norm()

    size, previous = 2 * eps, point
    (value, direction), rises = look(point), 0
    best, values = (value, point), [value]
    last_check, halved_then, best_then = 0, True, value
    for step in range(1, steps + 1):
        stepped = projected(point + size * direction, x, norm, eps)
        share = 1 if step == 1 else 0.75
        moved = point + share * (stepped - point) + (1 - share) * (point - previous)
        previous, point = point, projected(moved, x, norm, eps)
        before = value
        value, direction = look(point)
        values.append(value)
        rises += value > before
        best = max(best, (value, point), key=lambda pair: pair[0])
        if step in checkpoints(steps):
            few = rises < 0.75 * (step - last_check)
            halved = few or (not halved_then and best_then == best[0])
            if halved:
                size, point = size / 2, best[1]
                value, direction = look(point)
            last_check, halved_then, best_then, rises = step, halved, best[0], 0
    return values, best[1]


@pytest.mark.parametrize(("norm", "eps"), RADII)
def test_it_equals_the_algorithm_as_printed(norm: str, eps: float) -> None:
    model, (x, y), steps = trained_small_cnn(), digits_test(32), 15
    start = random_start(x, eps, norm, seed=6)
    attack = fastadv.APGD(model, eps, steps, norm=norm, seed=6, precision="fp32")
    adv = attack(x, y)
    results = [
        plain_apgd(model, x[i : i + 1], y[i : i + 1], start[i : i + 1], norm, eps, steps)
        for i in range(len(x))
    ]
    values = torch.tensor([values for values, _ in results]).mean(0)
    assert attack.last.loss_per_step == pytest.approx(values[:steps].tolist(), rel=1e-2)
    best = torch.cat([point for _, point in results])
    with torch.no_grad():  # where no point is misclassified, or the best one is, that is the result
        comparable = (model(adv).argmax(1) == y) | (model(best).argmax(1) != y)
    furthest = (adv - best).flatten(1).abs().amax(1)[comparable]
    assert len(furthest) > 24 and (furthest <= 1e-5).float().mean() >= 0.9, furthest


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "count", "slack", "norm", "eps"),
    [
        *[("ce", 100, 3, *radius) for radius in RADII],
        ("dlr-t", 100, 3, *RADII[0]),  # a loss that knows nothing of the norm
    ],
)
@pytest.mark.filterwarnings("ignore:there are")
def test_it_finds_as_many_as_the_reference(
    loss: str, count: int, slack: int, norm: str, eps: float
) -> None:
    """At equal steps, of as many images; another start changes as much."""
    model, (x, y), steps = trained_small_cnn(), digits_test(count), 20
    expected = count * robust_accuracy(
        model, reference_adversarial(loss, norm, eps, steps, x, y), y
    )
    assert 0.1 * count < expected < 0.8 * count
    for way in WAYS.values():
        attack = fastadv.APGD(
            model, eps, steps, loss=loss, norm=norm, target_classes=3, seed=0, **way
        )
        adv = attack(x, y)
        assert round(count * robust_accuracy(model, adv, y)) <= round(expected) + slack


@pytest.mark.filterwarnings("ignore:there are")
def test_dlr_finds_as_many_as_the_reference() -> None:
    """Its gradient vanishes where the label comes third, so starts differ more: the mean of some is compared."""
    model, (x, y) = trained_small_cnn(), digits_test(100)
    expected = robust_accuracy(model, reference_adversarial("dlr", "linf", 0.08, 20, x, y), y)
    attack = fastadv.APGD(model, 0.08, 20, loss="dlr", precision="fp32")
    found = [robust_accuracy(model, attack(x, y, seed=seed), y) for seed in range(3)]
    assert sum(found) / 3 <= expected + 0.03


@pytest.mark.parametrize(("norm", "eps"), RADII)
def test_it_is_at_least_as_strong_as_pgd(norm: str, eps: float) -> None:
    model, (x, y) = trained_small_cnn(), digits_test(200)
    options = dict(norm=norm, seed=0, precision="fp32")
    plain = fastadv.PGD(model, eps, eps / 4, 20, **options)(x, y)
    automatic = fastadv.APGD(model, eps, 20, **options)(x, y)
    assert robust_accuracy(model, automatic, y) <= robust_accuracy(model, plain, y) + 0.005


def test_the_checkpoints_are_those_of_the_paper() -> None:
    """p_0 = 0, p_1 = .22, p_{j+1} = p_j + max(p_j - p_{j-1} - .03, .06), in 100 steps."""
    assert list(checkpoints(100)) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert checkpoints(100)[41] == 22
    assert list(checkpoints(10)) == [2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert list(checkpoints(1)) == [1]


def course(values: list[list[float]], rho: float = 0.75) -> tuple[StepSizes, Tensor]:
    """A schedule that has seen these values [steps + 1][B]; the points are the numbers of the steps."""
    points = [torch.full((len(v), 1), float(step)) for step, v in enumerate(values)]
    schedule = StepSizes(points[0], torch.tensor(values[0]), points[0], 0.5, rho)
    for point, value in zip(points[1:], values[1:], strict=True):
        schedule.note(point, torch.tensor(value), 10 * point)
    return schedule, points[-1]


def test_a_step_is_halved_where_the_loss_rises_too_rarely() -> None:
    # Four steps with 4, 3, 2 and 0 rises; fewer than 3 are too few.
    values = [[0.0] * 4, [1, 1, 1, -1.0], [2, 0, 0, -2.0], [3, 1, 1, -3.0], [4, 2, -1, -4.0]]
    schedule, adv = course(values)
    adv = schedule.check(adv, 4)
    assert schedule.alpha.tolist() == [1, 1, 0.5, 0.5]
    assert adv.flatten().tolist() == [4, 4, 1, 0]  # back to the best where halved
    assert schedule.grad.flatten().tolist() == [40, 40, 10, 0]


def test_a_step_is_halved_where_nothing_has_changed_since_the_last_checkpoint() -> None:
    schedule, adv = course([[9.0, 0.0], [1, 1], [2, 2], [3, 3]])  # 2 of 3 and 3 of 3 rises
    adv = schedule.check(adv, 3)
    assert schedule.alpha.tolist() == [0.5, 1] and adv.flatten().tolist() == [0, 3]
    for value in (
        [9.1, 0.0],
        [9.2, 0.5],
        [9.3, 0.6],
        [9.4, 0.7],
    ):  # rises, the second below its best
        schedule.note(adv + 1, torch.tensor(value), adv)
    schedule.check(adv + 1, 4)
    assert schedule.alpha.tolist() == [0.5, 0.5]
    # Its step was halved at the last checkpoint, so the second condition does not hold for it now.
    for value in ([9.5, 1.1], [9.6, 1.2], [9.7, 1.3], [9.8, 1.4]):
        schedule.note(adv, torch.tensor(value), adv)
    schedule.check(adv, 4)
    assert schedule.alpha.tolist() == [0.5, 0.5]


def test_restarts_attack_only_what_is_left() -> None:
    model, (x, y), sizes = trained_small_cnn(), digits_test(64), []

    def watching(images: Tensor) -> Tensor:
        sizes.append(len(images))
        return model(images)

    attack = fastadv.APGD(watching, 0.08, 5, restarts=3, seed=0)
    adv = attack(x, y)
    runs = [sizes[start] for start in range(0, len(sizes), 6)]
    assert runs[0] == 64 and runs[0] > runs[1] >= runs[2]
    one = fastadv.APGD(model, 0.08, 5, seed=0, precision="fp32")(x, y)
    broken = model(one).argmax(1) != y
    assert runs[1] == int((~broken).sum())
    assert torch.equal(adv[broken], one[broken])
    assert (model(adv).argmax(1) != y)[broken].all()


def test_targets_are_tried_until_one_is_reached() -> None:
    model, (x, y) = trained_small_cnn(), digits_test(64)
    accuracies = [
        robust_accuracy(
            model,
            fastadv.APGD(
                model, 0.08, 10, loss="dlr-t", target_classes=count, seed=0, precision="fp32"
            )(x, y),
            y,
        )
        for count in (1, 9)
    ]
    assert accuracies[1] <= accuracies[0]


def test_the_targets_are_the_likeliest_wrong_classes() -> None:
    logits = torch.tensor([[5.0, 4, 3, 2, 1], [5, 4, 3, 2, 1]])
    y = torch.tensor([0, 2])
    assert likeliest_wrong_classes(logits, y, 3).tolist() == [[1, 2, 3], [0, 1, 3]]
    assert likeliest_wrong_classes(logits, y, 9).shape == (2, 4)


def test_targeted_dlr_is_equation_7() -> None:
    logits = torch.tensor([[4.0, 1, 3, 2, 0.5], [0, 1, 2, 3, 7]], requires_grad=True)
    y, target = torch.tensor([0, 1]), torch.tensor([1, 4])
    value = dlr_targeted_objective(logits, y, target)
    expected = torch.tensor([-(4.0 - 1) / (4 - (2 + 1) / 2), -(1.0 - 7) / (7 - (2 + 1) / 2)])
    torch.testing.assert_close(value, expected)
    shifted = dlr_targeted_objective(3 * logits + 5, y, target)  # what the ratio is for
    torch.testing.assert_close(shifted, expected)
    value.sum().backward()
    assert logits.grad is not None and logits.grad[0, 1] > 0


def test_targeted_losses_are_computed_in_float32() -> None:
    logits, y = torch.randn(4, 10).bfloat16(), torch.arange(4)
    for loss in ("ce-t", "dlr-t"):
        value = targeted_value(loss, logits, y, y + 1)
        assert value.dtype == torch.float32
        assert torch.equal(value, targeted_value(loss, logits.float(), y, y + 1))
    assert targeted_value("dlr-t", logits.double(), y, y + 1).dtype == torch.float64


@pytest.mark.parametrize(("loss", "classes"), [("dlr", 2), ("dlr-t", 3)])
def test_too_few_classes_are_refused(loss: str, classes: int) -> None:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, classes))
    with pytest.raises(
        ValueError, match=rf"'{loss}' must have at least {classes + 1} classes, got"
    ):
        fastadv.APGD(model, loss=loss)(digits_test(4)[0], torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize(
    ("case", "error", "message"),
    [
        ({"loss": "kl"}, ValueError, "loss must be one of ce, dlr, cw, ce-t, dlr-t, got 'kl'"),
        ({"loss": "ce-t", "targeted": True}, ValueError, "targeted must be False"),
        ({"steps": 0}, ValueError, "steps must be >= 1"),
        ({"restarts": 1.5}, TypeError, "restarts must be an integer"),
        ({"target_classes": 0}, ValueError, "target_classes must be >= 1"),
        ({"rho": 1.5}, ValueError, r"rho must be in 0 \.\. 1, got 1.5"),
        ({"norm": "l0"}, ValueError, "norm must be one of linf, l2"),
    ],
)
def test_bad_settings_are_refused(case: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fastadv.APGD(trained_small_cnn(), **case)
