"""Objectives against plain float64 formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastadv import losses
from fastadv.losses import mart


def make_inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 5, (6,), generator=generator)
    u, v = torch.randn(2, 6, 3, 2, 2, generator=generator, dtype=torch.float64)
    return logits.to(dtype), y, u.to(dtype), v.to(dtype)


def slow_cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    rows = []
    for row, label in zip(logits, y, strict=True):
        rows.append(torch.log(torch.exp(row).sum()) - row[label])
    return torch.stack(rows)


def slow_distance(u: Tensor, v: Tensor) -> Tensor:
    rows = []
    for a, b in zip(u, v, strict=True):
        rows.append(1 - (a * b).sum().abs() / ((a * a).sum().sqrt() * (b * b).sum().sqrt()))
    return torch.stack(rows)


def test_arrest_equals_the_formula_with_its_gradients() -> None:
    logits, y, features, teacher = make_inputs()
    ours = [logits.clone().requires_grad_(), features.clone().requires_grad_()]
    slow = [logits.clone().requires_grad_(), features.clone().requires_grad_()]

    loss = losses.arrest(ours[0], y, ours[1], teacher, 50.0)
    expected = (slow_cross_entropy(slow[0], y) + 50.0 * slow_distance(slow[1], teacher)).mean()
    loss.backward()
    expected.backward()

    assert torch.allclose(loss, expected, rtol=1e-12)
    for a, b in zip(ours, slow, strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-10, atol=1e-13)


def test_arrest_per_sample_values_have_the_mean_as_their_mean() -> None:
    logits, y, features, teacher = make_inputs()
    each = losses.arrest(logits, y, features, teacher, 7.0, reduction="none")
    assert each.shape == (6,)
    assert torch.allclose(
        each, slow_cross_entropy(logits, y) + 7 * slow_distance(features, teacher)
    )
    assert torch.allclose(each.mean(), losses.arrest(logits, y, features, teacher, 7.0))


def test_arrest_with_lam_zero_is_the_cross_entropy() -> None:
    logits, y, features, teacher = make_inputs()
    loss = losses.arrest(logits, y, features, teacher, 0.0)
    assert torch.allclose(loss, losses.cross_entropy(logits, y))


def test_arrest_sends_no_gradient_to_the_teacher() -> None:
    logits, y, features, teacher = make_inputs()
    teacher.requires_grad_()
    losses.arrest(logits.requires_grad_(), y, features.requires_grad_(), teacher, 50.0).backward()
    assert teacher.grad is None


def test_arrest_passes_gradcheck() -> None:
    logits, y, features, teacher = make_inputs()
    assert torch.autograd.gradcheck(
        lambda a, b: losses.arrest(a, y, b, teacher, 3.0),
        (logits.requires_grad_(), features.requires_grad_()),
    )


def slow_mse(u: Tensor, v: Tensor) -> Tensor:
    return torch.stack([((a - b) ** 2).sum() / a.numel() for a, b in zip(u, v, strict=True)])


def slow_attention(u: Tensor, v: Tensor) -> Tensor:
    maps = [(t**2).sum(1).flatten(1) for t in (u, v)]
    unit = [m / (m**2).sum(1, keepdim=True).sqrt() for m in maps]
    return ((unit[0] - unit[1]) ** 2).sum(1).sqrt()


@pytest.mark.parametrize(
    ("kind", "slow_version"),
    [("angular", slow_distance), ("mse", slow_mse), ("attention", slow_attention)],
)
def test_feature_distances_equal_their_formulas(kind: Any, slow_version: Any) -> None:
    _, _, features, teacher = make_inputs()
    ours, slow = features.clone().requires_grad_(), features.clone().requires_grad_()
    distance = losses.feature_distance(ours, teacher.requires_grad_(), kind)
    expected = slow_version(slow, teacher.detach())
    distance.square().sum().backward()
    expected.square().sum().backward()
    assert torch.allclose(distance, expected, rtol=1e-12)
    assert torch.allclose(ours.grad, slow.grad, rtol=1e-10, atol=1e-13)
    assert teacher.grad is None
    half = losses.feature_distance(features.bfloat16(), teacher.bfloat16(), kind)
    assert half.dtype == torch.float32


def test_unknown_feature_distances_are_named() -> None:
    _, _, features, teacher = make_inputs()
    with pytest.raises(ValueError, match="kind must be one of angular, mse, attention, got 'l1'"):
        losses.feature_distance(features, teacher, "l1")


def test_vfd_equals_the_formula_with_its_gradients() -> None:
    _, _, adv, clean = make_inputs()
    vanilla = make_inputs()[2].flip(0)
    ours = [t.clone().requires_grad_() for t in (adv, clean, vanilla)]
    slow = [t.clone().requires_grad_() for t in (adv, clean)]

    loss = losses.vfd(*ours)
    rows = [
        (a - v).square().sum().sqrt() + (c - v).square().sum().sqrt()
        for a, c, v in zip(*slow, vanilla, strict=True)
    ]
    expected = torch.stack(rows)
    loss.backward()
    expected.mean().backward()

    assert torch.allclose(loss, expected.mean(), rtol=1e-12)
    assert torch.allclose(losses.vfd(*ours, reduction="none"), expected, rtol=1e-12)
    for a, b in zip(ours, slow, strict=False):
        assert torch.allclose(a.grad, b.grad, rtol=1e-10, atol=1e-13)
    assert ours[2].grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_give_a_float32_loss(dtype: torch.dtype) -> None:
    logits, y, features, teacher = make_inputs(dtype)
    loss = losses.arrest(logits, y, features, teacher, 50.0)
    assert loss.dtype == torch.float32
    wide = losses.arrest(logits.double(), y, features.double(), teacher.double(), 50.0)
    assert torch.allclose(loss.double(), wide, rtol=1e-5)  # the inputs are rounded, not the loss


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"reduction": "sum"}, ValueError, "reduction must be"),
        ({"adv_logits": torch.zeros(6, 5, dtype=torch.int64)}, TypeError, "adv_logits must be"),
        ({"y": torch.zeros(5, dtype=torch.int64)}, ValueError, r"y must have shape \(6,\)"),
        ({"teacher_features": torch.zeros(6, 4)}, ValueError, "shape"),
    ],
)
def test_wrong_arguments_are_named(change: dict, error: type[Exception], words: str) -> None:
    logits, y, features, teacher = make_inputs()
    arguments = {
        "adv_logits": logits,
        "y": y,
        "adv_features": features,
        "teacher_features": teacher,
        "lam": 1.0,
    }
    with pytest.raises(error, match=words):
        losses.arrest(**(arguments | change))


def plain_mart_of_the_code(clean: Tensor, adv: Tensor, y: Tensor, beta: float) -> Tensor:
    """The authors' loss of each image, from probabilities, in float64."""
    p, q = (z.exp() / z.exp().sum(1, keepdim=True) for z in (clean, adv))
    rows = torch.arange(len(y))
    others = q.clone()
    others[rows, y] = -1
    hard = -q[rows, y].log() - (1.0001 - others.amax(1) + 1e-12).log()
    apart = torch.where(p > 0, p * (p.log() - (q + 1e-12).log()), 0).sum(1)
    return hard + beta * apart * (1.0000001 - p[rows, y])


@pytest.mark.parametrize("spread", [1.0, 6.0, 20.0])
def test_mart_with_the_codes_constants_equals_the_formula(spread: float) -> None:
    generator = torch.Generator().manual_seed(0)
    clean, adv = (
        (spread * torch.randn(64, 10, generator=generator, dtype=torch.float64)).requires_grad_()
        for _ in range(2)
    )
    y = torch.randint(0, 10, (64,), generator=generator)
    ours = mart(clean, adv, y, 4.0, code_constants=True, reduction="none")
    expected = plain_mart_of_the_code(clean, adv, y, 4.0)
    assert torch.allclose(ours, expected, rtol=1e-11)
    assert torch.equal(mart(clean, adv, y, 4.0, code_constants=True), ours.mean())
    slopes = [torch.autograd.grad(v.sum(), (clean, adv)) for v in (ours, expected)]
    for a, b in zip(*slopes, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-10)
    narrow = mart(clean.float(), adv.float(), y, 4.0, code_constants=True, reduction="none")
    assert narrow.dtype == torch.float32
    assert torch.allclose(narrow.double(), expected, rtol=1e-5)


def test_the_codes_constants_bound_what_confident_errors_do() -> None:
    y = torch.tensor([0])
    clean = torch.tensor([[200.0, 0.0, 0.0]])
    values, slopes = [], []
    for margin in (30.0, 1e4, 3e38):
        adv = torch.tensor([[-margin, margin, 0.0]], requires_grad=True)
        loss = mart(clean, adv, y, code_constants=True, reduction="none")
        (slope,) = torch.autograd.grad(loss.sum(), adv)
        assert torch.isfinite(loss).all() and torch.isfinite(slope).all()
        loss = loss.detach().double()
        hard = F.cross_entropy(adv.detach(), y).clamp(max=1e30)  # as far apart as logits count
        values.append(float((loss - hard.double()).abs() / loss))
        slopes.append(float(slope.norm()))
    assert max(values[1:]) < 1e-2  # nothing is added that grows
    assert slopes == pytest.approx([2**0.5] * 3, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_marts_constants_do_not_vanish_in_half_precision(dtype: torch.dtype) -> None:
    adv = torch.tensor([[-20.0, 20.0, 0.0]], dtype=dtype)
    clean, y = torch.tensor([[0.0, 4.0, 0.0]], dtype=dtype), torch.tensor([0])
    ours = mart(clean, adv, y, code_constants=True)
    expected = plain_mart_of_the_code(clean.double(), adv.double(), y, 5.0)
    assert float(ours) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"code_constants": 1}, TypeError, "code_constants must be True or False, got 1"),
        ({"beta": -1.0}, ValueError, "beta must"),
        ({"clean_logits": torch.zeros(4, 2)}, ValueError, "clean_logits"),
        ({"clean_logits": torch.zeros(4, 3, dtype=torch.int64)}, TypeError, "clean_logits"),
        ({"adv_logits": torch.zeros(4, 3, 1)}, ValueError, "adv_logits must have shape"),
        ({"y": torch.zeros(3, dtype=torch.int64)}, ValueError, r"y must have shape \(4,\)"),
        ({"y": torch.tensor([0, 1, 2, 3])}, IndexError, "3"),
        (
            {"clean_logits": torch.zeros(4, 1), "adv_logits": torch.zeros(4, 1)},
            ValueError,
            "with C >= 2",
        ),
    ],
)
def test_wrong_arguments_of_mart_with_constants_are_named(
    change: dict[str, Any], error: type[Exception], words: str
) -> None:
    arguments = {
        "clean_logits": torch.zeros(4, 3),
        "adv_logits": torch.zeros(4, 3),
        "y": torch.zeros(4, dtype=torch.int64),
        "code_constants": True,
    }
    with pytest.raises(error, match=words):
        mart(**(arguments | change))


def test_kd_sends_no_gradient_to_the_teacher() -> None:
    student, teacher = (torch.randn(4, 3, requires_grad=True) for _ in range(2))
    losses.kd(student, teacher, 2.0).backward()
    assert teacher.grad is None and student.grad is not None
