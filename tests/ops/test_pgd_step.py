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
norms = pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
by_length = pytest.mark.parametrize("norm", ["l2", "l1"])  # a whole sample's step has a length
EPS, ALPHA = 8 / 255, 2 / 255


def images(device: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand((4, 3, 9, 11), generator=generator).to(device, dtype)


def gradient(device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(99)
    return torch.randn((4, 3, 9, 11), generator=generator).to(device, dtype)


def lengths(t: Tensor, norm: str) -> Tensor:
    order = {"linf": torch.inf, "l2": 2, "l1": 1}[norm]
    return torch.linalg.vector_norm(t.double().flatten(1), order, dim=1).cpu()


@everywhere
def test_zero_and_nan_gradients_do_not_move_in_linf(device: str, name: str) -> None:
    x = torch.full((1, 6), 0.5, device=device)
    grad = torch.tensor([[0.0, -0.0, torch.nan, 1e-45, -torch.inf, torch.inf]], device=device)
    with backend(name):
        moved = pgd_step(x, grad, x, 0.5, 0.125)
    assert moved.tolist() == [[0.5, 0.5, 0.5, 0.625, 0.375, 0.625]]


@pytest.mark.interpreter(
    when=lambda given: (
        given["dtype"] == torch.float32 and (given["norm"] == "l2" or given["value"] == torch.inf)
    )
)
@everywhere
@by_length
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf, -torch.inf])
def test_a_sample_without_a_usable_gradient_stays(
    device: str, name: str, norm: str, dtype: torch.dtype, value: float
) -> None:
    """In the ball, that is: outside, it is projected all the same."""
    x, grad = images(device), gradient(device).to(dtype)
    grad[1] *= value != 0
    grad[1, 0, 0, 0] = value
    far = images(device, seed=1)
    with backend(name):
        moved = pgd_step(x, grad, x, 1.0, 0.25, norm=norm, bounds=(-9, 9))
        projected = pgd_step(far, grad, x, 1.0, 0.25, norm=norm)
        only_projected = pgd_step(far, grad, x, 1.0, 0.0, norm=norm)
    assert torch.equal(moved[1], x[1])
    moved_by = lengths(moved - x, norm)[[0, 2, 3]]
    torch.testing.assert_close(moved_by, torch.full((3,), 0.25).double(), rtol=1e-5, atol=0)
    assert torch.equal(projected[1], only_projected[1])
    assert float(lengths(projected - x, norm)[1]) == pytest.approx(1.0, rel=1e-4)


@everywhere
@by_length
@pytest.mark.parametrize("size", [1e-30, 1e-38, 1e30, 1e38])
def test_the_size_of_the_gradient_does_not_matter(
    device: str, name: str, norm: str, size: float
) -> None:
    """Squares of such gradients leave the range of float32."""
    x, grad = images(device), gradient(device).clamp(-2, 2)
    with backend(name):
        usual = pgd_step(x, grad, x, 1.0, 0.25, norm=norm, bounds=(-9, 9))
        scaled = pgd_step(x, grad * size, x, 1.0, 0.25, norm=norm, bounds=(-9, 9))
    torch.testing.assert_close(scaled, usual, rtol=0, atol=1e-6)
    moved_by = lengths(scaled - x, norm)
    torch.testing.assert_close(moved_by, torch.full((4,), 0.25).double(), rtol=1e-5, atol=0)


@everywhere
@by_length
@pytest.mark.parametrize("size", [1e-200, 1e200])
def test_nor_does_that_of_a_float64_gradient(
    device: str, name: str, norm: str, size: float
) -> None:
    """Squares of such gradients leave the range of float64."""
    x, grad = images(device), gradient(device).double()
    with backend(name):
        usual = pgd_step(x, grad, x, 1.0, 0.25, norm=norm)
        scaled = pgd_step(x, grad * size, x, 1.0, 0.25, norm=norm)
    torch.testing.assert_close(scaled, usual, rtol=0, atol=1e-6)


@everywhere
@norms
def test_eps_zero_returns_to_the_centre(device: str, name: str, norm: str) -> None:
    x, adv = images(device), images(device, seed=1)
    with backend(name):
        moved = pgd_step(adv, gradient(device), x, 0.0, 0.1, norm=norm)
        unmoved = pgd_step(x, torch.zeros_like(x), x, 0.0, 0.1, norm=norm)
    assert torch.equal(moved, x) and torch.equal(unmoved, x)


@everywhere
@by_length
def test_eps_zero_leaves_nothing_where_sums_are_rounded(device: str, name: str, norm: str) -> None:
    delta = torch.arange(1, 65, dtype=torch.float64, device=device)[:, None] / 65
    delta = delta.repeat(1, 1000)
    zeros = torch.zeros_like(delta)
    with backend(name):
        assert not pgd_step(delta, zeros, zeros, 0.0, 0.1, norm=norm).any()


@everywhere
@norms
def test_alpha_zero_only_projects(device: str, name: str, norm: str) -> None:
    x, adv = images(device), images(device, seed=1)
    with backend(name):
        moved = pgd_step(adv, gradient(device), x, 1e3, 0.0, norm=norm)
    torch.testing.assert_close(moved, adv, rtol=0, atol=2e-7)


@everywhere
@norms
@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-1.0, 2.0), (0.25, 0.5), (0.5, 0.5)])
def test_many_steps_stay_in_the_ball_and_the_bounds(
    device: str, name: str, norm: str, bounds: tuple[float, float]
) -> None:
    x = images(device).clamp(*bounds)
    adv = images(device, seed=1).clamp(*bounds)
    eps = {"linf": EPS, "l2": 0.5, "l1": 4.0}[norm]
    rounding = 3e-8 * (x[0].numel() if norm == "l1" else 1)  # half a unit in the last place below 1
    with backend(name):
        for i in range(5):
            adv = pgd_step(adv, gradient(device).roll(i), x, eps, eps / 2, norm, bounds)
            assert bounds[0] <= adv.min() and adv.max() <= bounds[1]
            distance = lengths(adv.double() - x, norm).max()
            assert distance <= eps * (1 + 1e-6) + 2 * rounding  # twice, as bounds go up to 2


@pytest.mark.interpreter
@everywhere
@norms
def test_bounds_count_more_than_the_ball(device: str, name: str, norm: str) -> None:
    """Around a centre beyond the bounds, the ball may have no point within them."""
    x = torch.tensor([1.5, -0.5, 0.5], device=device)[:, None].expand(3, 5)
    with backend(name):
        moved = pgd_step(x, torch.ones_like(x), x, 0.25, 0.125, norm, (0.0, 1.0))
    assert (moved[0] == 1.0).all() and (moved[1] == 0.0).all()
    assert 0.5 < float(moved[2].max()) <= 0.625


@everywhere
def test_linf_keeps_to_the_rounded_ball_exactly(device: str, name: str) -> None:
    x = images(device)
    with backend(name):
        adv = pgd_step(x, gradient(device), x, EPS, 1.0, bounds=(-9, 9))
    eps = torch.tensor(EPS, device=device)
    assert torch.equal(torch.maximum(torch.minimum(adv, x + eps), x - eps), adv)
    assert torch.equal(adv > x, gradient(device) > 0)


@everywhere
@norms
def test_inactive_samples_stay_whatever_their_memory_holds(
    device: str, name: str, norm: str
) -> None:
    x, adv, grad = images(device), images(device, seed=1), gradient(device)
    for t in (x, adv, grad):
        t[2] = torch.nan
    x[0], grad[0, 0] = torch.inf, 0.0
    adv[0] = 7.0  # neither projected nor clipped
    grad[1, 0, 0, :3] = 0.0
    active = torch.tensor([False, True, False, True], device=device)
    counts = torch.zeros(2, dtype=torch.int64, device=device)
    arguments = (grad, x, EPS, ALPHA, norm)
    with backend(name):
        moved = pgd_step(adv, *arguments, active=active)
        alone = pgd_step(adv[1::2], *(t[1::2] for t in arguments[:2]), *arguments[2:])
        in_place = pgd_step_(adv.clone(), *arguments, active=active, counts=counts)
    assert torch.equal(moved[[1, 3]], alone)
    assert (moved[0] == 7.0).all() and moved[2].isnan().all()
    assert torch.equal(in_place[:2], moved[:2]) and torch.equal(in_place[3], moved[3])
    assert counts.tolist() == [3, 0]


@everywhere
@norms
def test_all_active_and_none_active(device: str, name: str, norm: str) -> None:
    x, adv, grad = images(device), images(device, seed=1), gradient(device)
    everyone = torch.ones(4, dtype=torch.bool, device=device)
    with backend(name):
        usual = pgd_step(adv, grad, x, EPS, ALPHA, norm)
        assert torch.equal(pgd_step(adv, grad, x, EPS, ALPHA, norm, active=everyone), usual)
        assert torch.equal(pgd_step(adv, grad, x, EPS, ALPHA, norm, active=~everyone), adv)


@everywhere
@by_length
def test_pixels_that_are_not_finite_are_not_projected(device: str, name: str, norm: str) -> None:
    x, adv, grad = images(device), images(device, seed=1), gradient(device)
    adv[1, 0, 0, 0] = torch.nan
    with backend(name):
        moved = pgd_step(adv, grad, x, 0.1, 0.5, norm=norm)
        others = pgd_step(adv[2:], grad[2:], x[2:], 0.1, 0.5, norm=norm)
    assert moved.isnan().nonzero().tolist() == [[1, 0, 0, 0]]
    assert torch.equal(moved[2:], others)


@pytest.mark.interpreter(when=lambda given: given["norm"] == "linf")
@everywhere
@norms
def test_numbers_per_sample_are_those_of_separate_calls(device: str, name: str, norm: str) -> None:
    x, adv, grad = images(device), images(device, seed=1), gradient(device)
    eps = torch.tensor([0.0, 0.01, 0.1, 2.0], device=device)
    alpha = torch.tensor([0.1, 0.0, 0.02, 1.0], device=device)
    with backend(name):
        together = pgd_step(adv, grad, x, eps, alpha, norm)
        for i in range(4):
            one = slice(i, i + 1)
            alone = pgd_step(adv[one], grad[one], x[one], float(eps[i]), float(alpha[i]), norm)
            assert torch.equal(together[one], alone)
            one_eps = pgd_step(adv[one], grad[one], x[one], float(eps[i]), ALPHA, norm)
            assert torch.equal(pgd_step(adv, grad, x, eps, ALPHA, norm)[one], one_eps)
            one_alpha = pgd_step(adv[one], grad[one], x[one], EPS, float(alpha[i]), norm)
            assert torch.equal(pgd_step(adv, grad, x, EPS, alpha, norm)[one], one_alpha)
        single = pgd_step(adv, grad, x, eps[2], alpha[2:3], norm)
        number = pgd_step(adv, grad, x, float(eps[2]), float(alpha[2]), norm)
    assert torch.equal(single, number)


@everywhere
@norms
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_the_float32_result_rounded(
    device: str, name: str, norm: str, dtype: torch.dtype
) -> None:
    x, adv, grad = (t(device).to(dtype) for t in (images, images, gradient))
    with backend(name):
        half = pgd_step(adv, grad, x, EPS, ALPHA, norm)
        single = pgd_step(adv.float(), grad.float(), x.float(), EPS, ALPHA, norm)
    assert torch.equal(half, single.to(dtype))


@everywhere
def test_a_half_precision_gradient_steps_full_precision_images(device: str, name: str) -> None:
    x, grad = images(device), gradient(device)
    with backend(name):
        for dtype in (torch.bfloat16, torch.float16, torch.float64):
            moved = pgd_step(x, grad.to(dtype), x, EPS, ALPHA)
            assert moved.dtype == torch.float32
            assert torch.equal(moved, pgd_step(x, grad, x, EPS, ALPHA))


@everywhere
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_zeros_and_useless_elements_are_counted(device: str, name: str, layout: torch.memory_format) -> None:
    grad = torch.ones((2, 3, 150, 151), device=device).contiguous(memory_format=layout)
    grad[0, 1, 3, :7] = 0.0
    grad[1, :, :, 2] = -0.0
    grad[1, 2, 149, 149:] = torch.nan
    grad[0, 2, 140] = torch.inf
    grad[0, 2, 141, 5:8] = -torch.inf
    grad[0, 2, 142] = torch.finfo(torch.float32).max
    counts = torch.tensor([100, 1000], device=device)
    adv = torch.zeros_like(grad)
    with backend(name):
        pgd_step_(adv, grad, adv.clone(), EPS, ALPHA, counts=counts)
    assert counts.tolist() == [100 + 7 + 450, 1000 + 2 + 151 + 3]


@everywhere
@norms
def test_in_place_is_the_same_step(device: str, name: str, norm: str) -> None:
    x, adv, grad = images(device), images(device, seed=1), gradient(device)
    with backend(name):
        expected = pgd_step(adv, grad, x, EPS, ALPHA, norm)
        assert not torch.equal(adv, expected), "pgd_step must leave its argument alone"
        assert pgd_step_(adv, grad, x, EPS, ALPHA, norm) is adv
    assert torch.equal(adv, expected)


@everywhere
@norms
def test_the_centre_may_be_the_point_itself(device: str, name: str, norm: str) -> None:
    x, grad = images(device), gradient(device)
    with backend(name):
        expected = pgd_step(x, grad, x.clone(), EPS, ALPHA, norm)
        assert torch.equal(pgd_step_(x, grad, x, EPS, ALPHA, norm), expected)


@everywhere
@norms
@pytest.mark.parametrize("argument", ["grad", "x"])
def test_an_argument_that_shares_a_part_of_the_points_memory(
    device: str, name: str, norm: str, argument: str
) -> None:
    """As windows of one tensor: the step reads the elements as they were before it."""
    memory = torch.cat((images(device).flatten(), images(device, seed=1).flatten()))
    for shift in (1, 297, 600):  # an element, a sample, more than two
        shared = memory.clone()
        adv, other = (shared[at : at + 4 * 297].view(4, 3, 9, 11) for at in (shift, 0))
        given = {"grad": gradient(device), "x": images(device, seed=2), argument: other}
        before = {key: value.clone() for key, value in given.items()}
        with backend(name):
            expected = pgd_step(adv, **before, eps=EPS, alpha=ALPHA, norm=norm)
            pgd_step_(adv, **given, eps=EPS, alpha=ALPHA, norm=norm)
        assert torch.equal(adv, expected)


@everywhere
def test_overlapping_memory_is_refused(device: str, name: str) -> None:
    overlapping = images(device)[:1].expand(4, 3, 9, 11)
    x = images(device)
    with backend(name), pytest.raises(RuntimeError, match="single memory location"):
        pgd_step_(overlapping, gradient(device), x, EPS, ALPHA)


@everywhere
def test_autograd_notices_what_is_overwritten(device: str, name: str) -> None:
    x, weight = images(device), torch.ones(4, 3, 9, 11, device=device, requires_grad=True)
    adv = x.clone()
    loss = (weight * adv).sum()  # saves adv for weight's gradient
    with backend(name):
        pgd_step_(adv, gradient(device), x, EPS, ALPHA)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    "prepare",
    [torch.Tensor.detach, lambda leaf: leaf * 1, lambda leaf: leaf],
    ids=["detached", "derived", "leaf"],
)
def test_in_place_needs_a_point_outside_the_graph(prepare: Callable[[Tensor], Tensor]) -> None:
    x = images("cpu")
    adv = prepare(x.clone().requires_grad_())
    if not adv.requires_grad:
        pgd_step_(adv, gradient("cpu"), x, EPS, ALPHA)
        return
    with pytest.raises(RuntimeError, match=r"adv must not require grad.*detach"):
        pgd_step_(adv, gradient("cpu"), x, EPS, ALPHA)
    before = adv.detach().clone()
    with torch.no_grad():
        pgd_step_(adv, gradient("cpu"), x, EPS, ALPHA)
    assert not torch.equal(adv.detach(), before)


def test_inference_mode() -> None:
    with torch.inference_mode():
        x = images("cpu")
        adv = pgd_step_(x.clone(), gradient("cpu"), x, EPS, ALPHA)
        assert torch.equal(adv, pgd_step(x, gradient("cpu"), x, EPS, ALPHA))


@pytest.mark.parametrize("eps", [0.1, torch.full((3, 1, 1), 0.1)], ids=["one", "per channel"])
def test_it_writes_without_counts_where_torch_lets_saved_tensors_be_changed(
    eps: float | Tensor,
) -> None:
    """Inside that context of torch, ops fail whose tensor to write is None."""
    x, grad = torch.rand(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    expected = pgd_step(x, grad, x, eps, 0.05)
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        assert torch.equal(pgd_step_(x.clone(), grad, x, eps, 0.05), expected)
