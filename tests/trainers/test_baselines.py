"""Free, FAT and KD-AT against plain float64 versions, and what they leave in checkpoints and refuse."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from run_helpers import Interruption, SharedRuns, assert_same_end
from run_helpers import run as resumable_run
from test_awp import SlowSGD, updating
from test_methods import take_step
from test_pair_methods import ce, kl, p_of
from torch import Tensor, nn
from training_helpers import (
    CPU,
    make_batch,
    make_method,
    make_model,
    small_data,
    small_recipe,
    states_equal,
)

import fastadv
from fastadv.cli import main
from fastadv.losses import cross_entropy
from fastadv.models import small_cnn
from fastadv.trainers import (
    FatRecipe,
    FreeRecipe,
    Runtime,
    TrainBatch,
    load_model,
)
from fastadv.trainers.checkpoint import find_checkpoint, load_checkpoint
from fastadv.trainers.kd_at import AttackedWithTeachers, KdAt
from fastadv.trainers.phases import PhaseTimer

pytestmark = pytest.mark.usefixtures("one_thread")
DOUBLE = torch.float64


def test_free_equals_a_plain_loop() -> None:
    model = make_model(0, DOUBLE)
    slow_models = {"model": copy.deepcopy(model).train()}
    method: Any = make_method("free", model, steps=3, eps=0.1, alpha=0.04)
    method.train_mode()
    optimizer, update = SlowSGD(), updating(method)
    delta = torch.zeros(8, 1, 8, 8, dtype=DOUBLE)
    for step in range(2):
        batch = make_batch(dtype=DOUBLE, step=step)
        x = batch.x if step == 0 else batch.x.flip(0)
        x = torch.where(x < 0.1, 0.0, x)  # where a pixel is at its bound delta may be clipped
        method.step(TrainBatch(x, batch.y, batch.ids, 0, step, 5), update)
        for _ in range(3):
            adv = x + delta
            inside = (adv >= 0) & (adv <= 1)
            leaf = adv.clamp(0, 1).requires_grad_()
            loss = ce(slow_models["model"](leaf), batch.y).mean()
            (gradient,) = torch.autograd.grad(loss, leaf, retain_graph=True)
            optimizer.step(slow_models, loss)
            delta = (delta + 0.04 * (gradient * inside).sign()).clamp(-0.1, 0.1)
    assert torch.allclose(method.state()["delta"], delta, rtol=0, atol=1e-12)
    assert float(delta.abs().max()) == pytest.approx(0.1)  # reached only after several replays
    assert not inside.all()
    ours, slow = model.state_dict(), slow_models["model"].state_dict()
    for entry in slow:
        assert torch.allclose(ours[entry], slow[entry], rtol=1e-8, atol=1e-10), entry
    assert int(ours["bn1.num_batches_tracked"]) - 3 == 2 * method.bn_updates == 6


def test_frees_perturbation_stays_when_a_step_is_not_taken() -> None:
    method: Any = make_method("free", make_model(0), steps=3)
    take_step(method, make_batch())
    before, updates = method.state()["delta"].clone(), []
    method.step(make_batch(step=1), lambda result: bool(updates.append(result)))
    assert len(updates) == 1
    assert torch.equal(method.state()["delta"], before)


@pytest.mark.parametrize("stop_after", [2, 4, 5, 7])
def test_a_resumed_run_of_free_ends_bit_for_bit(
    stop_after: int, shared_runs: SharedRuns, tmp_path: Path
) -> None:
    whole = shared_runs.whole("free")
    with pytest.raises(Interruption):
        resumable_run("free", tmp_path / "cut", stop_after)
    resumable_run("free", tmp_path / "cut", resume=True)
    assert_same_end(whole, tmp_path / "cut")
    one, other = (
        load_checkpoint(find_checkpoint(folder)).train_state["method"]["delta"]
        for folder in (whole, tmp_path / "cut")
    )
    assert one.any() and torch.equal(one, other)


def test_free_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="random_start must be false"):
        FreeRecipe(random_start=True)
    with pytest.raises(ValueError, match="awp_gamma must be 0"):
        FreeRecipe(awp_gamma=0.01)
    assert make_method("free", make_model(0)).passes(0) == 9


def slow_friendly_pgd(
    model: nn.Module, start: Tensor, x: Tensor, y: int, numbers: dict[str, Any], tau: int
) -> tuple[Tensor, int]:
    """Algorithm 1 of the paper for one image; returns it and how many steps it took."""
    adv, taken = start, 0
    for _ in range(numbers["steps"]):
        leaf = adv[None].requires_grad_()
        logits = model(leaf)
        wrong = int(logits.argmax()) != y
        if wrong and tau == 0:
            break
        tau -= wrong
        (gradient,) = torch.autograd.grad(-logits.log_softmax(1)[0, y], leaf)
        adv = adv.detach() + numbers["alpha"] * gradient[0].sign()
        adv = adv.clamp(x - numbers["eps"], x + numbers["eps"]).clamp(0, 1)
        taken += 1
    return adv.detach(), taken


def learned_model() -> nn.Module:
    """A model that is right about some of the images and not far from wrong, in float64."""
    model, data = make_model(0), small_data().train
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(6):
        loss = cross_entropy(model(data.images / 255), data.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval().to(DOUBLE)


@pytest.mark.parametrize("tau", [0, 1, 2])
def test_friendly_pgd_equals_a_plain_loop_for_each_image(tau: int) -> None:
    model, data = learned_model(), small_data().train
    x, y = data.images[:40].double() / 255, data.labels[:40]
    numbers: dict[str, Any] = {"eps": 0.2, "alpha": 0.05, "steps": 6}
    attack = fastadv.FriendlyPGD(model, **numbers, tau=tau)
    adv = attack(x, y, seed=7)
    starts = fastadv.ops.random_start(x, 0.2, seed=7)
    counts = set()
    for row in range(len(x)):
        expected, taken = slow_friendly_pgd(model, starts[row], x[row], int(y[row]), numbers, tau)
        assert torch.allclose(adv[row], expected, rtol=0, atol=1e-12), row
        counts.add(taken)
    assert min(counts) == tau and len(counts) >= 4, counts


def test_friendly_pgd_is_pgd_until_something_is_misclassified() -> None:
    model, data = learned_model(), small_data().train
    x, y = data.images[:16].double() / 255, data.labels[:16]
    plain = fastadv.PGD(model, 0.2, 0.05, 4)(x, y, seed=1)
    assert torch.equal(fastadv.FriendlyPGD(model, 0.2, 0.05, 4, tau=4)(x, y, seed=1), plain)
    # A start far away that is misclassified and so is not moved further is still brought into the ball.
    away = fastadv.FriendlyPGD(model, 0.2, 0.05, 1)
    adv = away(x, y, start=1 - x)
    assert float((adv - x).abs().max()) <= 0.2 + 1e-12 and away.last.outside_share == 0
    with pytest.raises(ValueError, match="tau must be >= 0, got -1"):
        fastadv.FriendlyPGD(model, tau=-1)
    with pytest.raises(TypeError, match="tau must be an integer"):
        fastadv.FriendlyPGD(model, tau=0.5)  # type: ignore[arg-type]


def test_fats_tau_grows_with_the_epochs() -> None:
    assert [FatRecipe().tau_at(e) for e in (0, 49, 50, 89, 90, 119)] == [0, 0, 1, 1, 2, 2]
    with pytest.raises(ValueError, match="tau_epochs must be ascending"):
        FatRecipe(tau_epochs=(90, 50))
    model = learned_model().float()
    method: Any = make_method("fat", model, tau_epochs=(1, 2), steps=6)
    for epoch in range(3):
        batch = make_batch(32, epoch=epoch)
        attack = fastadv.FriendlyPGD(model, 0.1, 0.05, 6, tau=epoch, precision="fp32")
        expected = attack(batch.x, batch.y, seed=batch.seed("attack"), sample_ids=batch.ids)
        assert torch.equal(method.attack(batch).x, expected)


def make_kd_at(model: nn.Module, teachers: dict[str, nn.Module], **numbers: Any) -> KdAt:
    runtime = Runtime(CPU, None, PhaseTimer(CPU))
    recipe: Any = small_recipe("kd_at", **numbers)
    return KdAt(recipe, model, runtime, teachers)


@pytest.mark.parametrize("numbers", [{}, {"temperature": 4.0, "robust_weight": 0.2}])
def test_kd_at_equals_its_formula(numbers: dict[str, float]) -> None:
    weights = {"temperature": 2.0, "robust_weight": 0.6} | numbers
    t, model = weights["temperature"], make_model(0, DOUBLE)
    teachers = {"teacher": make_model(1, DOUBLE), "robust_teacher": make_model(2, DOUBLE)}
    method = make_kd_at(model, dict(teachers), **numbers)
    method.train_mode()
    shares = torch.linspace(0.5, 1.5, 8, dtype=DOUBLE)
    slow, batch = copy.deepcopy(model), replace(make_batch(dtype=DOUBLE), weights=shares)
    adv = method.attack(batch)
    assert isinstance(adv, AttackedWithTeachers)
    loss = method.training_loss(batch, adv).loss
    z = slow(adv.x)
    expected = 0.3 * (shares * ce(z, batch.y)).mean()
    entropies = torch.zeros(())
    for key, weight in (("teacher", 0.1), ("robust_teacher", weights["robust_weight"])):
        with torch.no_grad():
            soft = p_of(teachers[key](adv.x) / t)
        # The authors' form, T^2 times the cross-entropy, and by how much it is larger.
        crossed = -t * t * (soft * p_of(z / t).log()).sum(1)
        expected = expected + weight * (shares * crossed).mean()
        entropies = entropies - weight * t * t * (shares * (soft * soft.log()).sum(1)).mean()
        assert kl(soft.log(), z / t).mean() > 1e-3
    loss.backward()
    expected.backward()
    assert torch.allclose(loss, expected - entropies, rtol=1e-11)
    for ours, plain in zip(model.parameters(), slow.parameters(), strict=True):
        assert torch.allclose(ours.grad, plain.grad, rtol=1e-8, atol=1e-12)
    assert method.passes(0) == 2 * 3 + 3 + 2


def test_both_teachers_come_from_the_command_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for seed, key in enumerate(("teacher", "robust_teacher")):
        torch.save(make_digits_model(seed).state_dict(), tmp_path / f"{key}.pt")
    words = ["--data", "digits", "--epochs", "1", "--steps", "1", "--batch-size", "640"]
    words += ["--quiet", "--device", "cpu", "--run", str(tmp_path / "run")]
    teacher = ["--teacher", str(tmp_path / "teacher.pt")]
    assert main(["train", "kd_at", *words, *teacher]) == 2
    assert "kd_at needs a robust_teacher" in capfd.readouterr().err
    both = [*teacher, str(tmp_path / "robust_teacher.pt")]
    assert main(["train", "pgd_at", *words, *both]) == 2
    assert "takes no frozen model, got teacher" in capfd.readouterr().err
    assert main(["train", "kd_at", *words, *both]) == 0
    from safetensors.torch import load_file

    for seed, key in enumerate(("teacher", "robust_teacher")):
        kept = load_file(tmp_path / "run" / f"{key}.safetensors")
        assert states_equal(kept, make_digits_model(seed).state_dict())
    assert isinstance(load_model(tmp_path / "run"), nn.Module)


def make_digits_model(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return small_cnn(10, 1)
