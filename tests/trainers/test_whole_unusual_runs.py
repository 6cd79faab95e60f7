"""Whole runs of Free, AFS and LAS-AT in float64 end with the weights of loops that follow the authors' scripts."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_distributed import wide_model
from test_las_at import slow_attack
from test_pair_methods import ce
from test_whole_runs import Recording
from torch import Tensor, nn
from training_helpers import small_data, small_recipe

from fastadv.models import Stack
from fastadv.ops.philox import philox
from fastadv.trainers import TrainBatch, train
from fastadv.trainers.las_at import LasAt

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


class Run:
    """A finished run, and what a loop needs to repeat it."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        folder: Path,
        name: str,
        model: nn.Module,
        **numbers: Any,
    ) -> None:
        recording = Recording(monkeypatch)
        self.recipe: Any = small_recipe(name, epochs=3, **numbers)
        options: dict[str, Any] = {"run_dir": folder / "run", "progress": False, "device": "cpu"}
        if name == "afs":
            options["teacher"] = [copy.deepcopy(one) for one in model.extractors]  # type: ignore[union-attr]
        self.trained = train(name, self.recipe, data=small_data(), model=model, **options).model
        self.model = recording.models["model"].train()
        self.batches, self.method = recording.batches, recording.method

    def steps(self) -> Iterator[tuple[TrainBatch, torch.optim.SGD]]:
        """The batches, with an optimiser whose rate is the rate of their step."""
        recipe = self.recipe
        trained = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(
            trained, recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay
        )
        per_epoch = len(self.batches) // recipe.epochs
        for step, batch in enumerate(self.batches):
            factor = recipe.schedule.factor(step / per_epoch, recipe.epochs)
            optimizer.param_groups[0]["lr"] = recipe.lr * factor
            yield batch, optimizer

    def check(self) -> None:
        wanted = self.model.state_dict()
        for key, value in self.trained.state_dict().items():
            if value.is_floating_point():
                assert torch.allclose(value, wanted[key], rtol=1e-9, atol=1e-11), key


def update(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def test_free_ends_as_a_plain_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch, tmp_path, "free", wide_model(0), steps=4, alpha=0.1)
    noise = torch.zeros_like(run.batches[0].x)
    for batch, optimizer in run.steps():
        for _ in range(4):
            leaf = noise.clone().requires_grad_()
            update(optimizer, ce(run.model((batch.x + leaf).clamp(0, 1)), batch.y).mean())
            assert leaf.grad is not None
            noise = (noise + 0.1 * leaf.grad.sign()).clamp(-0.1, 0.1)
    run.check()
    assert torch.allclose(run.method.state()["delta"], noise, rtol=0, atol=1e-12)


@pytest.mark.parametrize("weight", [0.25, 0.5])
def test_the_official_afs_ends_as_a_plain_loop(
    weight: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(9)
    stack = Stack([wide_model(i) for i in range(3)], 4).double()
    numbers = {"mix": "batch", "noise": "triangular", "weight": weight}
    run = Run(monkeypatch, tmp_path, "afs", stack, **numbers)
    recipe, model = run.recipe, run.model
    model.extractors.eval()  # type: ignore[union-attr,operator]
    for batch, optimizer in run.steps():
        attacked = run.method._attacked_places(len(batch.y))
        delta = (run.method.start_of(batch) - batch.x)[attacked]
        for _ in range(recipe.steps):
            leaf = (batch.x[attacked] + delta).requires_grad_()
            loss = ce(model(leaf), batch.y[attacked]).mean()
            (gradient,) = torch.autograd.grad(loss, leaf)
            delta = (delta + recipe.alpha * gradient.sign()).clamp(-recipe.eps, recipe.eps)
        x = batch.x.clone()
        x[attacked] = (x[attacked] + delta).clamp(0, 1)
        update(optimizer, ce(model(x), batch.y).mean())
    run.check()


def drawn(logits: list[Tensor], seed: int, ids: Tensor) -> list[Tensor]:
    """Choices by the inverse of the cumulative probabilities, at the run's uniform numbers."""
    words = philox(seed, ids, 1).double() / 2**32
    return [
        (part.softmax(1).cumsum(1) <= words[:, [place]]).sum(1).clamp_max(part.shape[1] - 1)
        for place, part in enumerate(logits)
    ]


def test_las_at_ends_as_a_plain_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    strategies: list[nn.Module] = []
    setup = LasAt.setup

    def in_double(method: Any) -> None:
        setup(method)
        strategies.append(copy.deepcopy(method.strategy.double()))

    monkeypatch.setattr(LasAt, "setup", in_double)
    # Without the robust accuracy of a copy, which test_las_at.py compares: its attack is another one there.
    run = Run(monkeypatch, tmp_path, "las_at", wide_model(0), robust_weight=0.0)
    recipe, model, (strategy,) = run.recipe, run.model, strategies
    walker = torch.optim.SGD(strategy.parameters(), recipe.strategy_lr)

    def targets_loss(logits: Tensor, y: Tensor) -> Tensor:
        own = 1 - recipe.label_smoothing * 3 / 4
        targets = torch.full_like(logits, (1 - own) / 3).scatter(1, y[:, None], own)
        return -(targets * logits.log_softmax(1)).sum(1).mean()

    def attacked(batch: TrainBatch, chosen: list[Tensor]) -> Tensor:
        radii, sizes, steps = (
            torch.tensor(values)[rows] for values, rows in zip(recipe.choices, chosen, strict=True)
        )
        plan = (radii.double() / 255, sizes.double() / 255, steps)
        return slow_attack(model.eval(), batch, run.method.start_of(batch), plan)

    for step, (batch, optimizer) in enumerate(run.steps()):
        if (step + 1) % recipe.strategy_every == 0:
            logits = strategy.train()(batch.x)
            chosen = drawn(logits, batch.seed("exploration"), batch.ids)
            adv = attacked(batch, chosen)
            hard = float(ce(model(adv), batch.y).mean().detach())
            probe = copy.deepcopy(model).train()
            rate = recipe.lr_at(batch.epoch)
            decayed = torch.optim.SGD(probe.parameters(), rate, weight_decay=recipe.weight_decay)
            update(decayed, targets_loss(probe(adv), batch.y))
            clean = float((probe.eval()(batch.x).argmax(1) == batch.y).double().mean())
            reward = min(hard, 10) + recipe.clean_weight * clean
            scores = [
                part.log_softmax(1).gather(1, rows[:, None]).mean()
                for part, rows in zip(logits, chosen, strict=True)
            ]
            walker.zero_grad()
            (-reward * torch.stack(scores).sum()).backward()
            nn.utils.clip_grad_norm_(strategy.parameters(), 1.0)
            walker.step()
        with torch.no_grad():
            chosen = drawn(strategy.eval()(batch.x), batch.seed("strategy"), batch.ids)
        adv = attacked(batch, chosen)
        update(optimizer, targets_loss(model.train()(adv), batch.y))
    run.check()
    ours = run.method.strategy.state_dict()
    for key, value in strategy.state_dict().items():
        assert torch.allclose(ours[key], value, rtol=1e-6, atol=1e-8), key
