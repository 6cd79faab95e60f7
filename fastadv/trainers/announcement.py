"""The text that a run prints before it starts: the work, the expected time, and where the results go."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from fastadv.attacks import PGD
from fastadv.data import Batches
from fastadv.engine.frozen import frozen
from fastadv.trainers.console import count_of, duration
from fastadv.trainers.loop import Loop
from fastadv.trainers.recipe import AdversarialRecipe, Recipe

_LONG_PASS = 5.0  # seconds


def announcement(loop: Loop, model_name: str | None) -> str:
    """Return a few lines about a run that is about to start.

    Args:
        loop: the run.
        model_name: the name of the model, if it was made by name.
    """
    recipe, loader = loop.recipe, loop.loader
    runtime = loop.method.runtime
    model = next(iter(loop.models.values()))
    size = sum(p.numel() for p in model.parameters())
    precision = "float32" if runtime.autocast_dtype is None else str(runtime.autocast_dtype)[6:]
    where = f"{runtime.device}" + f" x {loop.ranks.world_size}" * (loop.ranks.world_size > 1)
    done = loop.progress
    begun = f", continued after epoch {done.epoch} iteration {done.epoch_step}" if done.step else ""
    return "\n".join(
        [
            f"{loop.method.name} on {loader.name} ({_images(loader)}) with "
            f"{model_name or type(model).__name__} ({size:,} parameters), on {where} in "
            f"{precision}{begun}",
            f"  work: {count_of(recipe.epochs, 'epoch')} of {count_of(len(loop.loader), 'iteration')} of "
            f"{count_of(recipe.batch_size, 'image')}; per image {_passes(loop)}",
            f"  time: about {duration(_expected_seconds(loop))}, going by one batch",
            *_optimizer_line(loop),
            *_schedule_line(loop.recipe),
            *_attack_line(loop),
            f"  best checkpoint: by {_score(loop)} of {_watched(loop)}",
            f"  results: {loop.run.path}",
        ]
    )


def _images(loader: Batches) -> str:
    extra, few = loader.extra_count, loader.extra_per_batch
    some = f" and {few} of {extra:,} extra images per iteration" if extra else ""
    return f"{loader.first_extra:,} images{some}"


def _expected_seconds(loop: Loop) -> float:
    """Estimate the seconds of the remaining iterations, without validations and checkpoints.

    A forward pass and a step of the attack are timed on the first batch, in evaluation mode. They do not change
    the model.
    """
    method, recipe = loop.method, loop.recipe
    model = next(iter(loop.models.values()))
    batch = next(loop.loader.epoch(0))

    def forward() -> Tensor:
        with frozen(model), torch.no_grad(), method.autocast():
            return model(batch.x)

    seconds = _seconds_of(forward)
    passes, steps, step_seconds = _passes_left(loop), 0, 0.0
    attack = getattr(method, "pgd", None)
    if isinstance(attack, PGD) and isinstance(recipe, AdversarialRecipe):
        steps = recipe.steps * (recipe.epochs - loop.progress.epoch)
        engine = attack.engine_for(batch.x)
        images = engine.images(batch.x)

        def step() -> Tensor:
            with frozen(model), engine.session(model, 0):
                return engine.gradient(images, lambda logits: logits.square().sum(1)).grad

        step_seconds = _seconds_of(step)
    return len(loop.loader) * (max(passes - 2 * steps, 0) * seconds + steps * step_seconds)


def _passes_left(loop: Loop) -> float:
    return sum(loop.method.passes(e) for e in range(loop.progress.epoch, loop.recipe.epochs))


def _seconds_of(work: Callable[[], Tensor]) -> float:
    """The seconds of a second call, as the first call includes the start-up; of the first call if it is long."""
    seconds = 0.0
    for _ in range(2):
        began = time.perf_counter()
        work().sum().item()  # waits for the device
        seconds = time.perf_counter() - began
        if seconds > _LONG_PASS:
            break
    return seconds


def _optimizer_line(loop: Loop) -> list[str]:
    recipe = loop.recipe
    if recipe.optimizer == "sgd":
        return []
    return [
        f"  optimizer: AdamW, learning rate {recipe.lr:g}, betas {recipe.betas[0]:g} and {recipe.betas[1]:g}, "
        f"weight decay {recipe.weight_decay:g}"
    ]


def _schedule_line(recipe: Recipe) -> list[str]:
    """A line about the schedule, if it was scaled from another number of epochs."""
    kind = type(recipe)
    decided = {name: getattr(recipe, name) for name in kind.deciders()}
    for name in kind.presets:
        plain = kind.preset(name, **decided)
        scaled = plain.schedule.scaled(plain.epochs, recipe.epochs)
        if plain.schedule != recipe.schedule == scaled:
            places = ", ".join(f"{key} {_rounded(value)}" for key, value in vars(scaled).items())
            return [
                f"  schedule: {type(scaled).__name__}, {plain.epochs} epochs scaled to {recipe.epochs}: {places}"
            ]
    return []


def _rounded(value: Any) -> str:
    """A number, or several, with four digits."""
    numbers = value if isinstance(value, tuple) else (value,)
    return ", ".join(f"{number:.4g}" for number in numbers)


def _attack_line(loop: Loop) -> list[str]:
    recipe = loop.recipe
    if not (isinstance(recipe, AdversarialRecipe) and hasattr(loop.method, "pgd")):
        return []
    ball = "" if recipe.norm == "linf" else f" in {recipe.norm}"
    return [
        f"  attack: PGD-{recipe.steps}{ball} on {recipe.eps:.6g} = {recipe.eps * 255:.4g}/255, "
        f"steps of {recipe.alpha * 255:.4g}/255"
    ]


def _passes(loop: Loop) -> str:
    """The cost in forward passes, for each range of epochs with the same cost."""
    costs = [loop.method.passes(epoch) for epoch in range(loop.recipe.epochs)]
    parts, first = [], 1
    for cost, stretch in groupby(costs):
        last = first + len(list(stretch)) - 1
        epochs = f"epoch {first}" if first == last else f"epochs {first} to {last}"
        parts.append(f"up to {cost:g} forward passes in {epochs}")
        first = last + 1
    return parts[0].partition(" in epoch")[0] if len(parts) == 1 else ", ".join(parts)


def _score(loop: Loop) -> str:
    recipe = loop.recipe
    if isinstance(recipe, AdversarialRecipe) and recipe.monitor_steps:
        ball = "" if recipe.norm == "linf" else f" in {recipe.norm}"
        return f"accuracy under PGD-{recipe.monitor_steps}{ball}"
    return "clean accuracy"


def _watched(loop: Loop) -> str:
    kind = "held-out training" if loop.recipe.holdout else "test"
    return f"{loop.monitor.images:,} {kind} images"
