"""The Square attack against its reference implementation, against a closed form, and its budget."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
from attack_helpers import digits_test, robust_accuracy, trained_small_cnn
from attack_zoo import RADIUS, WAYS
from linear_model import linear_problem
from torch import Tensor, nn

import fastadv
from fastadv.attacks.batch import AttackBatch
from fastadv.attacks.square import SquareSettings, share_at
from fastadv.attacks.square_proposals import _heap

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
LIBRARY_NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}


def reference_adversarial(norm: str, queries: int, x: Tensor, y: Tensor, seed: int) -> Tensor:
    """What pyautoattack's Square returns once its squares may also touch the last row and column.

    As published it draws their places one short of the end, which on images this small is a weaker attack.
    """
    library = pytest.importorskip("pyautoattack.square")

    class Inclusive(library.SquareAttack):  # type: ignore[misc]
        def random_int(self, low: int = 0, high: int = 1, shape: Any = (1,)) -> Tensor:
            return super().random_int(low, high + 1, shape)

    attack = Inclusive(
        trained_small_cnn().requires_grad_(False),
        norm=LIBRARY_NORMS[norm],
        n_queries=queries,
        eps=RADIUS[norm],
        seed=seed,
        resc_schedule=False,
    )
    with torch.random.fork_rng(), torch.no_grad():
        return attack.perturb(x.clone(), y)


@pytest.mark.parametrize("norm", RADIUS)
def test_it_breaks_as_many_as_the_reference(norm: str) -> None:
    """Within the reference's own spread over seeds, which is about 4 images of 150."""
    model, (x, y), queries = trained_small_cnn(), digits_test(150), 120
    seeds = range(2)
    expected = [
        robust_accuracy(model, reference_adversarial(norm, queries, x, y, seed), y)
        for seed in seeds
    ]
    attack = fastadv.Square(model, RADIUS[norm], queries, norm=norm)
    found = [robust_accuracy(model, attack(x, y, seed=seed), y) for seed in seeds]
    assert 0.05 < sum(expected) / 2 < 0.9
    assert abs(sum(found) - sum(expected)) / 2 <= 0.04


@cache
def plain_accuracy() -> float:
    model, (x, y) = trained_small_cnn(), digits_test(100)
    return robust_accuracy(model, fastadv.Square(model, 0.08, 100, seed=0)(x, y), y)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_run_it_finds_nearly_as_many(way: str) -> None:
    model, (x, y) = trained_small_cnn(), digits_test(100)
    adv = fastadv.Square(model, 0.08, 100, seed=0, **WAYS[way])(x, y)
    slack = 0.06 if "bf16" in way else 0.02
    assert abs(robust_accuracy(model, adv, y) - plain_accuracy()) <= slack


def test_on_a_linear_model_it_breaks_what_can_be_broken_and_nothing_else() -> None:
    model, x, y = linear_problem(classes=4, n=60)
    breakable = ~model.exactly_robust(x, y, 0.03)
    attack = fastadv.Square(model, 0.03, 1500, seed=0, rescale_schedule=True)
    broken = model(attack(x, y)).argmax(1) != y
    assert 20 < breakable.sum() < 50 and not (broken & ~breakable).any()
    assert broken.sum() >= 0.9 * breakable.sum()


def test_the_shares_are_the_reference_s() -> None:
    library = pytest.importorskip("pyautoattack.square")
    for queries, rescale in ((5000, False), (5000, True), (300, True), (10000, False)):
        theirs = library.SquareAttack(None, n_queries=queries, resc_schedule=rescale)
        settings = SquareSettings(queries=queries, rescale_schedule=rescale)
        for query in range(queries):
            assert share_at(query, settings) == theirs.p_selection(query)


@pytest.mark.parametrize(("norm", "order"), [("l2", 2), ("l1", 1)])
def test_the_bumps_are_the_reference_s(norm: str, order: int) -> None:
    library = pytest.importorskip("pyautoattack.square")
    theirs = library.SquareAttack(None, norm=LIBRARY_NORMS[norm], device="cpu")
    for height, width in ((1, 1), (1, 3), (2, 5), (3, 5), (3, 7), (4, 7), (13, 27)):
        expected = theirs.eta_rectangles(height, width)
        torch.testing.assert_close(_heap(height, width, order).float(), expected)


@pytest.mark.parametrize("norm", RADIUS)
def test_a_result_does_not_depend_on_the_others_in_the_batch(norm: str) -> None:
    model, (x, y) = trained_small_cnn().double(), digits_test(24)
    attack = fastadv.Square(model, RADIUS[norm], 60, norm=norm, seed=5)
    ids = torch.arange(100, 124)
    together = attack(x.double(), y, sample_ids=ids)
    some = torch.tensor([17, 3, 11])
    alone = attack(x[some].double(), y[some], sample_ids=ids[some])
    torch.testing.assert_close(alone, together[some], rtol=0, atol=1e-12)
    assert not torch.equal(attack(x.double(), y, seed=6, sample_ids=ids), together)


def watched(model: nn.Module) -> tuple[Any, list[int]]:
    """The model as a callable that notes the sizes of its batches."""
    sizes: list[int] = []

    def call(images: Tensor) -> Tensor:
        sizes.append(len(images))
        return model(images)

    return call, sizes


def test_broken_images_leave_at_once_and_the_budget_holds() -> None:
    model, (x, y) = trained_small_cnn(), digits_test(64)
    call, sizes = watched(model)
    adv = fastadv.Square(call, 0.08, 40, seed=0)(x, y)
    assert len(sizes) == 40 and sizes[0] == 64 and sizes == sorted(sizes, reverse=True)
    assert sizes[-1] >= int((model(adv).argmax(1) == y).sum()) > 0
    fewer = fastadv.Square(call, 0.08, 20, seed=0)(x, y)
    broken = model(fewer).argmax(1) != y
    assert torch.equal(adv[broken], fewer[broken])  # what is broken is not changed any more
    easy, sizes = watched(model)
    fastadv.Square(easy, 1.0, 1000, seed=0)(x[:8], y[:8])
    assert len(sizes) < 100


def counted(model: nn.Module) -> tuple[nn.Module, list[int]]:
    """The model as a module that notes the sizes of its batches."""
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    return model, sizes


@pytest.mark.parametrize(("norm", "queries"), [("linf", 70), *((norm, 331) for norm in RADIUS)])
def test_looking_ahead_changes_no_result(
    norm: str, queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (x, y), ids = digits_test(24), torch.arange(500, 524)
    model, sizes = counted(trained_small_cnn(half=False).double())
    attack = fastadv.Square(model, RADIUS[norm], queries, norm=norm, seed=3)
    ahead = attack(x.double(), y, sample_ids=ids)
    passes, points = len(sizes), sum(sizes)
    monkeypatch.setattr(fastadv.attacks.square, "queries_at_once", lambda *_: 1)
    sizes.clear()
    plain = attack(x.double(), y, sample_ids=ids)
    left = int((model(plain).argmax(1) == y).sum())
    assert 0 < left < 24
    torch.testing.assert_close(ahead, plain, rtol=0, atol=1e-12)
    assert passes < len(sizes) / (2 if queries > 300 else 1) and points < 1.8 * sum(sizes)


def test_only_modules_that_draw_nothing_are_asked_ahead() -> None:
    """A callable may count its queries, and a model that draws gives other logits at every pass."""
    (x, y), model = digits_test(4), trained_small_cnn()
    call, sizes = watched(model)
    fastadv.Square(call, 0.01, 300, seed=0)(x, y)
    assert len(sizes) == 300
    noisy, sizes = counted(nn.Sequential(nn.Dropout(0.2).train(), model))
    noisy.eval()
    noisy[0].forward = lambda images: images + 1e-3 * torch.randn_like(images)
    attack = fastadv.Square(noisy, 0.01, 300, seed=0)
    sizes.clear()
    attack(x, y)
    assert max(sizes) <= 4 and len(sizes) >= 300


@pytest.mark.parametrize("has_rule", [False, True])
def test_a_model_with_a_rule_on_the_number_of_images_is_not_asked_ahead(
    has_rule: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Rule(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = trained_small_cnn()

        def forward(self, images: Tensor) -> Tensor:
            logits = self.net(images)
            return -logits if has_rule and len(images) >= 40 else logits

    sizes: list[int] = []
    logits = AttackBatch.logits
    monkeypatch.setattr(
        AttackBatch, "logits", lambda batch, adv: sizes.append(len(adv)) or logits(batch, adv)
    )
    x, y = digits_test(8)
    fastadv.Square(Rule(), 0.01, 300, precision="bf16", engine="compiled", seed=0)(x, y)
    assert (max(sizes) <= 8) == has_rule


def test_restarts_attack_only_what_is_left() -> None:
    model, (x, y) = trained_small_cnn(), digits_test(64)
    call, sizes = watched(model)
    attack = fastadv.Square(call, 0.12, 10, restarts=3, seed=0)
    adv = attack(x, y)
    runs = sizes[::10]
    assert len(sizes) == 30 and runs[0] == 64 > runs[1] > runs[2] > 0
    assert sizes[9] >= runs[1] and int((model(adv).argmax(1) == y).sum()) <= runs[2]


def test_in_train_mode_no_image_leaves() -> None:
    model, (x, y) = trained_small_cnn(), digits_test(32)
    call, sizes = watched(model)
    fastadv.Square(call, 0.08, 10, train_mode=True, restarts=2, seed=0)(x, y)
    assert sizes == [32] * 20


@pytest.mark.parametrize("norm", RADIUS)
def test_images_that_are_not_square_and_small_ones(norm: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((3, 5, 9), (2, 9, 4), (1, 1, 1), (40, 3, 3)):
        x = torch.rand(6, *shape, generator=generator)
        linear = nn.Linear(math.prod(shape), 3)
        model = nn.Sequential(nn.Flatten(), linear)
        attack = fastadv.Square(model, 0.1, 30, norm=norm, seed=0)
        adv = attack(x, model(x).argmax(1))
        assert adv.shape == x.shape and attack.last.outside_share == 0
        assert not torch.equal(adv, x)


@pytest.mark.parametrize("loss", ["cw", "ce"])
def test_targets_are_reached(loss: str) -> None:
    model, (x, y) = trained_small_cnn(), digits_test(48)
    targets = (y + 1 + torch.arange(48) % 9) % 10
    attack = fastadv.Square(model, 1.5, 200, norm="l2", loss=loss, targeted=True, seed=0)
    with torch.no_grad():
        reached = model(attack(x, targets)).argmax(1) == targets
    assert reached.float().mean() > 0.35


def test_it_begins_where_it_is_told() -> None:
    model, (x, y) = trained_small_cnn(), digits_test(8)
    start = (x + 0.02).clamp(0, 1)
    adv = fastadv.Square(model, 0.08, 1, seed=0)(x, y, start=start)
    assert torch.equal(adv, start)


@pytest.mark.parametrize(
    ("case", "error", "message"),
    [
        ({"queries": 0}, ValueError, "queries must be >= 1"),
        ({"queries": 10.0}, TypeError, "queries must be an integer"),
        ({"restarts": 0}, ValueError, "restarts must be >= 1"),
        ({"p_init": 0}, ValueError, "p_init must be above 0 and at most 1, got 0"),
        ({"p_init": 1.5}, ValueError, "p_init must be above 0 and at most 1, got 1.5"),
        ({"p_init": "1"}, TypeError, "p_init must be a number"),
        ({"loss": "dlr"}, ValueError, "loss must be one of cw, ce, got 'dlr'"),
        ({"rescale_schedule": 1}, TypeError, "rescale_schedule must be True or False"),
        ({"engine": "graph"}, ValueError, "engine must be 'auto', 'eager' or 'compiled'"),
    ],
)
def test_bad_settings_are_refused(case: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fastadv.Square(trained_small_cnn(), **case)


def test_images_without_rows_and_columns_are_refused() -> None:
    with pytest.raises(ValueError, match=r"x must have shape \[B, C, H, W\] for Square"):
        fastadv.Square(nn.Linear(8, 3))(torch.rand(4, 8), torch.zeros(4, dtype=torch.int64))
