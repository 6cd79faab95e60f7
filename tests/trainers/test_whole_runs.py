"""Whole runs in float64 end with the weights of a plain loop over the same batches, with the same noise."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_distributed import wide_model
from test_loss_curves import TEACHER_OF, plain_objective, plain_pgd
from test_pair_methods import ce, slow_loss
from torch import Tensor, nn
from training_helpers import small_data, small_recipe

from fastadv.data import Batch, Loader
from fastadv.ops import random_start
from fastadv.trainers import TrainBatch, train
from fastadv.trainers.iteration import Iteration
from fastadv.trainers.loop import Loop

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
PLAIN_SGD: dict[str, Any] = {"nesterov": True, "norm_decay": False, "warmup": 1.0}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("pgd_at", {"swa_start": 1, "epochs": 3}),
    ("pgd_at", {"awp_gamma": 0.01, "awp_warmup": 1, "ema_decay": 0.9}),
    ("pgd_at", {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.1}),
    ("trades", {"awp_gamma": 0.01, **PLAIN_SGD}),
    ("mart", {"clip_grad_norm": 0.5}),
    ("alp", {"ema_decay": 0.8}),
    ("hat", {"awp_gamma": 0.01}),
    ("vfd", {"swa_start": 1}),
    ("act", {"temperature": 4.0, "clip_grad_norm": 0.3}),
    ("act", {"awp_gamma": 0.01}),
    ("lbgat", {"beta": 6.0, "awp_gamma": 0.01}),
]


class Recording:
    """A run's method, its models before the first step, and its batches."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches: list[TrainBatch] = []
        load, train_on, begin = Loader._load, Iteration.run, Loop.train

        def in_double(loader: Loader, ids: Iterable[Tensor], epoch: int) -> Iterator[Batch]:
            for batch in load(loader, ids, epoch):
                yield Batch(batch.x.double(), batch.y, batch.ids)

        def recorded(iteration: Iteration, batch: Batch) -> None:
            train_on(iteration, batch)
            assert iteration.batch is not None
            self.batches.append(iteration.batch)

        def begun(loop: Loop) -> dict[str, Any]:
            self.method, self.models = loop.method, copy.deepcopy(loop.models)
            return begin(loop)

        monkeypatch.setattr(Loader, "_load", in_double)
        monkeypatch.setattr(Iteration, "run", recorded)
        monkeypatch.setattr(Loop, "train", begun)


def norms_of(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def optimizer_of(model: nn.Module, recipe: Any) -> torch.optim.Optimizer:
    in_norms = {id(p) for norm in norms_of(model) for p in norm.parameters()}
    groups = [
        {
            "params": [p],
            "weight_decay": recipe.weight_decay
            if recipe.norm_decay or id(p) not in in_norms
            else 0,
        }
        for p in model.parameters()
    ]
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas)
    return torch.optim.SGD(groups, recipe.lr, recipe.momentum, nesterov=recipe.nesterov)


def loss_of(
    method: Any, models: dict[str, nn.Module], teacher: Any, batch: TrainBatch
) -> Callable[[], Tensor]:
    """Attack a batch, and return the function that computes its training loss."""
    model, x, y = models["model"], batch.x, batch.y
    start = method.start_of(batch)
    if start is None:
        start = random_start(x, method.recipe.eps, seed=batch.seed("attack"), sample_ids=batch.ids)
    adv = plain_pgd(model, x, start, method.recipe, plain_objective(method, models, batch))
    if method.name == "pgd_at":
        return lambda: ce(model(adv), y).mean()
    return lambda: slow_loss(method, model, models.get("natural"), teacher, x, adv, y)


def perturb(
    models: dict[str, nn.Module], loss: Callable[[], Tensor], gamma: float
) -> list[tuple[Tensor, Tensor]]:
    """AWP: move the weights, and return by how much. No statistics move."""
    buffers = [buffer for model in models.values() for buffer in model.buffers()]
    before = [buffer.clone() for buffer in buffers]
    weights = [p for p in models["model"].parameters() if p.dim() > 1]
    moves = []
    for weight, gradient in zip(weights, torch.autograd.grad(loss(), weights), strict=True):
        moves.append((weight, gamma * weight.detach().norm() * gradient / gradient.norm()))
    for buffer, old in zip(buffers, before, strict=True):
        buffer.data.copy_(old)
    for weight, move in moves:
        weight.data += move
    return moves


def mean_of(states: list[dict[str, Tensor]], model: nn.Module, images: list[Tensor]) -> nn.Module:
    """SWA: the mean of some weights, with statistics over some batches."""
    found = copy.deepcopy(model)
    for name, value in found.named_parameters():
        value.data.copy_(torch.stack([state[name] for state in states]).mean(0))
    for norm in norms_of(found):
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean
    with torch.no_grad():
        for x in images:
            found(x)
    return found


def plain_run(recording: Recording, teacher: Any) -> nn.Module:
    """Train as a script does, and return the model that is evaluated."""
    method, models, batches = recording.method, recording.models, recording.batches
    recipe, model = method.recipe, models["model"]
    per_epoch = len(batches) // recipe.epochs
    optimizers = [optimizer_of(one.train(), recipe) for one in models.values()]
    average, ends = copy.deepcopy(model), []
    for step, batch in enumerate(batches):
        place = step / per_epoch
        rate = recipe.lr * recipe.schedule.factor(place, recipe.epochs)
        loss = loss_of(method, models, teacher, batch)
        awp = recipe.awp_gamma and batch.epoch >= recipe.awp_warmup
        moves = perturb(models, loss, recipe.awp_gamma) if awp else []
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss().backward()
        for one, optimizer in zip(models.values(), optimizers, strict=True):
            if recipe.clip_grad_norm is not None:
                nn.utils.clip_grad_norm_(one.parameters(), recipe.clip_grad_norm)
            for group in optimizer.param_groups:
                group["lr"] = rate * (min(place / recipe.warmup, 1) if recipe.warmup else 1)
                cycled = recipe.schedule.momentum(place, recipe.epochs)
                group |= {} if cycled is None else {"momentum": cycled}
            optimizer.step()
        for weight, move in moves:
            weight.data -= move
        decay = min(recipe.ema_decay or 0, (2 + step) / (11 + step))
        for name, value in average.state_dict().items():
            if value.is_floating_point():
                value.lerp_(model.state_dict()[name], 1 - decay)
        if (step + 1) % per_epoch == 0:
            ends.append(copy.deepcopy(model.state_dict()))
    if recipe.swa_start is None:
        return average
    last = [batch.x for batch in batches[-per_epoch:]]
    return mean_of(ends[recipe.swa_start - 1 :], model, last)


@pytest.mark.parametrize(("name", "numbers"), CASES)
def test_a_whole_run_ends_as_a_plain_loop(
    name: str, numbers: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recording = Recording(monkeypatch)
    teacher = wide_model(1).eval() if name in TEACHER_OF else None
    recipe = small_recipe(name, **numbers)
    options: dict[str, Any] = {"run_dir": tmp_path / "run", "progress": False, "device": "cpu"}
    trained = train(
        name, recipe, data=small_data(), model=wide_model(0), teacher=teacher, **options
    )
    wanted = plain_run(recording, teacher).state_dict()
    assert len(recording.batches) == 4 * recipe.epochs
    for key, value in trained.model.state_dict().items():
        if value.is_floating_point():
            assert torch.allclose(value, wanted[key], rtol=1e-9, atol=1e-11), key
