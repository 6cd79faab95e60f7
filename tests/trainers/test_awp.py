"""Adversarial weight perturbation against a plain float64 loop, and what it does when something goes wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_helpers import Interruption, assert_same_end
from run_helpers import run as resumable_run
from test_methods import Counting, take_step
from test_methods import slow_loss as slow_single_loss
from test_pair_methods import TEACHER_OF, images_of
from test_pair_methods import slow_loss as slow_pair_loss
from torch import Tensor, nn
from training_helpers import (
    CPU,
    copied_state,
    make_batch,
    make_method,
    make_model,
    small_data,
    small_recipe,
    states_equal,
)

from fastadv.losses import cross_entropy
from fastadv.ranks import Ranks
from fastadv.trainers import (
    AdversarialRecipe,
    Attacked,
    LossResult,
    NonFiniteLossError,
    Runtime,
    TrainBatch,
    TrainResult,
    find_method,
    method_names,
    train,
)
from fastadv.trainers.arrest import Replayed
from fastadv.trainers.awp import WeightPerturbation
from fastadv.trainers.checkpoint import load_checkpoint
from fastadv.trainers.pgd_at import PGDAT
from fastadv.trainers.phases import PhaseTimer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
DOUBLE = torch.float64
Models = dict[str, Any]
SGD: dict[str, float] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05}
# Methods with AWP; free refuses it, standard has no attack.
PERTURBABLE = [
    name
    for name in method_names()
    if issubclass(find_method(name).recipe_class, AdversarialRecipe)
    and name
    # free refuses it. The others, whose passes are of another kind, are in their own tests.
    not in ("free", "afs", "las_at", "grad_align")
]


def signed(x: Tensor) -> Tensor:
    """Images near others, as an attack may find them."""
    return (x + 0.05 * torch.sign(torch.sin(50 * x))).clamp(0, 1)


def updating(method: Any) -> Callable[[LossResult], bool]:
    """What the loop gives to `step`: one optimiser per model."""
    optimizers = [torch.optim.SGD(m.parameters(), **SGD) for m in method.trainable().values()]

    def update(result: LossResult) -> bool:
        for optimizer in optimizers:
            optimizer.zero_grad()
        result.loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        return True

    return update


class SlowSGD:
    """SGD written out."""

    def __init__(self) -> None:
        self.momenta: dict[str, Tensor] = {}

    def step(self, models: Models, loss: Tensor) -> None:
        for key, model in models.items():
            named = dict(model.named_parameters())
            found = torch.autograd.grad(loss, list(named.values()), retain_graph=True)
            for (name, weight), gradient in zip(named.items(), found, strict=True):
                place = f"{key} {name}"
                gradient = gradient + SGD["weight_decay"] * weight.detach()
                moved = (
                    SGD["momentum"] * self.momenta.get(place, torch.zeros_like(weight)) + gradient
                )
                self.momenta[place] = moved
                weight.data = weight.data - SGD["lr"] * moved


def slow_awp_step(
    models: Models, loss_of: Callable[[Models], Tensor], gamma: float, optimizer: SlowSGD
) -> None:
    """One step at the perturbed weights, tensor by tensor, on a copy for the first gradient."""
    probe = copy.deepcopy(models)
    loss_of(probe).backward()
    moves = {
        name: gamma * p.detach().square().sum().sqrt() * p.grad / p.grad.square().sum().sqrt()
        for name, p in probe["model"].named_parameters()
        if p.dim() > 1
    }
    weights = dict(models["model"].named_parameters())
    for name, move in moves.items():
        weights[name].data = weights[name].data + move
    optimizer.step(models, loss_of(models))
    for name, move in moves.items():
        weights[name].data = weights[name].data - move


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("pgd_at", {}),
        ("trades", {}),
        ("mart", {}),
        ("hat", {}),
        ("vfd", {}),
        ("arrest", {"finetune": False}),
        ("act", {}),
        ("lbgat", {"beta": 6.0}),
    ],
)
def test_two_steps_with_awp_equal_a_plain_loop(name: str, numbers: dict[str, Any]) -> None:
    teacher = make_model(1, DOUBLE).eval()
    needs = name in TEACHER_OF or name == "arrest"
    method = make_method(
        name, make_model(0, DOUBLE), teacher if needs else None, awp_gamma=0.3, **numbers
    )
    method.initialise()
    method.train_mode()
    slow_models: Models = copy.deepcopy(method.trainable())
    optimizer, update = SlowSGD(), updating(method)
    for step in range(2):
        batch = make_batch(dtype=DOUBLE, step=step)
        x, y, adv = batch.x, batch.y, signed(batch.x)
        with torch.no_grad():
            features = teacher.forward_features(x)  # type: ignore[operator]

        def attack(batch: TrainBatch, adv: Tensor = adv, features: Tensor = features) -> Attacked:
            return Replayed(adv, features) if name == "arrest" else images_of(method, batch.x, adv)

        def loss_of(
            models: Models, x: Tensor = x, y: Tensor = y, adv: Tensor = adv, v: Tensor = features
        ) -> Tensor:
            if name in ("pgd_at", "arrest"):
                return slow_single_loss(name, models["model"], adv, y, v, v, {})
            return slow_pair_loss(
                method, models["model"], models.get("natural"), teacher, x, adv, y
            )

        method.attack = attack  # type: ignore[method-assign]
        method.step(batch, update)
        slow_awp_step(slow_models, loss_of, 0.3, optimizer)
    for key, model in method.trainable().items():
        ours, slow = model.state_dict(), slow_models[key].state_dict()
        for entry in slow:
            assert torch.allclose(ours[entry], slow[entry], rtol=1e-8, atol=1e-10), (key, entry)


def make_perturbation(gamma: float = 0.5) -> tuple[nn.Module, WeightPerturbation]:
    model = make_model(0).train()
    return model, WeightPerturbation([model], gamma, Ranks())


def test_a_perturbation_has_the_size_it_should_and_changes_nothing_by_itself() -> None:
    model, perturbation = make_perturbation()
    before, batch = copied_state(model), make_batch()
    moves = perturbation.moves(lambda: LossResult(cross_entropy(model(batch.x), batch.y)))
    assert states_equal(model.state_dict(), before)
    assert all(p.grad is None for p in model.parameters())
    weights = [p for p in model.parameters() if p.dim() > 1]
    for weight, move in zip(weights, moves, strict=True):
        assert float(move.norm() / weight.detach().norm()) == pytest.approx(0.5, rel=1e-5)


def test_processes_that_train_together_perturb_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    model, perturbation = make_perturbation()
    model.eval()  # so that the gradient of a batch is the mean of those of its halves
    batch = make_batch()

    def loss(rows: slice) -> LossResult:
        return LossResult(cross_entropy(model(batch.x[rows]), batch.y[rows]))

    expected = perturbation.moves(lambda: loss(slice(8)))
    weights = [p for p in model.parameters() if p.dim() > 1]
    other = torch.autograd.grad(loss(slice(4, 8)).loss, weights)

    def all_reduce(packed: Tensor) -> None:
        packed += torch.cat([gradient.flatten() for gradient in other])

    monkeypatch.setattr("torch.distributed.all_reduce", all_reduce)
    first_of_two = WeightPerturbation([model], 0.5, Ranks(0, 2))
    moves = first_of_two.moves(lambda: loss(slice(4)))
    for move, wanted in zip(moves, expected, strict=True):
        assert torch.allclose(move, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("how", ["refused", "raised"])
def test_weights_come_back_bit_for_bit_without_a_step(how: str) -> None:
    model, perturbation = make_perturbation()
    before, batch = copied_state(model), make_batch()
    seen: list[bool] = []

    def loss() -> LossResult:
        return LossResult(cross_entropy(model.eval()(batch.x), batch.y))

    def update(result: LossResult) -> bool:
        seen.append(states_equal(model.state_dict(), before))
        if how == "raised":
            raise KeyboardInterrupt
        return False

    moves = perturbation.moves(loss)
    if how == "raised":
        with pytest.raises(KeyboardInterrupt):
            perturbation.step(moves, loss, update)
    else:
        assert perturbation.step(moves, loss, update) is False
    assert seen == [False]
    assert states_equal(model.state_dict(), before)


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), 0.0])
def test_a_gradient_that_is_zero_or_not_finite_perturbs_nothing(factor: float) -> None:
    model, perturbation = make_perturbation()
    before, batch = copied_state(model), make_batch()
    moves = perturbation.moves(lambda: LossResult(factor * model(batch.x).square().sum()))
    assert all(not move.any() for move in moves)
    assert states_equal(model.state_dict(), before)


def test_a_model_without_weights_to_perturb_is_refused() -> None:
    model = make_model(0)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.dim() == 1)
    with pytest.raises(ValueError, match="awp_gamma must be 0 for SmallCNN"):
        WeightPerturbation([model], 0.1, Ranks())


def test_buffers_come_back_when_the_first_pass_fails() -> None:
    model, perturbation = make_perturbation()
    before, batch = copied_state(model), make_batch()

    def loss() -> LossResult:
        model(batch.x)
        raise ArithmeticError("midway")

    with pytest.raises(ArithmeticError, match="midway"):
        perturbation.moves(loss)
    assert states_equal(model.state_dict(), before)


class FailingAt(PGDAT[AdversarialRecipe]):
    """PGD-AT whose second pass of AWP has a loss that is not finite, in every other step."""

    def setup(self) -> None:
        super().setup()
        self.calls = 0

    def training_loss(self, batch: TrainBatch, adv: Attacked) -> LossResult:
        self.calls += 1
        result = super().training_loss(batch, adv)
        return LossResult(result.loss * float("nan")) if self.calls % 4 == 0 else result


def failing_run(
    model: nn.Module, tmp_path: Path, states: list[dict[str, Tensor]], **changes: Any
) -> TrainResult:
    """A run of `FailingAt` for one epoch; ``states`` gets the weights after each step."""
    return train(
        FailingAt,
        small_recipe("pgd_at", awp_gamma=0.1, epochs=1, **changes),
        data=small_data(),
        model=model,
        run_dir=tmp_path,
        progress=False,
        device="cpu",
        on_step=lambda _: states.append(copied_state(model)),
    )


def test_a_run_with_awp_keeps_its_weights_where_no_step_is_taken(tmp_path: Path) -> None:
    model, states = make_model(0), []
    first = copied_state(model)
    result = failing_run(model, tmp_path, states)
    assert result.progress.bad_steps == 2 and len(states) == 4
    same = [states_equal(a, b) for a, b in zip([first, *states], states, strict=False)]
    assert same == [False, True, False, True]


def test_the_weights_saved_with_a_failed_batch_are_not_perturbed(tmp_path: Path) -> None:
    states: list[dict[str, Tensor]] = []
    with pytest.raises(NonFiniteLossError, match="the last batch and the weights before it"):
        failing_run(make_model(0), tmp_path, states, max_bad_steps=1)
    (file,) = tmp_path.glob("nonfinite_step_*.pt")
    assert states_equal(torch.load(file, weights_only=True)["weights"]["model"], states[-1])


def test_averages_and_checkpoints_hold_weights_that_are_not_perturbed(tmp_path: Path) -> None:
    model = make_model(0)
    expected, count = copied_state(model), 0

    def follow(progress: Any) -> None:
        nonlocal count
        count += 1
        decay = min(0.8, (1 + count) / (10 + count))
        for name, value in model.state_dict().items():
            kept = decay if value.is_floating_point() else 0
            expected[name] = kept * expected[name] + (1 - kept) * value

    result = train(
        "pgd_at",
        small_recipe("pgd_at", awp_gamma=0.5, ema_decay=0.8),
        data=small_data(),
        model=model,
        run_dir=tmp_path,
        progress=False,
        device="cpu",
        on_step=follow,
    )
    for name, value in result.model.state_dict().items():
        assert torch.allclose(value.double(), expected[name].double(), rtol=1e-4, atol=1e-6)
    saved = load_checkpoint(result.checkpoint).weights
    assert all(torch.equal(saved[name], value) for name, value in model.state_dict().items())


def test_awp_waits_for_its_warm_up() -> None:
    for epoch, same in ((1, True), (2, False)):
        ends = []
        for gamma in (0.0, 0.2):
            method = make_method("pgd_at", make_model(0), awp_gamma=gamma, awp_warmup=2)
            take_step(method, make_batch(epoch=epoch))
            ends.append(copied_state(method.model))
        assert states_equal(*ends) == same
        assert method.passes(epoch) == (9 if same else 12)


@pytest.mark.parametrize("name", PERTURBABLE)
def test_awp_costs_what_is_stated_and_moves_statistics_once(name: str) -> None:
    model = Counting(make_model(0))
    teachers = {
        key: Counting(make_model(1))
        for key in find_method(name).teachers_needed(find_method(name).recipe_class())
    }
    recipe = small_recipe(name, awp_gamma=0.01, engine="eager", epochs=20)
    method: Any = find_method(name)(recipe, model, Runtime(CPU, None, PhaseTimer(CPU)), teachers)
    tracked = [b for n, b in model.named_buffers() if n.endswith("num_batches_tracked")]
    before = [int(b) for b in tracked]
    epoch = 10  # after ARREST's replay
    take_step(method, make_batch(8, epoch=epoch))
    assert [int(b) - n for b, n in zip(tracked, before, strict=True)] == [method.bn_updates] * 3
    learning = [m for m in method.trainable().values() if m is not model]
    forward = sum(m.images for m in (model, *teachers.values(), *learning)) / 8
    backward = 2 * (2 * method.images_trained + len(learning))
    assert forward + method.recipe.steps + backward == method.passes(epoch)


@pytest.mark.parametrize("name", PERTURBABLE)
def test_every_method_with_an_attack_trains_with_awp(name: str, tmp_path: Path) -> None:
    changes = {"awp_gamma": 0.01, "epochs": 1}
    recipe = small_recipe(name, **changes)
    needed = find_method(name).teachers_needed(recipe)
    result = train(
        name,
        recipe,
        data=small_data(40),
        model=make_model(0),
        run_dir=tmp_path,
        teacher={key: make_model(i) for i, key in enumerate(needed, 1)},
        progress=False,
        device="cpu",
    )
    assert result.progress.step == 2 and result.progress.bad_steps == 0


def test_a_resumed_run_with_awp_ends_bit_for_bit_where_it_would_have(tmp_path: Path) -> None:
    changes = {"awp_gamma": 0.05, "awp_warmup": 1}
    resumable_run("pgd_at", tmp_path / "whole", changes=changes)
    with pytest.raises(Interruption):
        resumable_run("pgd_at", tmp_path / "cut", 7, changes=changes)
    resumable_run("pgd_at", tmp_path / "cut", resume=True, changes=changes)
    assert_same_end(tmp_path / "whole", tmp_path / "cut")
