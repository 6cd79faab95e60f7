"""Losses on logits: extreme logits, special rows, who gets a gradient, and torch's own losses as witnesses."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from op_cases import CASES
from op_cases.running import places
from torch import Tensor

from fastadv import backend, losses
from fastadv.ops.softmax_formulas import KINDS
from fastadv.ops.softmax_losses import softmax_losses

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")
everywhere = pytest.mark.parametrize(("device", "name"), places("softmax_losses"))
kinds = pytest.mark.parametrize("kind", list(KINDS))


def test_every_kind_has_cases() -> None:
    found = {
        CASES[name].arguments.keywords["kind"]
        for name in CASES
        if name.startswith("softmax_losses/")
    }
    assert found == set(KINDS)


def _logits(device: str, *shape: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def _labels(device: str, batch: int, classes: int) -> Tensor:
    generator = torch.Generator().manual_seed(9)
    return torch.randint(0, classes, (batch,), generator=generator).to(device)


def _values_and_gradients(
    kind: str, a: Tensor, b: Tensor, y: Tensor, weight: float = 1.0
) -> tuple[Tensor, list[Tensor]]:
    leaves = [
        t.detach().clone().requires_grad_() for t in ((a, b) if KINDS[kind].takes_other else (a,))
    ]
    labels = y if KINDS[kind].takes_labels else None
    values = softmax_losses(kind, *leaves, y=labels, weight=weight, reduction="none")
    return values.detach(), list(torch.autograd.grad(values.sum(), leaves))


@everywhere
@kinds
def test_any_finite_logits_give_finite_values_and_gradients(
    device: str, name: str, kind: str
) -> None:
    rows = [
        [200.0, 0, 0],
        [1.0, 0, 0],
        [0, 0, 0],
        [-1e4, 1e4, 0],
        [3e38, -3e38, -3e38],
        [-3e38] * 3,
    ]
    a = torch.tensor([p for p in rows for _ in rows], device=device)
    b = torch.tensor([q for _ in rows for q in rows], device=device)
    with backend(name):
        for label in range(3):
            y = torch.full((len(a),), label, device=device)
            # The squares of pairs this far apart have no finite value.
            keep = (a - b).abs().amax(1) < 1e18 if kind == "alp" else slice(None)
            values, gradients = _values_and_gradients(kind, a[keep], b[keep], y[keep])
            if kind == "cw":  # a margin of 6e38 has no finite value either
                values = values[values.abs() < math.inf]
                assert len(values) >= 24
            if kind != "dlr":
                assert values.isfinite().all()
            for gradient in gradients:
                assert kind == "dlr" or gradient.isfinite().all()


@everywhere
@kinds
def test_the_error_does_not_grow_with_the_number_of_classes(
    device: str, name: str, kind: str
) -> None:
    """Sums of equal terms round the same way each time, which naive float32 sums do not survive."""
    classes = 50_001
    a = 1e4 * _logits(device, 2, classes).sign().clamp(min=0)
    b = 1e4 * _logits(device, 2, classes, seed=1).sign().clamp(min=0)
    y = _labels(device, 2, classes)
    with backend(name):
        values, gradients = _values_and_gradients(kind, a, b, y)
    with backend("reference"):
        true, true_gradients = _values_and_gradients(
            kind, a.double().cpu(), b.double().cpu(), y.cpu()
        )
    torch.testing.assert_close(values.double().cpu(), true, rtol=2e-6, atol=2e-6)
    for found, expected in zip(gradients, true_gradients, strict=True):
        allowed = 2e-6 * float(expected.abs().max())
        torch.testing.assert_close(found.double().cpu(), expected, rtol=0, atol=allowed)


@everywhere
def test_the_case_in_which_kl_div_has_no_gradient(device: str, name: str) -> None:
    p = torch.tensor([[200.0, 0, 0]], device=device, requires_grad=True)
    q = torch.tensor([[1.0, 0, 0]], device=device, requires_grad=True)
    with backend(name):
        losses.kl(p, q).backward()
    wanted = torch.softmax(q.detach(), 1) - torch.tensor([[1.0, 0, 0]], device=device)
    torch.testing.assert_close(q.grad, wanted)
    assert p.grad.tolist() == [[0, 0, 0]]


@everywhere
def test_torch_agrees(device: str, name: str) -> None:
    a, b = _logits(device, 16, 10), _logits(device, 16, 10, seed=1)
    y = _labels(device, 16, 10)
    with backend(name):
        ours = [
            losses.cross_entropy(a, y),
            losses.cross_entropy(a, y, label_smoothing=0.1),
            losses.kl(a, b),
            losses.kd(b, a, 4.0),
            losses.trades(a, b, y, 6.0),
            losses.cw(a, y),
        ]
    log_a, log_b = F.log_softmax(a, 1), F.log_softmax(b, 1)
    divergence = F.kl_div(log_b, log_a, log_target=True, reduction="batchmean")
    soft = F.kl_div(
        F.log_softmax(b / 4, 1), F.log_softmax(a / 4, 1), log_target=True, reduction="batchmean"
    )
    theirs = [
        F.cross_entropy(a, y),
        F.cross_entropy(a, y, label_smoothing=0.1),
        divergence,
        16 * soft,
        F.cross_entropy(a, y) + 6 * divergence,
        (a.scatter(1, y[:, None], -torch.inf).amax(1) - a.gather(1, y[:, None])[:, 0]).mean(),
    ]
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


@everywhere
@kinds
@pytest.mark.parametrize("places_after_the_label", [0, 1])
def test_a_nan_logit_shows_in_its_own_sample(
    device: str, name: str, kind: str, places_after_the_label: int
) -> None:
    a, b, y = _logits(device, 4, 7), _logits(device, 4, 7, seed=1), _labels(device, 4, 7)
    a[1, (y[1] + places_after_the_label) % 7] = torch.nan
    with backend(name):
        values, gradients = _values_and_gradients(kind, a, b, y)
    assert values.isnan().view(4, -1).any(1).tolist() == [False, True, False, False]
    assert gradients[0].isnan().any(1).tolist() == [False, True, False, False]


@everywhere
@kinds
def test_half_precision_is_computed_in_float32(device: str, name: str, kind: str) -> None:
    a, b, y = _logits(device, 4, 7), _logits(device, 4, 7, seed=1), _labels(device, 4, 7)
    with backend(name):
        for dtype in (torch.bfloat16, torch.float16):
            narrow, gradients = _values_and_gradients(kind, a.to(dtype), b.to(dtype), y)
            wide, wide_gradients = _values_and_gradients(
                kind, a.to(dtype).float(), b.to(dtype).float(), y
            )
            assert narrow.dtype == torch.float32  # a GPU may add in another order
            torch.testing.assert_close(narrow, wide, rtol=1e-6, atol=1e-6)
            for gradient, wide_gradient in zip(gradients, wide_gradients, strict=True):
                assert gradient.dtype == dtype
                torch.testing.assert_close(gradient, wide_gradient.to(dtype))


@everywhere
@pytest.mark.parametrize("kind", [name for name, kind in KINDS.items() if kind.takes_other])
def test_logits_of_two_dtypes(device: str, name: str, kind: str) -> None:
    a, b, y = _logits(device, 4, 7), _logits(device, 4, 7, seed=1).bfloat16(), _labels(device, 4, 7)
    with backend(name):
        values, gradients = _values_and_gradients(kind, a, b, y)
        wide, _ = _values_and_gradients(kind, a, b.float(), y)
    torch.testing.assert_close(values, wide)
    assert [g.dtype for g in gradients] == [torch.float32, torch.bfloat16]


@everywhere
@kinds
def test_the_mean_is_the_mean(device: str, name: str, kind: str) -> None:
    a, b, y = _logits(device, 40, 7), _logits(device, 40, 7, seed=1), _labels(device, 40, 7)
    known = KINDS[kind]
    arguments = ((a, b if known.takes_other else None), y if known.takes_labels else None)
    with backend(name):
        each = softmax_losses(kind, *arguments[0], arguments[1], weight=0.7, reduction="none")
        mean = softmax_losses(kind, *arguments[0], arguments[1], weight=0.7)
    assert each.shape == (40, *known.per_sample)
    torch.testing.assert_close(mean, each.mean(0))


@everywhere
def test_mart_tells_how_little_a_sure_model_doubts(device: str, name: str) -> None:
    """1 - p_y, here 3e-8, is nothing in float32 where it is the difference of the two."""
    a = torch.tensor([[18.0, 0, 0]], device=device)
    b, y = torch.tensor([[0, 5.0, 0]], device=device), torch.zeros(1, dtype=torch.int64)
    with backend(name):
        doubted = losses.mart(a, b, y.to(device), 1e9) - losses.mart(a, b, y.to(device), 0.0)
    p, q = torch.softmax(a.double().cpu(), 1), torch.softmax(b.double().cpu(), 1)
    expected = 1e9 * (p * (p.log() - q.log())).sum() * p[0, 1:].sum()
    torch.testing.assert_close(doubted.double().cpu(), expected, rtol=1e-4, atol=0)


@everywhere
def test_act_teaches_each_model_by_the_other(device: str, name: str) -> None:
    """Each loss has a gradient in its own model alone, so that one backward pass serves both."""
    robust, natural = (_logits(device, 5, 6, seed=s).requires_grad_() for s in (0, 1))
    y = _labels(device, 5, 6)
    with backend(name):
        pair = losses.act(robust, natural, y, 0.9, 4.0)
        first = torch.autograd.grad(pair.robust, [robust, natural], retain_graph=True)
        second = torch.autograd.grad(pair.natural, [robust, natural], retain_graph=True)
        both = torch.autograd.grad(pair.robust + pair.natural, [robust, natural])
        swapped = losses.act(natural, robust, y, 0.9, 4.0)
    assert not first[1].any() and not second[0].any()
    torch.testing.assert_close(both, (first[0], second[1]))
    torch.testing.assert_close(swapped, losses.ActLosses(pair.natural, pair.robust))
    plain = robust.detach().clone().requires_grad_()
    loss = 0.1 * F.cross_entropy(plain, y) + 0.9 * losses.kd(plain, natural, 4.0)
    (expected,) = torch.autograd.grad(loss, plain)
    torch.testing.assert_close(first[0], expected)


@everywhere
def test_equal_predictions_do_not_diverge(device: str, name: str) -> None:
    a = _logits(device, 8, 10)
    with backend(name):
        values, gradients = _values_and_gradients("kl", a, a.clone(), a)
    assert float(values.abs().max()) < 1e-6
    assert all(float(g.abs().max()) < 1e-6 for g in gradients)


@everywhere
def test_of_equal_logits_the_first_counts(device: str, name: str) -> None:
    z = torch.tensor([[1.0, 1.0, 1.0, 0.0]], device=device)
    with backend(name):
        for label, best in ((0, 1), (1, 0), (3, 0)):
            y = torch.tensor([label], device=device)
            _, (gradient,) = _values_and_gradients("cw", z, z, y)
            wanted = torch.zeros(4)
            wanted[best], wanted[label] = 1, -1
            assert gradient[0].tolist() == wanted.tolist()


@everywhere
def test_dlr_does_not_see_the_scale(device: str, name: str) -> None:
    a, y = _logits(device, 9, 10), _labels(device, 9, 10)
    with backend(name):
        torch.testing.assert_close(losses.dlr(a, y), losses.dlr(64 * a, y))


def test_boosted_cross_entropy_of_a_lost_sample() -> None:
    """q_j rounds to 1: the published form needs a constant there, log space does not."""
    z = torch.tensor([[0.0, 60.0, 1.0]], requires_grad=True)
    value = losses.boosted_cross_entropy(z, torch.tensor([0]))
    value.backward()
    rest = math.log1p(math.e)
    assert value.item() == pytest.approx(60 + (60 - rest), rel=1e-6)
    share = torch.softmax(torch.tensor([0.0, 1.0]), 0)
    torch.testing.assert_close(z.grad, torch.tensor([[-1 - share[0], 2.0, -share[1]]]))


def test_hat_and_lbgat_are_made_of_their_parts() -> None:
    clean, adv, helper = (_logits("cpu", 6, 5, seed=s) for s in range(3))
    y, helper_y = _labels("cpu", 6, 5), _labels("cpu", 6, 5).flip(0)
    hat = losses.hat(clean, adv, helper, y, helper_y, 2.5, 0.5)
    torch.testing.assert_close(
        hat, losses.trades(clean, adv, y, 2.5) + 0.5 * F.cross_entropy(helper, helper_y)
    )
    lbgat = losses.lbgat(adv, clean, y, helper, 2.0)
    torch.testing.assert_close(
        lbgat, F.mse_loss(adv, clean) + F.cross_entropy(clean, y) + 2 * losses.kl(helper, adv)
    )
    with pytest.raises(ValueError, match="clean_logits"):
        losses.lbgat(adv, clean, y, beta=1.0)
    with pytest.raises(ValueError, match="gamma"):
        losses.hat(clean, adv, helper, y, helper_y, gamma=-1.0)


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda a, b, y: losses.act(a, b, y, 1.5), "alpha"),
        (lambda a, b, y: losses.act(a, b[:1], y), "natural_logits"),
        (lambda a, b, y: losses.act(a, b, y, temperature=0), "temperature"),
        (lambda a, b, y: losses.cross_entropy(a, y, label_smoothing=1.5), "label_smoothing"),
        (lambda a, b, y: losses.kd(a, b[:, :2]), "student_logits"),
    ],
)
def test_bad_arguments_of_the_composed_losses(call: object, argument: str) -> None:
    a, y = _logits("cpu", 4, 5), _labels("cpu", 4, 5)
    with pytest.raises(ValueError, match=argument):
        call(a, a.clone(), y)


def test_gradients_without_autograd() -> None:
    """The raw op hands them out, for loops that keep their own."""
    a, y = _logits("cpu", 6, 10), _labels("cpu", 6, 10)
    op = torch.ops.fastadv.softmax_losses
    value, gradient, nothing = op(a, None, y, "cross_entropy", 0.0, 1.0, True, True, False)
    leaf = a.clone().requires_grad_()
    loss = F.cross_entropy(leaf, y)
    loss.backward()
    torch.testing.assert_close(value, loss.detach())
    torch.testing.assert_close(gradient, leaf.grad)
    assert nothing.shape == (6, 0)
    assert op(a, None, y, "cross_entropy", 0.0, 1.0, True, False, False)[1].shape == (6, 0)


def test_a_saved_gradient_is_overwritten_only_where_nobody_sees_it_again() -> None:
    """Large gradients alone: for small ones the memory that is spared is not worth the calls."""
    a, y, slopes = _logits("cpu", 256, 600), _labels("cpu", 256, 600), torch.rand(256)
    leaf, saved = a.requires_grad_(), set()

    def pack(tensor: Tensor) -> Tensor:
        saved.add(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = losses.cross_entropy(leaf, y, reduction="none")
    (first,) = torch.autograd.grad(loss, leaf, slopes, retain_graph=True)
    (second,) = torch.autograd.grad(loss, leaf, slopes)
    assert first.data_ptr() not in saved and second.data_ptr() in saved
    assert torch.equal(first, second)

    op = torch.ops.fastadv.softmax_losses
    loss, gradient, _ = op(leaf, None, y, "cross_entropy", 0.0, 1.0, False, True, False)
    (third,) = torch.autograd.grad(loss, leaf, slopes)
    assert torch.equal(third, first) and torch.equal(third, slopes[:, None] * gradient)


def test_a_saved_gradient_is_handed_out_only_at_the_end() -> None:
    """`loss.backward()` begins with 1: the gradient needs no scaling, but the graph may need it again."""
    leaf, y = _logits("cpu", 6, 10).requires_grad_(), _labels("cpu", 6, 10)
    (expected,) = torch.autograd.grad(F.cross_entropy(leaf, y), leaf)
    loss = losses.cross_entropy(leaf, y)
    (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    torch.testing.assert_close(first, expected)
    first.zero_()
    (doubled,) = torch.autograd.grad(loss, leaf, torch.tensor(2.0), retain_graph=True)
    torch.testing.assert_close(doubled, 2 * expected)
    (last,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(last, expected)


def test_gradients_per_sample_by_torch_func() -> None:
    a, b, y = _logits("cpu", 6, 10), _logits("cpu", 6, 10, seed=1), _labels("cpu", 6, 10)

    def loss(clean: Tensor, adv: Tensor, label: Tensor) -> Tensor:
        return losses.trades(clean[None], adv[None], label[None], 6.0)

    found = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)))(a, b, y)
    leaves = [a.clone().requires_grad_(), b.clone().requires_grad_()]
    values = losses.trades(*leaves, y, 6.0, reduction="none")
    torch.testing.assert_close(found, torch.autograd.grad(values.sum(), leaves))


@pytest.mark.parametrize("name", ["native", "reference"])
@pytest.mark.parametrize("kind", [name for name, kind in KINDS.items() if kind.takes_labels])
@pytest.mark.parametrize("label", [-1, 4, 1000])
def test_a_label_that_is_no_class_is_named(kind: str, name: str, label: int) -> None:
    a, y = _logits("cpu", 3, 4), torch.tensor([0, label, 1])
    with (
        backend(name),
        pytest.raises(IndexError, match=f"y must lie in 0 .. 3, got {label} at sample 1"),
    ):
        softmax_losses(kind, a, *((a,) if KINDS[kind].takes_other else ()), y=y)
