"""Each method's step against a plain float64 version of it, and what ARREST's parts do."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_helpers import (
    copied_state,
    make_batch,
    make_method,
    make_model,
    states_equal,
)

from fastadv.ops import random_start
from fastadv.trainers import Attacked, TrainBatch
from fastadv.trainers.arrest import Arrest, Replayed

pytestmark = pytest.mark.usefixtures("one_thread")
DOUBLE = torch.float64


def slow_cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    picked = torch.stack([row[label] for row, label in zip(logits, y, strict=True)])
    return (logits.exp().sum(1).log() - picked).mean()


def slow_distance(u: Tensor, v: Tensor) -> Tensor:
    u, v = u.flatten(1), v.flatten(1)
    cosine = (u * v).sum(1) / (u.square().sum(1).sqrt() * v.square().sum(1).sqrt())
    return 1 - cosine.abs()


def slow_mse(u: Tensor, v: Tensor) -> Tensor:
    return torch.stack([(a - b).square().mean() for a, b in zip(u, v, strict=True)])


def slow_attention(u: Tensor, v: Tensor) -> Tensor:
    maps = [(t * t).sum(1).flatten(1) for t in (u, v)]
    unit = [m / m.square().sum(1, keepdim=True).sqrt() for m in maps]
    return (unit[0] - unit[1]).square().sum(1).sqrt()


def slow_logit_distance(z: Tensor, teacher_z: Tensor, t: float) -> Tensor:
    p, q = ((s / t).exp() / (s / t).exp().sum(1, keepdim=True) for s in (teacher_z, z))
    return t * t * (p * (p / q).log()).sum(1)


SLOW_DISTANCES = {"angular": slow_distance, "mse": slow_mse, "attention": slow_attention}


def slow_loss(
    method: str,
    model: Any,
    x: Tensor,
    y: Tensor,
    teacher_features: Tensor,
    teacher_logits: Tensor,
    parts: dict[str, Any],
) -> Tensor:
    features = model.forward_features(x)
    logits = model.forward_head(features)
    loss = slow_cross_entropy(logits, y)
    if method != "arrest" or not parts.get("distill", True):
        return loss
    kind = parts.get("distance", "angular")
    if kind == "logits_kl":
        distance = slow_logit_distance(logits, teacher_logits, parts.get("temperature", 4.0))
    elif kind == "logits_mse":
        distance = slow_mse(logits, teacher_logits)
    else:
        distance = SLOW_DISTANCES[kind](features, teacher_features)
    return loss + parts.get("lam", 50.0) * distance.mean()


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("standard", {}),
        ("pgd_at", {}),
        ("arrest", {}),
        ("arrest", {"lam": 3.0}),
        ("arrest", {"distance": "mse"}),
        ("arrest", {"distance": "attention", "lam": 3.0}),
        ("arrest", {"distance": "logits_kl", "lam": 3.0}),
        ("arrest", {"distance": "logits_kl", "temperature": 1.0}),
        ("arrest", {"distance": "logits_mse", "lam": 3.0}),
        ("arrest", {"distill": False}),
        ("arrest", {"replay": False}),
        ("arrest", {"finetune": False, "distill": False, "replay": False}),
    ],
)
def test_loss_and_gradients_equal_the_plain_version(name: str, parts: dict[str, Any]) -> None:
    model, teacher = make_model(0, DOUBLE), make_model(1, DOUBLE)
    slow_model = copy.deepcopy(model)
    batch = make_batch(dtype=DOUBLE)
    x = (batch.x + 0.05 * torch.sign(torch.sin(50 * batch.x))).clamp(0, 1)
    with torch.no_grad():
        teacher_features = teacher.eval().forward_features(batch.x)  # type: ignore[operator]
        teacher_logits = teacher(batch.x)
    method = make_method(name, model, teacher if name == "arrest" else None, **parts)
    method.train_mode()
    slow_model.train()

    guided = Replayed(x, teacher_features, teacher_logits)
    adv = guided if name == "arrest" else Attacked(x)
    loss = method.training_loss(batch, adv).loss
    expected = slow_loss(name, slow_model, x, batch.y, teacher_features, teacher_logits, parts)
    loss.backward()
    expected.backward()

    assert torch.allclose(loss, expected, rtol=1e-12)
    for ours, slow in zip(model.parameters(), slow_model.parameters(), strict=True):
        assert torch.allclose(ours.grad, slow.grad, rtol=1e-9, atol=1e-12)
    for a, b in zip(model.buffers(), slow_model.buffers(), strict=True):
        assert torch.allclose(a, b, rtol=1e-12)


def make_arrest(batch: TrainBatch, phi: float, **changes: Any) -> Arrest:
    """ARREST with a model that has drifted from its teacher by different angles on different images."""
    teacher = make_model(1, batch.x.dtype)
    model = copy.deepcopy(teacher)
    with torch.no_grad():
        noise = torch.Generator().manual_seed(2)
        for parameter in model.parameters():
            step = torch.randn(parameter.shape, generator=noise, dtype=DOUBLE)
            parameter += 0.05 * step.to(parameter.dtype)
    changes = {"finetune": False, "engine": "eager"} | changes
    method = make_method("arrest", model, teacher, phi=phi, **changes)
    assert isinstance(method, Arrest)
    method.train_mode()
    return method


def drift(method: Arrest, x: Tensor) -> Tensor:
    """Angles between the features of the model and of its teacher, in degrees."""
    model: Any = copy.deepcopy(method.model).eval()
    teacher: Any = method.teachers["teacher"]
    with torch.no_grad():
        distance = slow_distance(model.forward_features(x), teacher.forward_features(x))
    return torch.rad2deg(torch.arccos(1 - distance))


def test_drifted_images_are_replayed_and_only_the_others_attacked() -> None:
    batch = make_batch(16, DOUBLE)
    angles = drift(make_arrest(batch, phi=30.0), batch.x)
    phi = float(angles.median() + angles.sort().values[8]) / 2  # half of them are beyond it
    method = make_arrest(batch, phi)
    drifted = angles > phi
    assert 0 < int(drifted.sum()) < 16

    out = method.attack(batch)
    everyone = method.perturb(batch)
    noise = random_start(
        batch.x, method.recipe.eps, seed=batch.seed("replay"), sample_ids=batch.ids
    )
    assert torch.equal(out.x[drifted], noise[drifted])
    # In evaluation mode a sample's attack does not depend on the batch around it.
    assert torch.allclose(out.x[~drifted], everyone[~drifted], atol=1e-9)
    assert out.replayed is not None
    assert float(out.replayed) == pytest.approx(float(drifted.double().mean()))
    assert float((out.x - batch.x).abs().max()) <= method.recipe.eps + 1e-12
    assert float(out.x.min()) >= 0 and float(out.x.max()) <= 1


def test_replay_with_clean_images_changes_the_drifted_ones_alone() -> None:
    batch = make_batch(16, DOUBLE)
    angles = drift(make_arrest(batch, phi=30.0), batch.x)
    phi = float(angles.median() + angles.sort().values[8]) / 2
    noisy, clean = (
        make_arrest(batch, phi, replay_with=kind).attack(batch) for kind in ("noise", "clean")
    )
    drifted = angles > phi
    assert torch.equal(clean.x[drifted], batch.x[drifted])
    assert torch.equal(clean.x[~drifted], noisy.x[~drifted])
    assert (clean.x[~drifted] != batch.x[~drifted]).any()
    assert torch.equal(clean.replayed, noisy.replayed)


@pytest.mark.parametrize("kind", ["logits_kl", "logits_mse"])
@pytest.mark.parametrize("replay", [True, False])
def test_the_teachers_logits_are_there_where_they_are_distilled(replay: bool, kind: str) -> None:
    batch = make_batch(8, DOUBLE)
    method = make_arrest(batch, phi=30.0, distance=kind, replay=replay)
    teacher = method.teachers["teacher"]
    assert torch.equal(method.attack(batch).teacher_logits, teacher(batch.x))
    for changes in ({"distance": "mse"}, {"distance": kind, "distill": False}):
        other = make_arrest(batch, phi=30.0, replay=replay, **changes)
        assert other.attack(batch).teacher_logits is None


@pytest.mark.parametrize(("phi", "part"), [(90.0, 0.0), (0.0, 1.0)])
def test_the_angle_switches_replay_off_and_on(phi: float, part: float) -> None:
    batch = make_batch(8, DOUBLE)
    method = make_arrest(batch, phi)
    out = method.attack(batch)
    assert float(out.replayed) == part
    if part == 0:
        assert torch.equal(out.x, method.perturb(batch))


def test_replay_ends_with_its_epochs() -> None:
    batch = make_batch(8, DOUBLE, epoch=1)
    method = make_arrest(batch, phi=0.0, replay_epochs=1)
    out = method.attack(batch)
    assert out.replayed is None
    assert torch.equal(out.x, method.perturb(batch))
    assert out.teacher_features is not None


@pytest.mark.parametrize("finetune", [True, False])
def test_finetuning_starts_from_the_teacher(finetune: bool) -> None:
    model, teacher = make_model(0), make_model(1)
    before = copied_state(model)
    method = make_method("arrest", model, teacher, finetune=finetune)
    method.initialise()
    expected = teacher.state_dict() if finetune else before
    assert states_equal(model.state_dict(), expected)


def test_a_method_with_all_parts_off_needs_no_teacher() -> None:
    off = {"finetune": False, "distill": False, "replay": False}
    method = make_method("arrest", make_model(), None, **off)
    batch = make_batch()
    plain = make_method("pgd_at", method.model)
    assert torch.equal(method.attack(batch).x, plain.attack(batch).x)
    assert method.teachers_needed(method.recipe) == ()


class Counting(nn.Module):
    """A model that counts the images that pass through its features."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model
        self.images = 0

    def forward_features(self, x: Tensor) -> Tensor:
        self.images += len(x)
        return self.inner.forward_features(x)  # type: ignore[operator]

    def forward_head(self, features: Tensor) -> Tensor:
        return self.inner.forward_head(features)  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def take_step(method: Any, batch: TrainBatch) -> None:
    """One step of plain SGD."""

    def update(result: Any) -> bool:
        result.loss.backward()
        with torch.no_grad():
            for parameter in method.model.parameters():
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
        return True

    method.train_mode()
    method.step(batch, update)


@pytest.mark.parametrize(
    ("name", "epoch", "changes", "model_passes", "teacher_passes"),
    [
        ("standard", 0, {}, 1, 0),
        ("pgd_at", 0, {}, 3 + 1, 0),
        # One drift pass of each; nobody has drifted at 90 degrees, everybody at 0.
        ("arrest", 0, {"phi": 90.0}, 1 + 3 + 1, 1),
        ("arrest", 0, {"phi": 0.0, "finetune": False}, 1 + 1, 1),
        ("arrest", 1, {}, 3 + 1, 1),
        ("arrest", 1, {"distill": False}, 3 + 1, 0),
        ("arrest", 0, {"replay": False}, 3 + 1, 1),
        ("arrest", 0, {"phi": 90.0, "distance": "logits_kl"}, 1 + 3 + 1, 1),
        ("arrest", 1, {"distance": "logits_mse"}, 3 + 1, 1),
        ("arrest", 0, {"phi": 0.0, "finetune": False, "replay_with": "clean"}, 1 + 1, 1),
    ],
)
def test_no_pass_is_made_twice(
    name: str, epoch: int, changes: dict[str, Any], model_passes: int, teacher_passes: int
) -> None:
    model, teacher = Counting(make_model(0)), Counting(make_model(1))
    batch = make_batch(8, epoch=epoch)
    method = make_method(
        name,
        model,
        teacher if name == "arrest" else None,
        **({} if name == "standard" else {"engine": "eager"}),
        **changes,
    )
    take_step(method, batch)
    assert model.images == model_passes * 8
    assert teacher.images == teacher_passes * 8
    cost = model_passes + teacher_passes  # forward passes; K backward of F each, and 2F of training
    attacked = 0 if name == "standard" or changes.get("phi") == 0.0 else 3
    assert cost + attacked + 2 <= method.passes(epoch)


@pytest.mark.parametrize("name", ["standard", "pgd_at", "arrest"])
def test_running_statistics_move_as_often_as_stated(name: str) -> None:
    model, teacher = make_model(0), make_model(1)
    before = [b.clone() for n, b in model.named_buffers() if n.endswith("num_batches_tracked")]
    method = make_method(name, model, teacher if name == "arrest" else None)
    for step in range(3):
        take_step(method, make_batch(step=step))
    after = [b for n, b in model.named_buffers() if n.endswith("num_batches_tracked")]
    assert [int(a - b) for a, b in zip(after, before, strict=True)] == [3 * method.bn_updates] * 3


def test_the_teacher_stays_as_it_is() -> None:
    model, teacher = make_model(0), make_model(1)
    before = copied_state(teacher)
    method = make_method("arrest", model, teacher)
    for step in range(3):
        take_step(method, make_batch(step=step))
    assert states_equal(teacher.state_dict(), before)
    assert not any(module.training for module in teacher.modules())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


def test_attacks_leave_the_model_in_training_mode() -> None:
    model = make_model(0)
    model.bn2.eval()  # type: ignore[union-attr, operator]  # a frozen layer stays frozen
    method = make_method("arrest", model, make_model(1))
    before = copied_state(model)
    method.attack(make_batch())
    assert states_equal(model.state_dict(), before)
    assert model.training and model.bn1.training  # type: ignore[union-attr]
    assert not model.bn2.training  # type: ignore[union-attr]
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_steps_differ_in_their_random_numbers_but_repeat_exactly() -> None:
    method = make_method("pgd_at", make_model(0))
    first, again = (method.attack(make_batch(step=0)).x for _ in range(2))
    assert torch.equal(first, again)
    other = [method.attack(make_batch(**place)).x for place in ({"step": 1}, {"epoch": 1})]
    assert not any(torch.equal(first, x) for x in other)


def test_arrest_wants_a_model_that_can_be_cut() -> None:
    with pytest.raises(TypeError, match="forward_features"):
        make_method("arrest", nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), make_model(1))
