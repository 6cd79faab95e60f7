"""Ten steps of every method: its losses against plain training, and those with a compiled attack."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_methods import slow_distance
from test_pair_methods import ce, kl, slow_loss
from torch import Tensor, nn
from training_helpers import make_method, make_model, small_data, small_recipe

from fastadv.ops import random_start
from fastadv.trainers import LossResult, Settings, TrainBatch, train
from fastadv.trainers.logs import read_records

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS, BATCH = 10, 8
LR = 0.1
TEACHER_OF = {"arrest", "hat", "vfd"}
# Numbers with which some of the images, but not all, are replayed.
REPLAYING: dict[str, Any] = {"phi": 20.0, "lam": 1.0}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("pgd_at", {}),
    ("fast", {}),
    ("arrest", REPLAYING),
    ("trades", {}),
    ("mart", {}),
    ("mart", {"code_constants": True}),
    ("alp", {}),
    ("hat", {}),
    ("vfd", {}),
    ("act", {}),
    ("act", {"temperature": 4.0, "attack_divergence": "sum"}),
    ("lbgat", {}),
    ("lbgat", {"beta": 6.0}),
]


def batches() -> list[TrainBatch]:
    """Ten batches of the small data in float64."""
    data = small_data(BATCH * STEPS).train
    images, labels = (t.chunk(STEPS) for t in (data.images.double() / 255, data.labels))
    ids = torch.arange(BATCH * STEPS).chunk(STEPS)
    return [
        TrainBatch(x, y, i, epoch=0, step=step, run_seed=5)
        for step, (x, y, i) in enumerate(zip(images, labels, ids, strict=True))
    ]


def descend(loss: Tensor, models: dict[str, nn.Module]) -> None:
    """One step of gradient descent."""
    parameters = [p for model in models.values() for p in model.parameters()]
    with torch.no_grad():
        for parameter, grad in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter -= LR * grad


def plain_pgd(
    model: nn.Module, x: Tensor, start: Tensor, recipe: Any, objective: Callable[[Tensor], Tensor]
) -> Tensor:
    """The usual loop, on the model in evaluation mode."""
    model.eval()
    adv = start
    for _ in range(recipe.steps):
        adv = adv.detach().requires_grad_()
        (grad,) = torch.autograd.grad(objective(model(adv)).sum(), adv)
        moved = adv.detach() + recipe.alpha * grad.sign()
        adv = torch.min(torch.max(moved, x - recipe.eps), x + recipe.eps).clamp(0, 1)
    model.train()
    return adv


def plain_objective(
    method: Any, models: dict[str, nn.Module], batch: TrainBatch
) -> Callable[[Tensor], Tensor]:
    """What the attack of a method maximises, of the logits of x'."""
    name, recipe = method.name, method.recipe
    model = copy.deepcopy(models["model"]).eval()
    with torch.no_grad():
        if name in ("trades", "hat", "lbgat", "vfd"):
            clean = model(batch.x)
            return lambda logits: kl(clean, logits)
        if name == "act":
            natural = copy.deepcopy(models["natural"]).train()(batch.x)
            a = recipe.weight
            b = a * (BATCH if recipe.attack_divergence == "sum" else 1)
            return lambda logits: (1 - a) * ce(logits, batch.y) + b * kl(natural, logits)
    return lambda logits: ce(logits, batch.y)


def plain_loss(method: Any, models: dict[str, Any], teacher: Any, batch: TrainBatch) -> Tensor:
    """A method's loss on one batch, from the formulas."""
    model, recipe, x, y = models["model"], method.recipe, batch.x, batch.y
    place = {"seed": batch.seed("attack"), "sample_ids": batch.ids}
    start = method.start_of(batch)
    start = random_start(x, recipe.eps, **place) if start is None else start
    adv = plain_pgd(model, x, start, recipe, plain_objective(method, models, batch))
    if method.name in ("pgd_at", "fast"):
        return ce(model(adv), y).mean()
    if method.name != "arrest":
        return slow_loss(method, model, models.get("natural"), teacher, x, adv, y)
    with torch.no_grad():
        wanted = teacher.forward_features(x)
        drifted = slow_distance(model.eval().forward_features(x), wanted) > recipe.tau
        noise = random_start(x, recipe.eps, seed=batch.seed("replay"), sample_ids=batch.ids)
    model.train()
    images = torch.where(drifted[:, None, None, None], noise, adv)
    features = model.forward_features(images)
    hard = ce(model.forward_head(features), y)
    return (hard + recipe.lam * slow_distance(features, wanted)).mean()


@pytest.mark.parametrize(("name", "numbers"), CASES)
def test_ten_steps_equal_plain_training(name: str, numbers: dict[str, Any]) -> None:
    teacher = make_model(1, torch.float64).eval()
    guide = teacher if name in TEACHER_OF else None
    method = make_method(name, make_model(0, torch.float64), guide, **numbers)
    method.initialise()
    method.train_mode()
    models = {key: copy.deepcopy(model) for key, model in method.trainable().items()}
    ours: list[LossResult] = []

    def update(result: LossResult) -> bool:
        ours.append(result)
        descend(result.loss, method.trainable())
        return True

    plain = []
    for batch in batches():
        method.step(batch, update)
        loss = plain_loss(method, models, teacher, batch)
        descend(loss, models)
        plain.append(float(loss.detach()))
    curve = [float(result.loss.detach()) for result in ours]
    assert curve == pytest.approx(plain, rel=1e-8)
    assert len(set(curve)) == STEPS
    if name == "arrest":
        assert any(0 < float(result.metrics["replayed"]) < 1 for result in ours)


@pytest.mark.parametrize(
    ("name", "tolerance"), [("pgd_at", 1e-3), ("arrest", 1e-3), ("act", 1e-3), ("trades", 0.03)]
)
def test_the_compiled_attack_gives_the_same_curve(
    name: str, tolerance: float, tmp_path: Path
) -> None:
    """One method for each kind of attack, at a learning rate so small that differences do not grow.

    Rounding changes the signs of gradients near 0, that of bfloat16 of more than that of float32. With TRADES all
    are near 0 in the first step of the attack, as its divergence is least at the clean image.
    """
    data, curves = small_data(BATCH * STEPS), []
    numbers = {"epochs": 1, "batch_size": BATCH, "lr": 0.01} | (
        REPLAYING if name == "arrest" else {}
    )
    for engine, precision in (("eager", "fp32"), ("compiled", "fp32"), ("compiled", "bf16")):
        way = {"engine": engine, "attack_precision": precision}
        recipe = small_recipe(name, **numbers, **way)
        run = tmp_path / f"{engine}_{precision}"
        train(
            name,
            recipe,
            data=data,
            model=make_model(0),
            run_dir=run,
            teacher=make_model(1) if name in TEACHER_OF else None,
            settings=Settings(log_every=1),
            device="cpu",
            progress=False,
        )
        records = read_records(run / "metrics.jsonl")
        curves.append([record["loss"] for record in records if record["kind"] == "step"])
    live, compiled, narrow = curves
    assert len(live) == STEPS
    assert compiled == pytest.approx(live, rel=tolerance)
    assert narrow == pytest.approx(live, rel=0.03)
