"""LAS-AT: attacks, draws, reward and step of REINFORCE against plain float64 versions; its checkpoints."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from run_helpers import Interruption, SharedRuns, assert_same_end
from run_helpers import run as resumable_run
from test_awp import updating
from test_pair_methods import ce
from torch import Tensor, nn
from training_helpers import make_batch, make_method, make_model, small_recipe, states_equal

from fastadv import PGD
from fastadv.attacks.strategic import StrategicPGD
from fastadv.ops.philox import philox
from fastadv.ranks import Ranks
from fastadv.trainers import TrainBatch
from fastadv.trainers.checkpoint import find_checkpoint, load_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")
DOUBLE = torch.float64


def slow_attack(
    model: nn.Module, batch: TrainBatch, start: Tensor, strategy: tuple[Tensor, Tensor, Tensor]
) -> Tensor:
    """Image by image."""
    images = []
    for i, (eps, alpha, steps) in enumerate(zip(*(s.tolist() for s in strategy), strict=True)):
        x = batch.x[i : i + 1]
        adv = start[i : i + 1].clamp(x - eps, x + eps)
        for _ in range(steps):
            leaf = adv.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(ce(model(leaf), batch.y[i : i + 1]).sum(), leaf)
            adv = torch.min(torch.max(adv + alpha * gradient.sign(), x - eps), x + eps).clamp(0, 1)
        images.append(adv)
    return torch.cat(images)


def strategy_of(batch: TrainBatch) -> tuple[Tensor, Tensor, Tensor]:
    spread = torch.arange(len(batch.y))
    return 0.02 + 0.02 * spread.to(batch.x), 0.01 + 0.005 * spread.to(batch.x), 1 + spread % 4


def test_each_image_is_attacked_by_its_own_strategy() -> None:
    model, batch = make_model(0, DOUBLE).eval(), make_batch(dtype=DOUBLE)
    attack = StrategicPGD(model, 0.1, 0.05, 3, precision="fp32")
    strategy = strategy_of(batch)
    start = (batch.x + 0.06 * torch.sin(90 * batch.x)).clamp(0, 1)
    attack.strategy = strategy
    for _ in range(2):  # a call leaves the strategy as it was
        found = attack(batch.x, batch.y, start=start)
        wanted = slow_attack(model, batch, start, strategy)
        assert torch.allclose(found, wanted, rtol=0, atol=1e-12)
    attack.strategy = None
    plain = PGD(model, 0.1, 0.05, 3, precision="fp32")
    assert torch.equal(attack(batch.x, batch.y, seed=1), plain(batch.x, batch.y, seed=1))


def las_at(**changes: Any) -> Any:
    method: Any = make_method("las_at", make_model(0, DOUBLE), **changes)
    method.train_mode()
    return method


def test_draws_follow_the_probabilities_and_the_images_ids() -> None:
    method = las_at()
    logits = [torch.tensor([[0.0, 1.0, -1.0]]).expand(4000, 3), torch.zeros(4000, 2)]
    batch = replace(make_batch(), ids=torch.arange(4000))
    first, second = method._drawn(logits, batch, "strategy")
    shares = torch.bincount(first, minlength=3) / 4000
    assert torch.allclose(shares, logits[0][0].softmax(0), atol=0.03)
    assert float(second.double().mean()) == pytest.approx(0.5, abs=0.03)
    order = torch.randperm(4000, generator=torch.Generator().manual_seed(0))
    again = method._drawn(logits, replace(batch, ids=batch.ids[order]), "strategy")
    assert torch.equal(again[0], first[order])
    assert not torch.equal(method._drawn(logits, batch, "exploration")[0], first)


def slow_reward(method: Any, model: nn.Module, batch: TrainBatch, adv: Tensor) -> float:
    recipe = method.recipe
    hard = float(ce(copy.deepcopy(model).eval()(adv), batch.y).mean().detach())
    trained = copy.deepcopy(model).train()
    logits = trained(adv)
    log_p = logits - logits.exp().sum(1, keepdim=True).log()
    smooth = recipe.label_smoothing
    targets = torch.full_like(logits, smooth / 4)
    targets[torch.arange(len(batch.y)), batch.y] += 1 - smooth
    (-(targets * log_p).sum(1).mean()).backward()
    for p in trained.parameters():
        assert p.grad is not None
        p.data = p.data - recipe.lr * (p.grad + recipe.weight_decay * p.data)
    trained.eval()
    options: Any = {"restarts": 2, "keep": "best", "precision": "fp32"}
    attack = PGD(trained, recipe.eps, recipe.alpha, recipe.steps, **options)
    worst = attack(batch.x, batch.y, seed=batch.seed("reward"), sample_ids=batch.ids)
    robust, clean = (
        float((trained(x).argmax(1) == batch.y).double().mean()) for x in (worst, batch.x)
    )
    return min(hard, 10) + recipe.robust_weight * robust + recipe.clean_weight * clean


def test_the_strategy_network_takes_a_plain_step_of_reinforce() -> None:
    method, batch = las_at(strategy_lr=0.3), make_batch(dtype=DOUBLE, step=1)
    recipe, strategy = method.recipe, copy.deepcopy(method.strategy).train()
    untouched = copy.deepcopy(method.model.state_dict())
    logits = strategy(batch.x)
    words = philox(batch.seed("exploration"), batch.ids, 1).double() / 2**32
    score, chosen = torch.zeros(len(batch.y), dtype=DOUBLE), []
    for place, part in enumerate(logits):
        p = part.exp() / part.exp().sum(1, keepdim=True)
        rows = [
            next(
                k
                for k in range(p.shape[1])
                if float(p[i, : k + 1].sum().detach()) > words[i, place]
            )
            for i in range(len(p))
        ]
        chosen.append(rows)
        score = score + p[torch.arange(len(p)), rows].log()
    radii, sizes, steps = (
        torch.tensor([values[k] for k in rows])
        for values, rows in zip(recipe.choices, chosen, strict=True)
    )
    plan = (radii.double() / 255, sizes.double() / 255, steps)
    adv = slow_attack(copy.deepcopy(method.model).eval(), batch, method.start_of(batch), plan)
    reward = slow_reward(method, method.model, batch, adv)
    (-reward * score.mean()).backward()
    found = {k: p for k, p in strategy.named_parameters() if p.grad is not None}
    norm = float(torch.stack([p.grad.square().sum() for p in found.values()]).sum().sqrt())  # type: ignore[union-attr]
    for p in found.values():
        assert p.grad is not None
        p.data = p.data - 0.3 * min(1.0, 1 / (norm + 1e-6)) * p.grad
    method.train_strategy(batch)
    ours = method.strategy.state_dict()
    for name, value in strategy.state_dict().items():
        assert torch.allclose(ours[name], value, rtol=1e-7, atol=1e-10), name
    assert not torch.equal(ours["heads.0.weight"], las_at().strategy.heads[0].weight)
    assert states_equal(method.model.state_dict(), untouched)


def test_the_strategy_network_moves_in_its_own_steps_alone() -> None:
    method = las_at(strategy_every=2)
    update, seen = updating(method), []
    for step in range(4):
        method.step(make_batch(dtype=DOUBLE, step=step), update)
        seen.append(method.strategy.heads[0].weight.detach().clone())
    assert torch.equal(seen[1], seen[2])
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[2], seen[3])


def test_awp_goes_around_the_models_step() -> None:
    plain, perturbed = las_at(), las_at(awp_gamma=0.3)
    for method in (plain, perturbed):
        update = updating(method)
        for step in range(2):
            method.step(make_batch(dtype=DOUBLE, step=step), update)
    ours, other = (m.model.state_dict() for m in (plain, perturbed))
    assert not torch.allclose(ours["conv1.weight"], other["conv1.weight"])
    assert perturbed.passes(0) == plain.passes(0) + 3


def test_a_gradient_that_is_not_finite_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    method = las_at()
    before = {k: p.detach().clone() for k, p in method.strategy.named_parameters()}
    monkeypatch.setattr(method, "reward", lambda batch, adv: torch.tensor(float("nan")))
    method.train_strategy(make_batch(dtype=DOUBLE, step=1))
    assert states_equal(dict(method.strategy.named_parameters()), before)


def test_the_reward_is_the_mean_over_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    method, batch = las_at(), make_batch(dtype=DOUBLE)
    alone = method.reward(batch, batch.x)
    summed: list[int] = []

    def all_reduce(values: Tensor) -> None:
        summed.append(values.numel())
        values.mul_(2)  # the other process has the same

    monkeypatch.setattr("torch.distributed.all_reduce", all_reduce)
    monkeypatch.setattr("torch.distributed.broadcast", lambda values, source: None)
    method.runtime = replace(method.runtime, ranks=Ranks(0, 2))
    assert float(method.reward(batch, batch.x)) == pytest.approx(float(alone), rel=1e-9)
    assert summed[-1] == 3 and len(summed) == 2  # the copy's gradients, then the reward


def test_without_noise_the_attacks_start_from_the_images() -> None:
    method, batch = las_at(random_start=False), make_batch(dtype=DOUBLE)
    assert torch.equal(method.start_of(batch), batch.x)
    assert 0 < float(method.reward(batch, batch.x)) < 16


@pytest.mark.slow
@pytest.mark.parametrize("stop_after", [2, 3, 5])
def test_a_resumed_run_ends_bit_for_bit(
    stop_after: int, shared_runs: SharedRuns, tmp_path: Path
) -> None:
    whole = shared_runs.whole("las_at")
    with pytest.raises(Interruption):
        resumable_run("las_at", tmp_path / "cut", stop_after)
    resumable_run("las_at", tmp_path / "cut", resume=True)
    assert_same_end(whole, tmp_path / "cut")
    one, other = (
        {
            name: value
            for name, value in load_checkpoint(find_checkpoint(folder)).weights.items()
            if "heads" in name
        }
        for folder in (whole, tmp_path / "cut")
    )
    assert len(one) == 6 and states_equal(one, other)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"steps_choices": ()}, "steps_choices must be at least one number, each >= 1"),
        ({"eps_choices": (0, 3)}, "eps_choices must be at least one number, each >= 1"),
        ({"eps_choices": (300,)}, "eps_choices must be <= 255"),
        ({"strategy_every": 0}, "strategy_every must be >= 1"),
        ({"alpha_choices": (2, 256)}, "alpha_choices must be <= 255, in 255ths"),
        ({"strategy": "os:system"}, "strategy must be the name of a model"),
    ],
)
def test_numbers_out_of_range_are_refused(numbers: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_recipe("las_at", **numbers)


def test_the_strategy_networks_first_weights_follow_the_recipes_seed_alone() -> None:
    def drawn(outside: int, seed: int) -> dict[str, Tensor]:
        torch.manual_seed(outside)
        return dict(las_at(seed=seed).strategy.state_dict())

    assert states_equal(drawn(1, 3), drawn(2, 3))
    assert not states_equal(drawn(1, 3), drawn(1, 4))
