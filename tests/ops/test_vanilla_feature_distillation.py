"""Vanilla feature distillation: known values, special features, which gradients there are."""

from __future__ import annotations

import math

import pytest
import torch
from op_cases.running import places
from torch import Tensor

from fastadv.ops import backend, euclidean_distance, vanilla_feature_distillation

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")
everywhere = pytest.mark.parametrize(("device", "name"), places("vanilla_feature_distillation"))


def _features(device: str, *shape: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    adv, clean, vanilla = torch.randn((3, *shape), generator=generator).to(device).unbind()
    return adv.clone(), clean.clone(), vanilla.clone()


@everywhere
def test_known_values(device: str, name: str) -> None:
    adv = torch.tensor([[3.0, 4.0], [1.0, 0.0]], device=device)
    clean = torch.tensor([[0.0, 2.0], [1.0, 0.0]], device=device)
    vanilla = torch.tensor([[0.0, 0.0], [0.0, 0.0]], device=device)
    with backend(name):
        each = vanilla_feature_distillation(adv, clean, vanilla, reduction="none")
        mean = vanilla_feature_distillation(adv, clean, vanilla)
    assert each.tolist() == pytest.approx([7.0, 2.0])
    assert mean.shape == () and mean.item() == pytest.approx(4.5)


@everywhere
def test_it_is_the_sum_of_two_distances(device: str, name: str) -> None:
    adv, clean, vanilla = _features(device, 6, 3, 5, 7)
    adv.requires_grad_()
    clean.requires_grad_()
    with backend(name):
        loss = vanilla_feature_distillation(adv, clean, vanilla)
        parts = [euclidean_distance(f, vanilla).mean() for f in (adv, clean)]
        gradients = torch.autograd.grad(loss, (adv, clean))
        expected = torch.autograd.grad(sum(parts), (adv, clean))
    torch.testing.assert_close(loss, sum(parts))
    for gradient, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, wanted)


@everywhere
def test_equal_and_zero_features(device: str, name: str) -> None:
    adv, clean, vanilla = _features(device, 4, 9)
    adv[0], clean[1] = vanilla[0], vanilla[1]
    adv[2], clean[2], vanilla[2] = 0, 0, 0
    adv.requires_grad_()
    clean.requires_grad_()
    with backend(name):
        each = vanilla_feature_distillation(adv, clean, vanilla, reduction="none")
        each.sum().backward()
    assert each[2] == 0 and each[[0, 1, 3]].min() > 0
    assert adv.grad.any(1).tolist() == [False, True, False, True]
    assert clean.grad.any(1).tolist() == [True, False, False, True]


@everywhere
@pytest.mark.parametrize("where", [0, 1, 2], ids=["adv", "clean", "vanilla"])
def test_a_nan_feature_shows_in_its_sample_alone(device: str, name: str, where: int) -> None:
    features = _features(device, 3, 9)
    features[where][1, 4] = torch.nan
    adv, clean = (f.requires_grad_() for f in features[:2])
    with backend(name):
        each = vanilla_feature_distillation(*features, reduction="none")
        each.sum().backward()
    assert each.isnan().tolist() == [False, True, False]
    for index, gradient in enumerate((adv.grad, clean.grad)):
        concerned = where in (index, 2)
        assert gradient.isnan().any(1).tolist() == [False, concerned, False]


@everywhere
def test_what_leaves_the_range(device: str, name: str) -> None:
    """As in the Euclidean distance; one norm out of range leaves the other's gradient alone."""
    adv = torch.tensor([[1e-25, 0.0], [1e25, 0.0]], device=device, requires_grad=True)
    clean = torch.tensor([[3.0, 4.0], [3.0, 4.0]], device=device, requires_grad=True)
    with backend(name):
        each = vanilla_feature_distillation(
            adv, clean, torch.zeros_like(adv).detach(), reduction="none"
        )
        each.sum().backward()
    assert each.tolist() == [5.0, math.inf]
    assert not adv.grad.any()
    torch.testing.assert_close(clean.grad, torch.tensor([[0.6, 0.8]] * 2, device=device))


@everywhere
@pytest.mark.parametrize("magnitude", [1e-15, 1e15])
def test_magnitudes_within_the_range(device: str, name: str, magnitude: float) -> None:
    features = _features(device, 3, 9)
    with backend(name):
        plain = vanilla_feature_distillation(*features)
        scaled = vanilla_feature_distillation(*(f * magnitude for f in features))
    torch.testing.assert_close(scaled, plain * magnitude, rtol=1e-5, atol=0)


@everywhere
def test_dtypes_and_layouts_of_the_three_may_differ(device: str, name: str) -> None:
    adv, clean, vanilla = _features(device, 2, 8, 5, 5)
    adv = adv.to(torch.bfloat16).to(memory_format=torch.channels_last).requires_grad_()
    clean = clean.requires_grad_()
    vanilla = vanilla.to(torch.float16)
    with backend(name):
        loss = vanilla_feature_distillation(adv, clean, vanilla)
        loss.backward()
    wide = [f.detach().double().requires_grad_() for f in (adv, clean)]
    exact = sum((f - vanilla.double()).flatten(1).norm(dim=1).mean() for f in wide)
    exact.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)
    for f, other in zip((adv, clean), wide, strict=True):
        assert f.grad.dtype == f.dtype and f.grad.stride() == f.stride()
        torch.testing.assert_close(f.grad, other.grad.to(f.dtype))


@everywhere
def test_one_float64_makes_all_float64(device: str, name: str) -> None:
    adv, clean, vanilla = _features(device, 2, 70)
    clean = clean.double().requires_grad_()
    adv.requires_grad_()
    with backend(name):
        loss = vanilla_feature_distillation(adv, clean, vanilla)
        only_adv = torch.autograd.grad(loss, adv, retain_graph=True)[0]
        loss.backward()
    exact = sum((f.detach().double() - vanilla).norm(dim=1).mean() for f in (adv, clean))
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, exact, rtol=1e-13, atol=0)
    assert adv.grad.dtype == torch.float32 and clean.grad.dtype == torch.float64
    torch.testing.assert_close(only_adv, adv.grad)


@everywhere
def test_a_gradient_that_nobody_asks_for_is_not_computed(device: str, name: str) -> None:
    """Not even its features are read: NaN in them does not reach the other gradient."""
    adv, clean, vanilla = _features(device, 3, 9)
    backward = torch.ops.fastadv.vanilla_feature_distillation_backward
    with backend(name):
        _, norms = torch.ops.fastadv.vanilla_feature_distillation(adv, clean, vanilla)
        grad, nothing = torch.ones_like(norms[:, 0]), torch.full_like(adv, torch.nan)
        both = backward(grad, adv, clean, vanilla, norms, True, True)
        of_adv, empty = backward(grad, adv, nothing, vanilla, norms, True, False)
        assert empty.numel() == 0 and torch.equal(of_adv, both[0])
        empty, of_clean = backward(grad, nothing, clean, vanilla, norms, False, True)
        assert empty.numel() == 0 and torch.equal(of_clean, both[1])


def test_no_gradient_reaches_the_vanilla_features() -> None:
    features = [f.requires_grad_() for f in _features("cpu", 3, 9)]
    vanilla_feature_distillation(*features).backward()
    assert features[0].grad is not None and features[1].grad is not None
    assert features[2].grad is None


def test_the_mean_of_no_samples_is_nan() -> None:
    nothing = torch.zeros(0, 4, 2, 2)
    assert vanilla_feature_distillation(nothing, nothing, nothing).isnan()
    assert vanilla_feature_distillation(nothing, nothing, nothing, reduction="none").shape == (0,)


def test_gradients_too_large_for_the_caches() -> None:
    """From 16 MB on the CPU kernel writes past the caches."""
    features = _features("cpu", 3, 1_000_001)
    loss, norms = torch.ops.fastadv.vanilla_feature_distillation(*features)
    backward = torch.ops.fastadv.vanilla_feature_distillation_backward
    gradients = backward(torch.ones_like(loss), *features, norms, True, True)
    for gradient, f, norm in zip(gradients, features, norms.unbind(1), strict=False):
        torch.testing.assert_close(gradient, (f - features[2]) / norm[:, None])
