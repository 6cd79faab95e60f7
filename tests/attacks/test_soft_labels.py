"""Attacks on soft labels against plain loops, and what refuses them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from training_helpers import make_model

import fastadv
from fastadv.attacks import APGD, CW, CWL2, FAB, FGSM, FGSMRS, MIM, PGD, FriendlyPGD, Square

pytestmark = pytest.mark.usefixtures("one_thread")
DOUBLE = torch.float64


def batch(dtype: torch.dtype = DOUBLE) -> tuple[Tensor, Tensor]:
    """Images, and labels of which none is nearly hard."""
    generator = torch.Generator().manual_seed(2)
    x = torch.rand(8, 1, 8, 8, generator=generator, dtype=DOUBLE)
    y = torch.rand(8, 4, generator=generator, dtype=DOUBLE)
    return x.to(dtype), (y / y.sum(1, keepdim=True)).to(dtype)


def slow_value(z: Tensor, y: Tensor, loss: str) -> Tensor:
    p = z.exp() / z.exp().sum()
    terms = [-a * b.log() if loss == "ce" else a * (a / b).log() for a, b in zip(y, p, strict=True)]
    return torch.stack(terms).sum()


def slow_pgd(
    model: Any, start: Tensor, x: Tensor, y: Tensor, loss: str, steps: int, alpha: float
) -> Tensor:
    points = []
    for i, point in enumerate(start):
        for _ in range(steps):
            leaf = point.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(slow_value(model(leaf[None])[0], y[i], loss), leaf)
            moved = point + alpha * gradient.sign()
            point = torch.minimum(torch.maximum(moved, x[i] - 0.1), x[i] + 0.1).clamp(0, 1)
        points.append(point)
    return torch.stack(points)


@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_pgd_equals_a_plain_loop(loss: str) -> None:
    model, (x, y) = make_model(0, DOUBLE).eval(), batch()
    start = fastadv.ops.random_start(x, 0.1, seed=3)
    slow = slow_pgd(model, start, x, y, loss, 4, 0.04)
    adv = fastadv.pgd_fused(model, x, y, eps=0.1, alpha=0.04, steps=4, loss=loss, seed=3)
    assert torch.allclose(adv, slow, rtol=0, atol=1e-12)
    friendly = FriendlyPGD(model, 0.1, 0.04, 4, tau=4, loss=loss)(x, y, seed=3)
    assert torch.allclose(friendly, slow, rtol=0, atol=1e-12)
    hard = fastadv.pgd_fused(model, x, y.argmax(1), eps=0.1, alpha=0.04, steps=4, seed=3)
    assert float((hard - adv).abs().max()) > 0.01
    attack = PGD(model, 0.1, 0.04, 4, loss=loss)
    attack(x, y, seed=3)
    values = [slow_value(z, label, loss) for z, label in zip(model(start), y, strict=True)]
    assert float(attack.last.loss_per_step[0]) == pytest.approx(float(torch.stack(values).mean()))


def test_fgsm_equals_a_plain_step_also_towards_the_labels() -> None:
    model, (x, y) = make_model(0, DOUBLE).eval(), batch()
    slow = slow_pgd(model, x, x, y, "ce", 1, 0.1)
    assert torch.allclose(FGSM(model, 0.1)(x, y), slow, rtol=0, atol=1e-12)
    towards = slow_pgd(model, x, x, y, "ce", 1, -0.1)
    assert torch.allclose(FGSM(model, 0.1, targeted=True)(x, y), towards, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "make",
    [
        lambda m: PGD(m, 0.1, 0.04, 3, restarts=2),
        lambda m: PGD(m, 0.1, 0.04, 3, keep="best"),
        lambda m: PGD(m, 0.5, 0.2, 3, norm="l2"),
        lambda m: FGSMRS(m, 0.1),
        lambda m: FriendlyPGD(m, 0.1, 0.04, 3, tau=1),
        lambda m: MIM(m, 0.1, 0.04, 3),
        lambda m: APGD(m, 0.1, 5, restarts=2),
        lambda m: APGD(m, 3.0, 5, norm="l1"),
    ],
)
def test_one_hot_labels_are_the_classes(make: Any) -> None:
    attack, (x, y) = make(make_model(0, DOUBLE)), batch()
    hard = y.argmax(1)
    one_hot = torch.nn.functional.one_hot(hard, 4).to(DOUBLE)
    expected = attack(x, hard, seed=1)
    assert torch.allclose(attack(x, one_hot, seed=1), expected, rtol=0, atol=1e-12)
    assert not torch.allclose(attack(x, 0.5 * one_hot + 0.5 * one_hot.flip(0), seed=1), expected)


def test_a_callable_gets_the_soft_labels() -> None:
    model, (x, y) = make_model(), batch(torch.float32)

    def squares(logits: Tensor, labels: Tensor) -> Tensor:
        return (logits - labels).square().sum(1)

    adv = fastadv.pgd_fused(model, x, y, eps=0.1, alpha=0.04, steps=3, loss=squares, seed=0)
    with torch.no_grad():
        rise = squares(model.eval()(adv), y) - squares(model(x), y)
    assert float(rise.min()) > 0
    assert adv.dtype == torch.float32
    half = fastadv.pgd_fused(model, x, y.half(), eps=0.1, steps=2, seed=0)
    full = fastadv.pgd_fused(model, x, y.half().float(), eps=0.1, steps=2, seed=0)
    assert torch.equal(half, full)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda m: PGD(m, loss="cw"), r"y must hold class indices \[B\] with loss 'cw', got soft"),
        (lambda m: FGSM(m, loss="dlr"), "with loss 'dlr', got soft labels of shape"),
        (lambda m: CW(m), "with loss 'cw'"),
        (lambda m: APGD(m, steps=2, loss="dlr"), "with loss 'dlr'"),
        (lambda m: APGD(m, steps=2, loss="ce-t"), "with loss 'ce-t'"),
        (lambda m: CWL2(m), "for CWL2"),
        (lambda m: FAB(m), "for FAB"),
        (lambda m: Square(m), "for Square"),
    ],
)
def test_others_refuse_soft_labels(make: Any, words: str) -> None:
    x, y = batch(torch.float32)
    with pytest.raises(ValueError, match=words):
        make(make_model())(x, y)


def test_labels_that_are_no_probabilities_are_named() -> None:
    model, (x, y) = make_model(), batch(torch.float32)
    for labels, words in (
        (y[:, :3] / y[:, :3].sum(1, keepdim=True), r"shape \(8, 4\), a probability of each"),
        (2 * y, "add up to 1 in each row"),
        (y - 0.5 * torch.eye(4).repeat(2, 1), "smallest one of -"),
        (y * torch.nan, "must hold probabilities"),
        (y[:5], r"y must have shape \(8, classes\), got \(5, 4\)"),
    ):
        with pytest.raises(ValueError, match=words):
            fastadv.pgd_fused(model, x, labels, steps=1)
    with pytest.raises(TypeError, match="y must be an int64 tensor"):
        fastadv.pgd_fused(model, x, torch.rand(8), steps=1)
    integers = torch.eye(4, dtype=torch.int64).repeat(2, 1)
    with pytest.raises(ValueError, match=r"of one-hot labels pass y.argmax\(1\)"):
        fastadv.pgd_fused(model, x, integers, steps=1)
