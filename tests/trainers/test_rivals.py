"""TLA, S2O and other rivals of the papers' tables against plain float64 versions of their losses and attacks."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from run_helpers import Interruption, assert_same_end
from run_helpers import run as resumable_run
from test_awp import updating
from test_pair_methods import ce, kl
from torch import Tensor, nn
from training_helpers import make_batch, make_method, make_model, small_recipe

from fastadv import PGD
from fastadv.attacks.curriculum import CurriculumPGD
from fastadv.ops import random_start
from fastadv.ranks import Ranks
from fastadv.trainers.method import Attacked
from fastadv.trainers.s2o import second_order_targets
from fastadv.trainers.tla import partners

pytestmark = pytest.mark.usefixtures("one_thread")
DOUBLE = torch.float64


def moved(x: Tensor) -> Tensor:
    """Images near others, as an attack may find them."""
    return (x + 0.05 * torch.sign(torch.sin(50 * x))).clamp(0, 1)


def apart(u: Tensor, v: Tensor) -> float:
    return 1 - abs(cosine(u, v))


def cosine(u: Tensor, v: Tensor) -> float:
    return float(((u * v).sum() / (u.norm() * v.norm())).detach())


@pytest.mark.parametrize("positives", ["both", "own", "class"])
def test_tla_equals_triplets_one_by_one(positives: str) -> None:
    model = make_model(0, DOUBLE).train()
    method: Any = make_method(
        "tla", model, positives=positives, weight=3.0, margin=0.4, norm_weight=0.2
    )
    batch = make_batch(dtype=DOUBLE)
    adv = moved(batch.x)
    found = method.training_loss(batch, Attacked(adv))
    clean_features, _ = method.features_and_logits(batch.x)
    adv_features, adv_logits = method.features_and_logits(adv)
    clean, anchors = clean_features.mean((2, 3)), adv_features.mean((2, 3))
    rows = partners(batch.y, batch.ids, batch.seed("positives"))
    total = 0.0
    for i, label in enumerate(batch.y.tolist()):
        others = [j for j, other in enumerate(batch.y.tolist()) if other != label]
        negative = max(others, key=lambda j: cosine(anchors[i], clean[j]))
        chosen = {"own": [i], "class": [int(rows[i])], "both": [i, int(rows[i])]}[positives]
        for p in chosen:
            hinge = apart(anchors[i], clean[p]) - apart(anchors[i], clean[negative]) + 0.4
            squares = anchors[i] ** 2 + clean[p] ** 2 + clean[negative] ** 2
            total += max(hinge, 0.0) + 0.2 * float(squares.mean())
    wanted = float(ce(adv_logits, batch.y).mean()) + 3.0 * total / len(batch.y)
    assert float(found.loss.detach()) == pytest.approx(wanted, rel=1e-10)


def test_tlas_gradient_pulls_positives_as_well_as_anchors() -> None:
    model = make_model(0, DOUBLE).train()
    method: Any = make_method("tla", model, positives="own", weight=1.0, margin=2.0)
    batch = make_batch(dtype=DOUBLE)

    def loss() -> Tensor:
        loss: Tensor = method.training_loss(batch, Attacked(moved(batch.x))).loss
        return loss

    weight: Any = dict(model.named_parameters())["conv3.weight"]
    (gradient,) = torch.autograd.grad(loss(), [weight])
    with torch.no_grad():
        place, step = (3, 2, 1, 1), 1e-6
        weight[place] += step
        above = loss()
        weight[place] -= 2 * step
        below = loss()
    assert float(gradient[place]) == pytest.approx(float(above - below) / 2e-6, rel=1e-4)


def test_tla_leaves_out_triplets_of_a_batch_with_one_class() -> None:
    model = make_model(0, DOUBLE).train()
    method: Any = make_method("tla", model)
    batch = make_batch(dtype=DOUBLE)
    batch.y.fill_(2)
    found = method.training_loss(batch, Attacked(batch.x))
    logits = model(batch.x)
    assert float(found.loss.detach()) == pytest.approx(float(ce(logits, batch.y).mean()), rel=1e-10)
    assert float(found.metrics["triplet"]) == 0


def test_partners_are_others_of_the_class_drawn_by_seed_and_id() -> None:
    y = torch.tensor([0, 1, 0, 2, 1, 0, 1, 0])
    ids = torch.arange(100, 108)
    counts = Counter(tuple(partners(y, ids, seed).tolist()) for seed in range(40))
    assert len(counts) > 10
    for rows in counts:
        assert all(y[j] == y[i] and (j != i or i == 3) for i, j in enumerate(rows))
    order = torch.tensor([5, 2, 7, 0, 1, 3, 6, 4])  # the same images in another order
    shuffled = partners(y[order], ids[order], 7)
    assert torch.equal(ids[order][shuffled], ids[partners(y, ids, 7)][order])


def slow_targets(logits: Tensor, own: float) -> Tensor:
    classes = logits.shape[1]
    moments = [
        [float(sum(row[i] * row[j] for row in logits)) for j in range(classes)]
        for i in range(classes)
    ]
    targets = torch.zeros(classes, classes, dtype=DOUBLE)
    for i in range(classes):
        largest = max(abs(m) for m in moments[i])
        shares = [0.0 if j == i else largest - abs(moments[i][j]) for j in range(classes)]
        for j in range(classes):
            targets[i, j] = own if i == j else (1 - own) * shares[j] / sum(shares)
    return targets


@pytest.mark.parametrize(("base", "weight"), [("pgd_at", None), ("trades", None), ("trades", 0.7)])
def test_s2o_equals_its_formula(base: str, weight: float | None) -> None:
    model = make_model(0, DOUBLE).train()
    method: Any = make_method("s2o", model, base=base, weight=weight, own=0.3, beta=2.5)
    batch = make_batch(dtype=DOUBLE)
    adv = moved(batch.x)
    found = method.training_loss(batch, Attacked(adv)).loss
    clean_logits, adv_logits = model(batch.x), model(adv)
    w = weight if weight is not None else {"pgd_at": 0.1, "trades": 0.3}[base]
    wanted = (1 - w) * ce(clean_logits if base == "trades" else adv_logits, batch.y)
    for logits in (clean_logits, adv_logits):
        rows = slow_targets(logits.detach(), 0.3)[batch.y]
        log_p = logits - logits.exp().sum(1, keepdim=True).log()
        terms = torch.where(rows > 0, rows * (rows.clamp_min(1e-300).log() - log_p), 0.0)
        wanted = wanted + w / 2 * terms.sum(1)
    if base == "trades":
        wanted = wanted + 2.5 * kl(clean_logits, adv_logits)
    assert float(found.detach()) == pytest.approx(float(wanted.mean().detach()), rel=1e-10)


def test_s2os_targets_sum_to_one_and_cover_two_classes() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20, 7, generator=generator)
    targets = second_order_targets(logits, 0.2, Ranks())
    assert torch.allclose(targets.sum(1), torch.ones(7)) and (targets >= 0).all()
    assert torch.allclose(targets.diagonal(), torch.full((7,), 0.2))
    two = second_order_targets(torch.tensor([[2.0, 1.0], [1.0, -3.0]]), 0.2, Ranks())
    assert torch.allclose(two.sum(1), torch.ones(2))


def test_s2os_moments_are_those_of_the_global_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(12, 5, generator=torch.Generator().manual_seed(1))

    def all_reduce(values: Tensor) -> None:
        values += logits[6:].T @ logits[6:]

    whole = second_order_targets(logits, 0.2, Ranks())
    monkeypatch.setattr("torch.distributed.all_reduce", all_reduce)
    part = second_order_targets(logits[:6], 0.2, Ranks(0, 2))
    assert torch.allclose(part, whole, rtol=1e-5)


def test_s2os_attack_starts_as_the_bases_does() -> None:
    batch = make_batch()
    starts = [
        make_method("s2o", make_model(0), base=base).start_of(batch)  # type: ignore[attr-defined]
        for base in ("pgd_at", "trades")
    ]
    assert starts[0] is None
    assert 0 < float((starts[1] - batch.x).abs().max()) < 0.01


@pytest.mark.parametrize(
    ("name", "numbers", "message"),
    [
        ("tla", {"margin": -1.0}, "margin must be >= 0"),
        ("s2o", {"own": 1.5}, "own must be in 0..1, got 1.5"),
        ("s2o", {"weight": -0.1}, "weight must be in 0..1, got -0.1"),
        ("n_fgsm", {"steps": 2}, "steps must be 1 with n_fgsm, got 2"),
        ("n_fgsm", {"random_start": False}, "random_start must be true"),
        ("n_fgsm", {"noise": 20.0}, "noise \\* eps \\+ alpha must be <= 1"),
        ("zero_grad", {"quantile": 1.5}, "quantile must be in 0..1, got 1.5"),
        ("grad_align", {"lam": -1.0}, "lam must be >= 0"),
        ("grad_align", {"compile": True}, "compile must be false"),
        ("sat", {"final_gap": 1.5}, "final_gap must be in -1..1, got 1.5"),
        ("sat", {"gap_start": 70}, "gap_start must be >= 0 and below gap_end"),
    ],
)
def test_numbers_out_of_range_are_refused(name: str, numbers: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_recipe(name, **numbers)


def test_sats_attack_stops_each_image_at_its_gap() -> None:
    model, batch = make_model(0, DOUBLE).eval(), make_batch(16, dtype=DOUBLE)
    dict(model.named_parameters())["linear.weight"].data.mul_(30)  # so that the gaps differ
    attack = CurriculumPGD(model, 0.2, 0.03, 5, precision="fp32")
    attack.gap = 0.3
    found = attack(batch.x, batch.y, seed=3, sample_ids=batch.ids)
    wanted = random_start(batch.x, 0.2, seed=3, sample_ids=batch.ids)
    moves = 0
    for i, label in enumerate(batch.y.tolist()):
        x, adv = batch.x[i : i + 1], wanted[i : i + 1].clone()
        for _ in range(5):
            leaf = adv.clone().requires_grad_()
            logits = model(leaf)
            p = (logits.exp() / logits.exp().sum())[0].detach()
            if max(float(v) for k, v in enumerate(p) if k != label) - float(p[label]) > 0.3:
                break
            (gradient,) = torch.autograd.grad(ce(logits, batch.y[i : i + 1]).sum(), leaf)
            adv = torch.min(torch.max(adv + 0.03 * gradient.sign(), x - 0.2), x + 0.2).clamp(0, 1)
            moves += 1
        wanted[i] = adv[0]
    assert torch.allclose(found, wanted, rtol=0, atol=1e-12)
    assert 0 < moves < 5 * len(batch.y)
    attack.gap = 1.0
    plain = PGD(model, 0.2, 0.03, 5, precision="fp32")
    assert torch.equal(attack(batch.x, batch.y, seed=3), plain(batch.x, batch.y, seed=3))


def test_sats_gap_grows_as_in_the_authors_script() -> None:
    recipe: Any = small_recipe("sat")
    gap, theirs = 0.0, []
    for epoch in range(100):
        gap += (0.4 - 0.0) / 40 if 30 <= epoch < 70 else 0
        theirs.append(gap)
    assert [recipe.gap_at(epoch) for epoch in range(100)] == pytest.approx(theirs, abs=1e-12)
    method: Any = make_method("sat", make_model(0), gap=-1.0, final_gap=1.0, gap_start=0, gap_end=2)
    for epoch, wanted in enumerate((0.0, 1.0, 1.0)):
        method.attack(make_batch(epoch=epoch))
        assert method.pgd.gap == wanted


def input_gradient(model: Any, x: Tensor, y: Tensor, create_graph: bool = False) -> Tensor:
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(ce(model(leaf), y).sum(), leaf, create_graph=create_graph)
    return gradient


def test_n_fgsm_steps_from_its_noise_without_clipping_to_the_ball() -> None:
    model = make_model(0, DOUBLE)
    method: Any = make_method("n_fgsm", model, noise=1.5, alpha=0.08)
    batch = make_batch(dtype=DOUBLE)
    noisy = random_start(batch.x, 0.15, seed=batch.seed("attack"), sample_ids=batch.ids)
    gradient = input_gradient(model.eval(), noisy, batch.y)
    wanted = (noisy + 0.08 * gradient.sign()).clamp(0, 1)
    found = method.attack(batch).x
    assert torch.allclose(found, wanted, rtol=0, atol=1e-12)
    assert 0.2 < float((found - batch.x).abs().max()) <= 0.23


@pytest.mark.parametrize("steps", [1, 3])
def test_zero_grad_leaves_small_gradients_alone(steps: int) -> None:
    model = make_model(0, DOUBLE)
    method: Any = make_method("zero_grad", model, quantile=0.6, alpha=0.1, steps=steps)
    batch = make_batch(dtype=DOUBLE)
    wanted = random_start(batch.x, 0.1, seed=batch.seed("attack"), sample_ids=batch.ids)
    start = wanted.clone()
    for _ in range(steps):
        gradient = input_gradient(model.eval(), wanted, batch.y)
        for row, adv, x in zip(gradient, wanted, batch.x, strict=True):
            ranked = row.abs().flatten().sort().values
            place = 0.6 * (len(ranked) - 1)
            low, high = ranked[int(place)], ranked[int(place) + 1]
            limit = low + (place - int(place)) * (high - low)
            step = torch.where(row.abs() < limit, 0.0, row.sign())
            adv.copy_(torch.min(torch.max(adv + 0.1 * step, x - 0.1), x + 0.1).clamp(0, 1))
    found = method.attack(batch).x
    assert torch.allclose(found, wanted, rtol=0, atol=1e-12)
    if steps == 1:
        assert float((found == start).double().mean()) > 0.5


def test_grad_align_equals_its_formula_and_so_do_its_gradients() -> None:
    model = make_model(0, DOUBLE).train()
    method: Any = make_method("grad_align", model, lam=3.0)
    batch = make_batch(dtype=DOUBLE)
    batch.x[2] = 0.5
    found = method.training_loss(batch, Attacked(moved(batch.x)))
    nowhere = torch.zeros_like(batch.x)
    u = random_start(nowhere, 0.1, "linf", (-1, 1), batch.seed("alignment"), sample_ids=batch.ids)
    near = batch.x + u
    assert float(near.min()) < 0 and float(near.max()) > 1  # the paper does not clip it
    loss = ce(model(moved(batch.x)), batch.y).mean()
    here = input_gradient(model, batch.x, batch.y)
    there = input_gradient(model, near, batch.y, create_graph=True)
    cosines = [
        (u * v).sum() / (u.square().sum().sqrt() * v.square().sum().sqrt())
        for u, v in zip(here, there, strict=True)
    ]
    wanted = loss + 3.0 * (1 - torch.stack(cosines).mean())
    assert float(found.loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-9)
    weights = list(model.parameters())
    for ours, slow in zip(
        torch.autograd.grad(found.loss, weights), torch.autograd.grad(wanted, weights), strict=True
    ):
        assert torch.allclose(ours, slow, rtol=1e-7, atol=1e-10)


def test_grad_align_moves_statistics_three_times_and_takes_awp() -> None:
    model = make_model(0)
    method: Any = make_method("grad_align", model, awp_gamma=0.1, steps=1)
    method.train_mode()
    before = int(dict(model.named_buffers())["bn1.num_batches_tracked"])
    weights = [p.detach().clone() for p in model.parameters()]
    method.step(make_batch(), updating(method))
    after = int(dict(model.named_buffers())["bn1.num_batches_tracked"])
    assert after - before == method.bn_updates == 3
    assert all(not torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert (method.passes(0), make_method("grad_align", model, steps=1).passes(0)) == (24, 13)


def test_grad_align_leaves_out_images_without_a_gradient() -> None:
    model = make_model(0, DOUBLE).train()
    method: Any = make_method("grad_align", model, lam=3.0)
    batch, given = make_batch(dtype=DOUBLE), method._input_gradient

    def with_a_zero(x: Tensor, y: Tensor, keep: bool) -> Tensor:
        rows = torch.ones(len(y), 1, dtype=DOUBLE)
        rows[0] = 0
        gradient: Tensor = given(x, y, keep) * rows
        return gradient

    whole = method.training_loss(batch, Attacked(batch.x)).metrics["misalignment"]
    method._input_gradient = with_a_zero
    found = method.training_loss(batch, Attacked(batch.x))
    found.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert float(found.metrics["misalignment"]) != pytest.approx(float(whole))
    assert 0 < float(found.metrics["misalignment"]) < 2


def test_dm_at_is_trades_with_smoothed_labels() -> None:
    model = make_model(0, DOUBLE).train()
    method: Any = make_method("dm_at", model, label_smoothing=0.2, beta=2.0)
    batch = make_batch(dtype=DOUBLE)
    adv = moved(batch.x)
    found = method.training_loss(batch, Attacked(adv)).loss
    clean_logits, adv_logits = model(batch.x), model(adv)
    log_p = clean_logits - clean_logits.exp().sum(1, keepdim=True).log()
    smooth = 0.8 * ce(clean_logits, batch.y) - 0.2 * log_p.mean(1)
    wanted = (smooth + 2.0 * kl(clean_logits, adv_logits)).mean()
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=1e-10)


def test_grad_aligns_mean_is_over_the_global_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    def parts(count: int) -> list[Tensor]:
        torch.manual_seed(0)
        model = _Gate().double()
        method: Any = make_method("grad_align", model, lam=3.0, steps=1)
        batch = make_batch(dtype=DOUBLE)
        batch.x[:3] = 0.0
        found = []
        for rank in range(count):
            rows = slice(8 // count * rank, 8 // count * (rank + 1))
            part = replace(batch, x=batch.x[rows], y=batch.y[rows], ids=batch.ids[rows])
            method.runtime = replace(method.runtime, ranks=Ranks(rank, count))
            found.append(method.training_loss(part, Attacked(part.x)).metrics["misalignment"])
        return found

    def all_reduce(present: Tensor) -> None:
        present.fill_(5)

    (whole,) = parts(1)
    monkeypatch.setattr("torch.distributed.all_reduce", all_reduce)
    first, second = parts(2)
    assert float(whole) > 0
    torch.testing.assert_close((first + second) / 2, whole)


class _Gate(nn.Module):
    """Logits that do not move with an image that is dark."""

    def __init__(self) -> None:
        super().__init__()
        self.body = make_model(0)

    def forward(self, x: Tensor) -> Tensor:
        bright = (x.detach().flatten(1).mean(1) > 0.3)[:, None]
        return torch.where(bright, self.body.eval()(x), 0.0)


@pytest.mark.parametrize(
    "name", ["tla", "s2o", "sat", "rst", "n_fgsm", "grad_align", "zero_grad", "dm_at"]
)
def test_a_resumed_run_ends_bit_for_bit(name: str, tmp_path: Path) -> None:
    resumable_run(name, tmp_path / "whole")
    with pytest.raises(Interruption):
        resumable_run(name, tmp_path / "cut", 3)
    resumable_run(name, tmp_path / "cut", resume=True)
    assert_same_end(tmp_path / "whole", tmp_path / "cut")
