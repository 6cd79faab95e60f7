"""One PGD step: zero, NaN, tiny and infinite gradients, the ball, the bounds, in-place use."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from op_cases.running import places
from torch import Tensor

from fastadv.ops import backend, pgd_step, pgd_step_

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")
everywhere = pytest.mark.parametrize(("device", "name"), places("pgd_step"))
norms = pytest.mark.parametrize("norm", ["linf", "l2"])
EPS, ALPHA = 8 / 255, 2 / 255


def _images(device: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand((4, 3, 9, 11), generator=generator).to(device, dtype)


def _gradient(device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(99)
    return torch.randn((4, 3, 9, 11), generator=generator).to(device, dtype)


def _lengths(t: Tensor) -> Tensor:
    return t.double().flatten(1).norm(dim=1)


@everywhere
def test_zero_and_nan_gradients_do_not_move_in_linf(device: str, name: str) -> None:
    x = torch.full((1, 6), 0.5, device=device)
    grad = torch.tensor([[0.0, -0.0, torch.nan, 1e-45, -torch.inf, torch.inf]], device=device)
    with backend(name):
        moved = pgd_step(x, grad, x, 0.5, 0.125)
    assert moved.tolist() == [[0.5, 0.5, 0.5, 0.625, 0.375, 0.625]]


@everywhere
@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf, -torch.inf])
def test_a_sample_without_a_usable_gradient_stays_in_l2(
    device: str, name: str, value: float
) -> None:
    x, grad = _images(device), _gradient(device)
    grad[1] = 0.0
    grad[1, 0, 0, 0] = value
    with backend(name):
        moved = pgd_step(x, grad, x, 1.0, 0.25, norm="l2", bounds=(-9, 9))
    assert torch.equal(moved[1], x[1])
    torch.testing.assert_close(
        _lengths(moved - x)[[0, 2, 3]].cpu(), torch.full((3,), 0.25).double()
    )


@everywhere
@pytest.mark.parametrize("size", [1e-30, 1e-38, 1e30, 1e38])
def test_the_size_of_the_gradient_does_not_matter_in_l2(
    device: str, name: str, size: float
) -> None:
    """Squares of such gradients leave the range of float32."""
    x, grad = _images(device), _gradient(device).clamp(-2, 2)
    with backend(name):
        usual = pgd_step(x, grad, x, 1.0, 0.25, norm="l2", bounds=(-9, 9))
        scaled = pgd_step(x, grad * size, x, 1.0, 0.25, norm="l2", bounds=(-9, 9))
    torch.testing.assert_close(scaled, usual, rtol=0, atol=1e-6)
    torch.testing.assert_close(_lengths(scaled - x).cpu(), torch.full((4,), 0.25).double())


@everywhere
@norms
def test_eps_zero_returns_to_the_centre(device: str, name: str, norm: str) -> None:
    x, adv = _images(device), _images(device, seed=1)
    with backend(name):
        moved = pgd_step(adv, _gradient(device), x, 0.0, 0.1, norm=norm)
    assert torch.equal(moved, x)


@everywhere
@norms
def test_alpha_zero_only_projects(device: str, name: str, norm: str) -> None:
    x, adv = _images(device), _images(device, seed=1)
    with backend(name):
        moved = pgd_step(adv, _gradient(device), x, 9.0, 0.0, norm=norm)
    torch.testing.assert_close(moved, adv, rtol=0, atol=2e-7)


@everywhere
@norms
@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-1.0, 2.0), (0.25, 0.5), (0.5, 0.5)])
def test_many_steps_stay_in_the_ball_and_the_bounds(
    device: str, name: str, norm: str, bounds: tuple[float, float]
) -> None:
    x = _images(device).clamp(*bounds)
    adv, eps = _images(device, seed=1).clamp(*bounds), EPS if norm == "linf" else 0.5
    with backend(name):
        for i in range(5):
            adv = pgd_step(adv, _gradient(device).roll(i), x, eps, eps / 2, norm, bounds)
            assert bounds[0] <= adv.min() and adv.max() <= bounds[1]
            distance = (adv.double() - x).abs().max() if norm == "linf" else _lengths(adv - x).max()
            assert distance <= eps * (1 + 1e-6) + 6e-8  # half a unit in the last place at 1


@everywhere
def test_linf_keeps_to_the_rounded_ball_exactly(device: str, name: str) -> None:
    x = _images(device)
    with backend(name):
        adv = pgd_step(x, _gradient(device), x, EPS, 1.0, bounds=(-9, 9))
    eps = torch.tensor(EPS, device=device)
    assert torch.equal(torch.maximum(torch.minimum(adv, x + eps), x - eps), adv)
    assert torch.equal(adv > x, _gradient(device) > 0)


@everywhere
@norms
def test_numbers_per_sample_are_those_of_separate_calls(device: str, name: str, norm: str) -> None:
    x, adv, grad = _images(device), _images(device, seed=1), _gradient(device)
    eps = torch.tensor([0.0, 0.01, 0.1, 2.0], device=device)
    alpha = torch.tensor([0.1, 0.0, 0.02, 1.0], device=device)
    with backend(name):
        together = pgd_step(adv, grad, x, eps, alpha, norm)
        for i in range(4):
            one = slice(i, i + 1)
            alone = pgd_step(adv[one], grad[one], x[one], float(eps[i]), float(alpha[i]), norm)
            assert torch.equal(together[one], alone)
        single = pgd_step(adv, grad, x, eps[2], alpha[2:3], norm)
        number = pgd_step(adv, grad, x, float(eps[2]), float(alpha[2]), norm)
    # Torch divides a number by a tensor as a product with the reciprocal, so the reference may differ.
    torch.testing.assert_close(single, number, rtol=0, atol=0 if name == "native" else 1e-7)


@everywhere
@norms
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_the_float32_result_rounded(
    device: str, name: str, norm: str, dtype: torch.dtype
) -> None:
    x, adv, grad = (t(device).to(dtype) for t in (_images, _images, _gradient))
    with backend(name):
        half = pgd_step(adv, grad, x, EPS, ALPHA, norm)
        single = pgd_step(adv.float(), grad.float(), x.float(), EPS, ALPHA, norm)
    assert torch.equal(half, single.to(dtype))


@everywhere
def test_a_half_precision_gradient_steps_full_precision_images(device: str, name: str) -> None:
    x, grad = _images(device), _gradient(device)
    with backend(name):
        for dtype in (torch.bfloat16, torch.float16, torch.float64):
            moved = pgd_step(x, grad.to(dtype), x, EPS, ALPHA)
            assert moved.dtype == torch.float32
            assert torch.equal(moved, pgd_step(x, grad, x, EPS, ALPHA))


@everywhere
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_zeros_and_nans_are_counted(device: str, name: str, layout: torch.memory_format) -> None:
    grad = torch.ones((2, 3, 150, 151), device=device).contiguous(memory_format=layout)
    grad[0, 1, 3, :7] = 0.0
    grad[1, :, :, 2] = -0.0
    grad[1, 2, 149, 149:] = torch.nan
    counts = torch.tensor([100, 1000], device=device)
    adv = torch.zeros_like(grad)
    with backend(name):
        pgd_step_(adv, grad, adv.clone(), EPS, ALPHA, counts=counts)
    assert counts.tolist() == [100 + 7 + 450, 1000 + 2]


@everywhere
@norms
def test_in_place_is_the_same_step(device: str, name: str, norm: str) -> None:
    x, adv, grad = _images(device), _images(device, seed=1), _gradient(device)
    with backend(name):
        expected = pgd_step(adv, grad, x, EPS, ALPHA, norm)
        assert not torch.equal(adv, expected), "pgd_step must leave its argument alone"
        assert pgd_step_(adv, grad, x, EPS, ALPHA, norm) is adv
    assert torch.equal(adv, expected)


@everywhere
@norms
def test_the_centre_may_be_the_point_itself(device: str, name: str, norm: str) -> None:
    x, grad = _images(device), _gradient(device)
    with backend(name):
        expected = pgd_step(x, grad, x.clone(), EPS, ALPHA, norm)
        assert torch.equal(pgd_step_(x, grad, x, EPS, ALPHA, norm), expected)


@everywhere
def test_overlapping_memory_is_refused(device: str, name: str) -> None:
    overlapping = _images(device)[:1].expand(4, 3, 9, 11)
    x = _images(device)
    with backend(name), pytest.raises(RuntimeError, match="single memory location"):
        pgd_step_(overlapping, _gradient(device), x, EPS, ALPHA)


@everywhere
def test_autograd_notices_what_is_overwritten(device: str, name: str) -> None:
    x, weight = _images(device), torch.ones(4, 3, 9, 11, device=device, requires_grad=True)
    adv = x.clone()
    loss = (weight * adv).sum()  # saves adv for weight's gradient
    with backend(name):
        pgd_step_(adv, _gradient(device), x, EPS, ALPHA)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    "prepare", [torch.Tensor.detach, lambda leaf: leaf * 1, lambda leaf: leaf], ids=str
)
def test_in_place_needs_a_point_outside_the_graph(prepare: Callable[[Tensor], Tensor]) -> None:
    x = _images("cpu")
    adv = prepare(x.clone().requires_grad_())
    if not adv.requires_grad:
        pgd_step_(adv, _gradient("cpu"), x, EPS, ALPHA)
        return
    with pytest.raises(RuntimeError, match=r"adv must not require grad.*detach"):
        pgd_step_(adv, _gradient("cpu"), x, EPS, ALPHA)
    before = adv.detach().clone()
    with torch.no_grad():
        pgd_step_(adv, _gradient("cpu"), x, EPS, ALPHA)
    assert not torch.equal(adv.detach(), before)


def test_inference_mode() -> None:
    with torch.inference_mode():
        x = _images("cpu")
        adv = pgd_step_(x.clone(), _gradient("cpu"), x, EPS, ALPHA)
        assert torch.equal(adv, pgd_step(x, _gradient("cpu"), x, EPS, ALPHA))
