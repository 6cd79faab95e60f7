"""Methods on pairs of images: one step against plain float64 formulas, their passes, attacks and starts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_methods import Counting, take_step
from torch import Tensor, nn
from training_helpers import (
    CPU,
    check_step,
    make_batch,
    make_method,
    make_model,
    small_data,
    small_recipe,
)

from fastadv.models import WideResNet
from fastadv.ranks import Ranks
from fastadv.trainers import Attacked, Recipe, Runtime, find_method, train
from fastadv.trainers.act import Act, AttackedWithNaturalLogits
from fastadv.trainers.hat import AttackedWithHelpers
from fastadv.trainers.phases import PhaseTimer
from fastadv.trainers.vfd import Guided

pytestmark = pytest.mark.usefixtures("one_thread")
DOUBLE = torch.float64
TEACHER_OF = {"hat", "vfd"}
PAIRS: list[tuple[str, dict[str, Any]]] = [
    ("trades", {}),
    ("trades", {"beta": 1.0}),
    ("mart", {}),
    ("mart", {"code_constants": True}),
    ("alp", {}),
    ("hat", {}),
    ("vfd", {"base": "trades"}),
    ("vfd", {"base": "alp"}),
    ("vfd", {"base": "alp", "beta": 0.5, "weight": 0.9, "lam": 0.04}),
    ("vfd", {"base": "mart", "lam": 0.01}),
    ("vfd", {"base": "mart", "beta": 2.0, "weight": 3.0, "code_constants": True}),
    ("vfd", {"base": "mart", "beta": 0.0}),
    ("vfd", {"base": "hat"}),
    ("act", {}),
    ("act", {"weight": 0.5, "temperature": 4.0}),
    ("lbgat", {}),
    ("lbgat", {"beta": 6.0}),
    ("lbgat", {"fixed": True}),
]
pairs = pytest.mark.parametrize(("name", "numbers"), PAIRS)


def p_of(z: Tensor) -> Tensor:
    return z.exp() / z.exp().sum(1, keepdim=True)


def ce(z: Tensor, y: Tensor) -> Tensor:
    return -torch.stack([row[label] for row, label in zip(p_of(z).log(), y, strict=True)])


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p_of(p) * (p_of(p) / p_of(q)).log()).sum(1)


def bce(z: Tensor, y: Tensor) -> Tensor:
    wrong = [
        torch.cat((p[:label], p[label + 1 :])).max() for p, label in zip(p_of(z), y, strict=True)
    ]
    return ce(z, y) - (1 - torch.stack(wrong)).log()


def slow_trades(clean: Tensor, adv: Tensor, y: Tensor, beta: float) -> Tensor:
    return (ce(clean, y) + beta * kl(clean, adv)).mean()


def mart_per_image(clean: Tensor, adv: Tensor, y: Tensor, beta: float, code: bool) -> Tensor:
    doubt = torch.stack([1 - p[label] for p, label in zip(p_of(clean), y, strict=True)])
    if not code:
        return bce(adv, y) + beta * kl(clean, adv) * doubt
    p, q = p_of(clean), p_of(adv)
    wrong = torch.stack(
        [torch.cat((r[:label], r[label + 1 :])).max() for r, label in zip(q, y, strict=True)]
    )
    apart = (p * p.log() - p * (q + 1e-12).log()).sum(1)
    return ce(adv, y) - (1.0001 - wrong + 1e-12).log() + beta * apart * (doubt + 1e-7)


def slow_mart(clean: Tensor, adv: Tensor, y: Tensor, beta: float, code: bool = False) -> Tensor:
    return mart_per_image(clean, adv, y, beta, code).mean()


def slow_alp(clean: Tensor, adv: Tensor, y: Tensor, weight: float) -> Tensor:
    hard = torch.cat((ce(clean, y), ce(adv, y))).mean()
    return hard + weight * (clean - adv).square().mean()


SLOW = {"trades": slow_trades, "mart": slow_mart, "alp": slow_alp, "hat": slow_trades}
# Of VFD-Adv's equation 6: beta of L_adv, and the weight of its second term, where nothing else is said.
VFD_BETA = {"trades": 6.0, "mart": 1.0, "alp": 1.0, "hat": 2.5}
VFD_WEIGHT = {"mart": 5.0, "alp": 0.5}


def slow_vfd(recipe: Any, clean: Tensor, adv: Tensor, y: Tensor) -> Tensor:
    """L_clean + beta L_adv."""
    beta = VFD_BETA[recipe.base] if recipe.beta is None else recipe.beta
    weight = VFD_WEIGHT.get(recipe.base, 0.0) if recipe.weight is None else recipe.weight
    if recipe.base == "alp":
        adversarial = ce(adv, y) + weight * (clean - adv).square().mean(1)
    elif recipe.base == "mart":
        adversarial = mart_per_image(clean, adv, y, weight, recipe.code_constants)
    else:
        adversarial = kl(clean, adv)
    return ce(clean, y).mean() + beta * adversarial.mean()


def length(t: Tensor) -> Tensor:
    return t.flatten(1).square().sum(1).sqrt()


def slow_loss(
    method: Any, model: Any, natural: Any, teacher: Any, x: Tensor, adv: Tensor, y: Tensor
) -> Tensor:
    """The paper's formula with the models in training mode, the teacher in evaluation mode."""
    recipe, name = method.recipe, method.name
    if name == "act":
        clean, robust, a, t = natural(x), model(adv), recipe.weight, recipe.temperature
        soft = (
            t * t * kl(clean.detach() / t, robust / t),
            t * t * kl(robust.detach() / t, clean / t),
        )
        hard = ce(robust, y), ce(clean, y)
        return sum(((1 - a) * h + a * s).mean() for h, s in zip(hard, soft, strict=True))
    if name == "lbgat":
        guide = teacher(x).detach() if recipe.fixed else natural(x)
        robust, clean = model(adv), model(x)  # in this order through BatchNorm
        loss = (robust - guide).square().mean() + (0 if recipe.fixed else ce(guide, y).mean())
        return loss + recipe.beta * kl(clean, robust).mean() if recipe.beta else loss
    base = recipe.base if name == "vfd" else name
    if name == "alp":
        clean_logits, adv_logits = model(torch.cat((x, adv))).chunk(2)
        return slow_alp(clean_logits, adv_logits, y, recipe.weight)
    clean, attacked = model.forward_features(x), model.forward_features(adv)
    logits = model.forward_head(clean), model.forward_head(attacked)
    if name == "vfd":
        loss = slow_vfd(recipe, *logits, y)
    else:
        code = {"code": True} if getattr(recipe, "code_constants", False) else {}
        loss = SLOW[name](*logits, y, recipe.beta, **code)
    if base == "hat":
        labels = teacher(adv).argmax(1)
        loss = loss + recipe.gamma * ce(model(x + 2 * (adv - x)), labels).mean()
    if name == "vfd":
        vanilla = teacher.forward_features(x)
        apart = length(attacked - vanilla) + length(clean - vanilla)
        loss = loss + recipe.lam * apart.mean()
    return loss


def images_of(method: Any, x: Tensor, adv: Tensor) -> Attacked:
    """What the method's attack would hand over, had it found these images."""
    helped = getattr(method.recipe, "base", method.name) == "hat"
    teacher = method.teachers.get("teacher")
    with torch.no_grad():
        helper = (x + 2 * (adv - x), teacher(adv).argmax(1)) if helped else (None, None)
        if method.name == "hat":
            return AttackedWithHelpers(adv, *helper)
        if method.name == "vfd":
            return Guided(adv, teacher.forward_features(x), *helper)
    return (
        AttackedWithNaturalLogits(adv, method.natural(x)) if method.name == "act" else Attacked(adv)
    )


def build(name: str, model: nn.Module, teacher: nn.Module, **numbers: Any) -> Any:
    needed = name in TEACHER_OF or numbers.get("fixed", False)
    method = make_method(name, model, teacher if needed else None, **numbers)
    method.initialise()
    method.train_mode()
    return method


@pairs
def test_loss_and_gradients_equal_the_paper(name: str, numbers: dict[str, Any]) -> None:
    model, teacher = make_model(0, DOUBLE), make_model(1, DOUBLE).eval()
    method = build(name, model, teacher, **numbers)
    slow_models = {k: copy.deepcopy(m) for k, m in method.trainable().items()}
    batch = make_batch(dtype=DOUBLE)
    adv = (batch.x + 0.05 * torch.sign(torch.sin(50 * batch.x))).clamp(0, 1)

    loss = method.training_loss(batch, images_of(method, batch.x, adv)).loss
    natural = slow_models.get("natural")
    expected = slow_loss(method, slow_models["model"], natural, teacher, batch.x, adv, batch.y)
    check_step(method, loss, slow_models, expected)


@pairs
def test_attack_keeps_to_ball_and_box(name: str, numbers: dict[str, Any]) -> None:
    method = build(name, make_model(0), make_model(1), **numbers)
    batch = make_batch()
    adv = method.attack(batch)
    assert float((adv.x - batch.x).abs().max()) <= method.recipe.eps + 1e-6
    assert float(adv.x.min()) >= 0 and float(adv.x.max()) <= 1
    assert torch.equal(adv.x, method.attack(batch).x)


@pytest.mark.parametrize(("name", "numbers"), [("hat", {}), ("vfd", {"base": "hat"})])
def test_helper_examples_lie_beyond_the_attack(name: str, numbers: dict[str, Any]) -> None:
    batch, teacher = make_batch(32, DOUBLE), make_model(1, DOUBLE).eval()
    with torch.no_grad():  # so that it takes the images for different classes
        teacher.linear.bias -= teacher(batch.x).mean(0)  # type: ignore[union-attr, operator]
    method = build(name, make_model(0, DOUBLE), teacher, reach=3.0, **numbers)
    adv = method.attack(batch)
    assert torch.allclose(adv.helper, batch.x + 3 * (adv.x - batch.x), rtol=0, atol=1e-12)
    assert torch.equal(adv.helper_y, teacher(adv.x).argmax(1))
    for other in (batch.x, adv.helper):
        assert not torch.equal(adv.helper_y, teacher(other).argmax(1))


def test_the_attack_starts_from_a_little_gaussian_noise() -> None:
    method = build("trades", make_model(0), make_model(1))
    batch = make_batch(64)
    noise = (method.start_of(batch) - batch.x)[(batch.x > 0.01) & (batch.x < 0.99)]
    assert float(noise.std()) == pytest.approx(1e-3, rel=0.05)
    assert float((noise / noise.std()).pow(4).mean()) == pytest.approx(3, abs=0.3)
    assert build("mart", make_model(0), make_model(1), random_start=False).start_of(batch) is None


def test_acts_attack_raises_the_robust_models_loss() -> None:
    method = build("act", make_model(0), make_model(1), steps=10)
    assert isinstance(method, Act)
    batch = make_batch(32)

    def objective(x: Tensor) -> Tensor:
        with torch.no_grad():
            method._natural_logits = natural
            return method._attack_objective(copy.deepcopy(method.model).eval()(x), batch.y)

    with torch.no_grad():
        natural = copy.deepcopy(method.natural)(batch.x)
    before = objective(batch.x)
    after = objective(method.attack(batch).x)
    assert (after > before).float().mean() > 0.95


def test_the_two_models_of_act_start_apart() -> None:
    method = build("act", make_model(0), make_model(1))
    first, second = (next(m.parameters()) for m in method.trainable().values())
    assert not torch.equal(first, second)


@pairs
def test_running_statistics_move_as_often_as_stated(name: str, numbers: dict[str, Any]) -> None:
    method = build(name, make_model(0), make_model(1), **numbers)
    tracked = [
        [b for n, b in m.named_buffers() if n.endswith("num_batches_tracked")]
        for m in method.trainable().values()
    ]
    before = [[int(b) for b in buffers] for buffers in tracked]
    for step in range(2):
        take_step(method, make_batch(step=step))
    stated = [method.bn_updates, 1]  # of the model, of the one that learns beside it
    for buffers, counts, updates in zip(tracked, before, stated, strict=False):
        moved = [int(b) - count for b, count in zip(buffers, counts, strict=True)]
        assert moved == [2 * updates] * len(moved)


@pairs
def test_no_pass_is_made_twice(name: str, numbers: dict[str, Any]) -> None:
    """Forward passes of all models, K input gradients of F and 2F for each image that is trained on."""
    model, teacher = Counting(make_model(0)), Counting(make_model(1))
    method = build(name, model, teacher, engine="eager", **numbers)
    take_step(method, make_batch(8))
    learning = [m for m in method.trainable().values() if m is not model]
    forward = sum(m.images for m in (model, teacher, *learning)) / 8
    trained = {"alp": 2, "act": 2}.get(name, method.images_trained + len(learning))
    assert forward + method.recipe.steps + 2 * trained == method.passes(0)


@pytest.mark.parametrize("name", ["trades", "mart", "alp", "hat", "vfd", "act", "lbgat", "fast"])
def test_training_runs_and_resumes(name: str, tmp_path: Any) -> None:
    recipe = small_recipe(name, epochs=2)
    options: dict[str, Any] = {"data": small_data(), "progress": False, "device": "cpu"}
    options["run_dir"] = tmp_path / "run"
    if name in TEACHER_OF:
        options["teacher"] = make_model(1)
    result = train(name, recipe, model=make_model(0), **options)
    assert result.progress.epoch == 2 and result.progress.bad_steps == 0
    again = train(name, recipe, model=make_model(0), resume=True, **options)
    assert again.progress.step == result.progress.step


def test_unknown_base_is_refused() -> None:
    with pytest.raises(ValueError, match="base must be one of alp, trades, mart, hat"):
        find_method("vfd").recipe_class(base="awp")


class ActWithTeacher(Act):
    """ACT that has a frozen model for a purpose of its own."""

    @classmethod
    def teachers_needed(cls, recipe: Recipe) -> tuple[str, ...]:
        return ("teacher",)


def test_a_natural_model_learns_also_beside_a_teacher() -> None:
    runtime, teacher = Runtime(CPU, None, PhaseTimer(CPU)), make_model(1)
    method = ActWithTeacher(small_recipe("act"), make_model(0), runtime, {"teacher": teacher})
    assert method.natural_learns and method.natural is not teacher
    assert list(method.trainable()) == ["model", "natural"]
    for fixed in (False, True):
        lbgat: Any = make_method("lbgat", make_model(0), teacher if fixed else None, fixed=fixed)
        assert list(lbgat.trainable()) == (["model"] if fixed else ["model", "natural"])
        assert (lbgat.natural is teacher) == fixed


def test_the_natural_model_begins_like_a_new_one_of_its_class() -> None:
    model = WideResNet(10, 1, 4, 1, 0.0)
    method = make_method("act", model)
    method.initialise()
    natural: Any = method.trainable()["natural"]
    assert not torch.equal(natural.conv1.weight, model.conv1.weight)
    assert not natural.fc.bias.any()
    for module in natural.block3.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.weight[:, 0].numel()
            assert float(module.weight.detach().std()) == pytest.approx(
                (2 / fan_out) ** 0.5, rel=0.15
            )


def test_the_summed_divergence_of_act_counts_the_images_of_all_processes() -> None:
    logits, y = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), torch.arange(3)
    values = []
    for count in (1, 2):
        runtime = Runtime(CPU, None, PhaseTimer(CPU), Ranks(0, count))
        recipe: Any = small_recipe("act", weight=0.5, attack_divergence="sum")
        method = Act(recipe, make_model(0), runtime)
        method._natural_logits = logits.flip(1)
        values.append(method._attack_objective(logits, y))
    divergence = kl(logits.flip(1), logits)
    assert torch.allclose(values[0], 0.5 * ce(logits, y) + 0.5 * 3 * divergence, rtol=1e-5)
    assert torch.allclose(values[1] - values[0], 0.5 * 3 * divergence, rtol=1e-4)
