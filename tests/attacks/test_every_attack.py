"""What holds for every attack: limits, state, seeds, company, targets, and both engines."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attack_helpers import (
    ORDERS,
    assert_same_state,
    digits_test,
    images,
    largest_change,
    robust_accuracy,
    state_of,
    trained_small_cnn,
)
from attack_zoo import (
    ATTACKS,
    BALL_ATTACKS,
    NAMES_AND_NORMS,
    RADIUS,
    TARGETED,
    WAYS,
    WITHOUT_GRADIENT,
    classes_with,
)
from torch import Tensor, nn

import fastadv

pytestmark = pytest.mark.usefixtures("one_thread")
every_class_every_way = pytest.mark.covering(facts=classes_with("way"))


@pytest.mark.covering(
    facts=lambda given: {
        (given["name"], given["norm"]),
        (given["norm"], given["way"], given["dtype"]),
        *classes_with("way", "dtype")(given),
    }
)
@pytest.mark.parametrize(
    ("way", "dtype"),
    [*((way, torch.float32) for way in WAYS), ("compiled bf16", torch.bfloat16)],
)
@pytest.mark.parametrize(("name", "norm"), NAMES_AND_NORMS)
def test_the_result_is_inside_ball_and_bounds(
    name: str, norm: str, dtype: torch.dtype, way: str
) -> None:
    (x, y), model = digits_test(16), trained_small_cnn()
    x = x.to(dtype).contiguous(memory_format=torch.channels_last)
    attack = BALL_ATTACKS[name](model, norm, seed=0, **WAYS[way])
    adv = attack(x, y)
    assert adv.dtype == dtype and adv.stride() == x.stride() and not adv.requires_grad
    assert adv.min() >= 0 and adv.max() <= 1
    reached = largest_change(adv, x, norm)
    assert 0.9 * RADIUS[norm] < reached <= RADIUS[norm] * (1 + 1e-6)
    if norm == "linf":  # not an element further than float32 can say
        assert (adv.float() <= x.float() + RADIUS[norm]).all()
        assert (adv.float() >= x.float() - RADIUS[norm]).all()
    assert attack.last.outside_share == 0


@pytest.mark.covering(facts=classes_with("bounds"))
@pytest.mark.parametrize("bounds", [(-0.3, 0.5), (-1.0, 3.0)])
@pytest.mark.parametrize("name", ATTACKS)
def test_other_bounds_hold(name: str, bounds: tuple[float, float]) -> None:
    (x, y), (low, high) = digits_test(16), bounds
    x = (low + (high - low) * x).clamp(*torch.tensor(bounds).tolist())
    attack = ATTACKS[name](trained_small_cnn(), bounds=bounds, seed=0, precision="fp32")
    adv = attack(x, y)
    assert torch.tensor(low) <= adv.min() and adv.max() <= torch.tensor(high)
    assert attack.last.outside_share == 0
    assert not torch.equal(adv, x)


@every_class_every_way
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [name for name in ATTACKS if name not in WITHOUT_GRADIENT])
def test_it_lowers_the_accuracy(name: str, way: str) -> None:
    model, (x, y) = trained_small_cnn(), digits_test(64)
    adv = ATTACKS[name](model, seed=0, **WAYS[way])(x, y)
    assert robust_accuracy(model, adv, y) < robust_accuracy(model, x, y) - 0.15


@every_class_every_way
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ATTACKS)
def test_model_and_random_state_are_as_before(name: str, way: str) -> None:
    model, (x, y) = trained_small_cnn().train(), digits_test(8)
    model.bn2.eval()
    model.conv1.weight.requires_grad_(False)
    x_before, y_before, before = x.clone(), y.clone(), state_of(model)
    ATTACKS[name](model, seed=1, **WAYS[way])(x, y)
    assert_same_state(state_of(model), before)
    assert torch.equal(x, x_before) and torch.equal(y, y_before)


@pytest.mark.parametrize("name", ATTACKS)
def test_train_mode_leaves_no_trace_either(name: str) -> None:
    model, (x, y) = trained_small_cnn(), digits_test(8)
    before = state_of(model)
    attack = ATTACKS[name](model, seed=1, precision="fp32", engine="eager", train_mode=True)
    adv = attack(x, y)
    assert_same_state(state_of(model), before)
    evaluated = ATTACKS[name](model, seed=1, precision="fp32", engine="eager")(x, y)
    assert not torch.equal(adv, evaluated)


@pytest.mark.parametrize("name", ATTACKS)
def test_all_is_as_before_when_the_model_raises_midway(name: str) -> None:
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.calls = trained_small_cnn(), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            if self.calls == (1 if name.startswith("fgsm") else 2):
                raise ArithmeticError("midway")
            return self.net(x)

    model, (x, y) = Fails().train(), digits_test(8)
    before = state_of(model)
    attack = ATTACKS[name](model, seed=1, precision="fp32", engine="eager")
    with pytest.raises(ArithmeticError, match="midway"):
        attack(x, y)
    assert_same_state(state_of(model), before)
    with pytest.raises(RuntimeError, match="last must be read after a call"):
        _ = attack.last


@every_class_every_way
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ATTACKS)
def test_one_seed_gives_one_result(name: str, way: str) -> None:
    model, (x, y) = trained_small_cnn(), digits_test(8)
    attack = ATTACKS[name](model, **WAYS[way])
    first = attack(x, y, seed=1)
    assert torch.equal(attack(x, y, seed=1), first)
    draws = name not in ("fgsm", "mim", "cw-l2", "fab-t", "fab")
    assert torch.equal(attack(x, y, seed=2), first) != draws


@every_class_every_way
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ATTACKS)
def test_a_part_of_a_batch_gets_what_it_gets_in_the_whole(name: str, way: str) -> None:
    """Whatever its company. Here torch's convolutions and products round alike for any batch but one of a
    single image, so most results agree bit for bit; a library that rounds otherwise may flip the sign of a
    gradient that is next to zero, which moves an image but rarely across the boundary.
    """
    model, (x, y), ids = trained_small_cnn(), digits_test(48), torch.arange(100, 148)
    attack = ATTACKS[name](model, **WAYS[way])
    whole = attack(x, y, seed=1, sample_ids=ids)
    rows = torch.tensor([40, 3, 4, 5, 17, 20, 21, 22, 46, 30, 31, 7])
    part = attack(x[rows], y[rows], seed=1, sample_ids=ids[rows])
    furthest = (part - whole[rows]).flatten(1).abs().amax(1)
    assert (furthest <= 1e-5).float().mean() >= 0.9, furthest
    with torch.no_grad():
        assert torch.equal(
            model(part).argmax(1) == y[rows], model(whole[rows]).argmax(1) == y[rows]
        )


@pytest.mark.parametrize("name", TARGETED)
def test_targeted_attacks_reach_their_targets(name: str) -> None:
    model, (x, y) = trained_small_cnn(), digits_test(64)
    targets = (y + 1 + torch.arange(64) % 9) % 10
    attack = ATTACKS[name](model, "l2", targeted=True, seed=0, precision="fp32")
    limits = {} if name == "cw-l2" else {"eps": 1.5}
    with torch.no_grad():
        reached = (model(attack(x, targets, **limits)).argmax(1) == targets).float().mean()
        before = (model(x).argmax(1) == targets).float().mean()
    assert before <= 0.02  # leaving the label for any of the nine others alike would make 0.11
    assert reached > (0.2 if name.startswith("fgsm") else 0.3), reached


@pytest.mark.covering(facts=classes_with("norm"))
@pytest.mark.parametrize(("name", "norm"), NAMES_AND_NORMS)
def test_every_image_may_have_its_own_radius(name: str, norm: str) -> None:
    model, (x, y) = trained_small_cnn(), digits_test(16)
    radii = torch.linspace(0, 1, 16) * RADIUS[norm]
    attack = BALL_ATTACKS[name](model, norm, seed=0, precision="fp32")
    adv = attack(x, y, eps=radii)
    delta = (adv.double() - x.double()).flatten(1)
    size = delta.norm(ORDERS[norm], dim=1)
    assert (size <= radii * (1 + 1e-6) + 1e-7).all()
    # A single step may undo some of the noise from which it starts.
    assert (size >= (0.2 if name == "fgsm-rs" else 0.5) * radii).all()
    assert attack.last.outside_share == 0
    # The radius of a call is that of an attack made with it, step size included.
    for index in (4, 15):
        alone = attack(x, y, eps=float(radii[index]))[index]
        torch.testing.assert_close(alone, adv[index], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ATTACKS)
def test_an_optimiser_step_is_seen(name: str) -> None:
    model, (x, y) = trained_small_cnn(), digits_test(8)
    attack = ATTACKS[name](model, seed=1, precision="bf16")
    stale = attack(x, y)
    F.cross_entropy(model(x), (y + 1) % 10).backward()
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    fresh = ATTACKS[name](model, seed=1, precision="bf16")(x, y)
    assert torch.equal(attack(x, y), fresh) and not torch.equal(fresh, stale)


@pytest.mark.parametrize("name", ATTACKS)
def test_an_empty_batch_comes_back_empty(name: str) -> None:
    x, y = torch.empty(0, 1, 8, 8), torch.empty(0, dtype=torch.int64)
    attack = ATTACKS[name](trained_small_cnn())
    assert attack(x, y).shape == x.shape
    assert attack.last.engine == "none" and attack.last.loss_per_step == ()


@pytest.mark.parametrize("name", ATTACKS)
def test_any_callable_is_a_model(name: str) -> None:
    model, (x, y) = trained_small_cnn(), digits_test(8)
    options = {"seed": 0, "precision": "fp32"}
    adv = ATTACKS[name](lambda images: model(images), **options)(x, y)  # type: ignore[arg-type]
    assert torch.equal(adv, ATTACKS[name](model, **options)(x, y))


BAD_CALLS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": images(4) * 255}, ValueError, "x must be finite and within bounds"),
    ({"y": torch.full((4,), 10)}, ValueError, r"y must be in 0 \.\. 9"),
    ({"seed": 1.5}, TypeError, "seed must be an integer"),
    ({"sample_ids": torch.arange(3)}, ValueError, "sample_ids must be"),
    ({"eps": "1"}, TypeError, "eps must"),
    ({"eps": torch.rand(3)}, (TypeError, ValueError), "eps must"),  # type: ignore[list-item]
]


@pytest.mark.parametrize(("case", "error", "message"), BAD_CALLS)
@pytest.mark.parametrize("name", ATTACKS)
def test_a_bad_call_is_refused(
    name: str, case: dict[str, Any], error: type[Exception], message: str
) -> None:
    x, y = digits_test(4)
    arguments = {"x": x, "y": y, **case}
    if "x" in case:
        arguments["x"] = case["x"][:, :1]
    with pytest.raises(error, match=message):
        ATTACKS[name](trained_small_cnn(), precision="fp32")(**arguments)


KINDS = [
    *(fastadv.PGD, fastadv.FGSM, fastadv.FGSMRS, fastadv.MIM, fastadv.CW, fastadv.APGD),
    *(fastadv.CWL2, fastadv.FAB, fastadv.FriendlyPGD, fastadv.Square),
]
BAD_SETTINGS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"precision": "int8"}, ValueError, "precision must be one of auto"),
    ({"engine": "fast"}, ValueError, "engine must be one of"),
    ({"bounds": (1, 0)}, ValueError, "bounds must be"),
    ({"seed": 0.5}, TypeError, "seed must be an integer"),
]


@pytest.mark.parametrize(("case", "error", "message"), BAD_SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_setting_is_refused_when_the_attack_is_made(
    kind: Any, case: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        kind(trained_small_cnn(), **case)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind is not fastadv.CWL2])
@pytest.mark.parametrize("eps", [-0.1, float("nan"), float("inf"), "8/255", None])
def test_a_bad_radius_is_refused(kind: Any, eps: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="eps must be"):
        kind(trained_small_cnn(), eps)


RESTARTED = {
    "pgd": lambda model, runs: fastadv.PGD(model, 0.05, 0.02, 2, restarts=runs),
    "fgsm-rs": lambda model, runs: fastadv.FGSMRS(model, 0.05, restarts=runs),
    "apgd": lambda model, runs: fastadv.APGD(model, 0.05, 3, runs),
    "apgd-t": lambda model, runs: fastadv.APGD(model, 0.05, 3, runs, loss="ce-t", target_classes=2),
    "apgd l1": lambda model, runs: fastadv.APGD(model, 1.0, 3, runs, norm="l1"),
    "fab": lambda model, runs: fastadv.FAB(model, 0.05, 2, 2, restarts=runs),
    "square": lambda model, runs: fastadv.Square(model, 0.05, 4, restarts=runs),
}


@pytest.mark.parametrize("name", RESTARTED)
def test_only_the_first_of_several_restarts_begins_at_a_given_start(name: str) -> None:
    x = digits_test(4)[0].clamp(0.2, 0.8)
    begun: list[Tensor] = []

    def unbroken(seen: Tensor) -> Tensor:
        begun.append(seen.detach().clone())
        flat = seen.flatten(1)
        return torch.stack([flat.mean(1) + 9, flat[:, 0], flat[:, 9], flat[:, 20]], dim=1)

    start = x + 0.01

    def passes_at_the_start(runs: int) -> int:
        begun.clear()
        attack = RESTARTED[name](unbroken, runs)
        attack.seed = 3
        attack(x, torch.zeros(4, dtype=torch.long), start=start)
        shown = [(row - start[0]).abs().max() < 1e-6 for seen in begun for row in seen]
        return sum(map(bool, shown))

    assert passes_at_the_start(3) == passes_at_the_start(1) > 0
