"""The projections within bounds against bisection in float64, and against the reference implementation's."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastadv.attacks import projections
from fastadv.attacks.projections import level, to_hyperplane, to_l1_ball

pytestmark = pytest.mark.usefixtures("one_thread")
NORMS = ("linf", "l2", "l1")
ORDERS = {"linf": math.inf, "l2": 2, "l1": 1}


def problem(rows: int = 60, size: int = 48, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Points with some elements at the bounds, normals with some zeros, gaps from tiny to out of reach."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.rand(rows, size, generator=generator).mul(1.4).sub(0.2).clamp(0, 1)
    normal = torch.randn(rows, size, generator=generator) ** 3
    normal[torch.rand(rows, size, generator=generator) < 0.1] = 0
    reach = (normal.abs() * 0.5).sum(1)
    gap = reach * torch.linspace(-1.3, 1.3, rows)
    return points, normal, gap


def bisected(point: Tensor, normal: Tensor, gap: float, norm: str) -> Tensor:
    """One row, in float64: the multiplier of the constraint is searched for."""
    point, normal = point.double(), normal.double() * math.copysign(1, gap)
    room = torch.where(normal > 0, 1 - point, point)

    def way(t: float) -> Tensor:
        if norm == "linf":
            size = torch.full_like(room, t)
        elif norm == "l2":
            size = t * normal.abs()
        else:  # all whose weight exceeds 1 / t go to the bound, and at equality none
            size = torch.where(normal.abs() * t > 1, math.inf, 0.0)
        return torch.where(normal == 0, 0, normal.sign() * torch.minimum(size, room))

    low, high = 1e-15, 1e9
    if float(normal @ way(high)) <= abs(gap):
        return way(high)
    for _ in range(200):
        middle = math.sqrt(low * high)
        if float(normal @ way(middle)) < abs(gap):
            low = middle
        else:
            high = middle
    if norm != "l1":
        return way(high)
    full, more = way(low), way(high)
    share = (abs(gap) - float(normal @ full)) / float(normal @ (more - full))
    return full + share * (more - full)


@pytest.mark.parametrize("norm", NORMS)
def test_the_hyperplane_is_met_where_bisection_meets_it(norm: str) -> None:
    points, normal, gap = problem()
    delta = to_hyperplane(points, normal, gap, norm, (0.0, 1.0))
    expected = torch.stack(
        [bisected(p, n, float(g), norm) for p, n, g in zip(points, normal, gap, strict=True)]
    )
    torch.testing.assert_close(delta.double(), expected, rtol=0, atol=1e-5)
    moved = points + delta
    assert moved.min() >= -1e-6 and moved.max() <= 1 + 1e-6
    room = torch.where(normal * gap[:, None] > 0, 1 - points, points)
    reach = (normal.abs() * room).sum(1)
    met = torch.minimum(gap.abs(), reach) * gap.sign()
    torch.testing.assert_close((normal * delta).sum(1), met, rtol=1e-4, atol=1e-4)
    assert (gap.abs() > reach).sum() > 3  # some cannot be met


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_hyperplane_is_met_where_the_reference_meets_it(norm: str, seed: int) -> None:
    library = pytest.importorskip("pyautoattack.fab_projections")
    points, normal, gap = problem(seed=seed)
    offset = (normal * points).sum(1) + gap
    project = getattr(library, f"projection_{norm}")
    theirs = project(points.double(), normal.double(), offset.double())
    ours = to_hyperplane(points, normal, gap, norm, (0.0, 1.0))
    torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-5)


def test_other_bounds_shapes_and_scales() -> None:
    points, normal, gap = problem()
    for norm in NORMS:
        delta = to_hyperplane(points, normal, gap, norm, (0.0, 1.0))
        images = (5 * points - 2).view(-1, 3, 4, 4)
        wide = to_hyperplane(images, normal.view(-1, 3, 4, 4), 5 * gap, norm, (-2.0, 3.0))
        torch.testing.assert_close(wide.flatten(1), 5 * delta, rtol=0, atol=2e-5)
        tiny = to_hyperplane(points, normal * 1e-30, gap * 1e-30, norm, (0.0, 1.0))
        torch.testing.assert_close(tiny, delta, rtol=0, atol=1e-5)


@pytest.mark.parametrize("way", [to_hyperplane, projections.way_by_sorting])
def test_elements_whose_normal_is_almost_zero_hardly_move_in_l2(
    way: Callable[..., Tensor],
) -> None:
    """The way to their bound is too many times 1e-320 for a float64, and the square of 1e-320 is 0."""
    points, normal, gap = (t.double() for t in problem())
    normal[:, ::3] = 0
    expected = way(points, normal, gap, "l2", (0.0, 1.0))
    normal[:, ::3] = 1e-320
    found = way(points, normal, gap, "l2", (0.0, 1.0))
    met = ((normal * expected).sum(1) - gap).abs() < 1e-9
    assert met.sum() > 20
    torch.testing.assert_close(found[met], expected[met], rtol=0, atol=1e-9)


@pytest.mark.parametrize("norm", NORMS)
def test_nothing_moves_along_a_normal_that_is_zero_or_not_finite(norm: str) -> None:
    points = torch.full((4, 3), 0.5)
    normal = torch.tensor([[0.0, 0, 0], [math.nan] * 3, [math.inf, 1, 0], [1, 1, 1]])
    gap = torch.tensor([1.0, 1.0, 0.1, math.nan])
    delta = to_hyperplane(points, normal, gap, norm, (0.0, 1.0))
    assert delta.isfinite().all()
    torch.testing.assert_close(delta[2], torch.tensor([0, 0.1, 0]))
    assert not delta[[0, 1, 3]].any()


def ball_problem(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(40, 48, generator=generator).mul(1.4).sub(0.2).clamp(0, 1)
    length = torch.logspace(-2, 1, 40)[:, None]
    return x, x + length * torch.randn(40, 48, generator=generator)


@pytest.mark.parametrize("eps", [0.0, 0.05, 1.0, 6.0])
def test_the_l1_ball_within_bounds_is_met_where_bisection_meets_it(eps: float) -> None:
    x, points = ball_problem()
    found = to_l1_ball(points, x, eps, (0.0, 1.0)).double()
    delta = points.double() - x.double()
    room = torch.where(delta > 0, 1 - x.double(), x.double())
    low, high = torch.zeros(40, 1).double(), delta.abs().amax(1, keepdim=True)

    def shrunk(t: Tensor) -> Tensor:
        return delta.sign() * torch.minimum((delta.abs() - t).clamp(min=0), room)

    for _ in range(80):
        middle = (low + high) / 2
        long = shrunk(middle).abs().sum(1, keepdim=True) > eps
        low, high = torch.where(long, middle, low), torch.where(long, high, middle)
    outside = shrunk(torch.zeros(40, 1)).abs().sum(1, keepdim=True) > eps
    expected = x.double() + torch.where(outside, shrunk(high), shrunk(torch.zeros(40, 1)))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert ((found - x).abs().sum(1) <= eps + 1e-5).all() and found.min() >= 0 and found.max() <= 1


def test_the_l1_ball_is_the_reference_s() -> None:
    base = pytest.importorskip("pyautoattack.autopgd_base")
    x, points = ball_problem(1)
    theirs = points + base.L1_projection(x, points - x, 1.5)
    # Theirs is computed in float32.
    ours = to_l1_ball(points, x, 1.5, (0.0, 1.0))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=3e-5)


def test_each_image_may_have_its_radius() -> None:
    x, points = ball_problem()
    radii = torch.linspace(0.1, 4, 40)
    together = to_l1_ball(points.view(40, 3, 4, 4), x.view(40, 3, 4, 4), radii, (0.0, 1.0))
    for i in (0, 20, 39):
        alone = to_l1_ball(points[i : i + 1], x[i : i + 1], float(radii[i]), (0.0, 1.0))
        torch.testing.assert_close(together[i].flatten(), alone[0], rtol=0, atol=1e-6)


def test_the_level_of_a_sum_of_capped_terms() -> None:
    amounts, caps = torch.tensor([[1.0, 2, 1]]).double(), torch.tensor([[3.0, 1, 5]]).double()
    for target, expected in ((0.0, 0), (2, 0.5), (4, 1), (6, 2), (9, 4), (10, 5), (10.1, math.inf)):
        assert level(amounts, caps, torch.tensor([target]).double()).item() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("norm", NORMS)
def test_the_compiled_way_is_that_of_sorting(norm: str, dtype: torch.dtype) -> None:
    points, normal, gap = problem(rows=64, size=51, seed=3)
    normal[3] = 0
    normal[4, :7] = torch.tensor([math.inf, -math.inf, math.nan, 1.0, 1.0, 1.0, -1.0])
    normal[5] = 0.25  # all caps of one size
    points[5] = 0.5
    gap[6], gap[7], gap[8] = math.nan, math.inf, 0
    points, normal = points.to(dtype), normal.to(dtype).view(64, 3, 17)
    points = points.view(64, 3, 17)
    for bounds in ((-0.2, 1.3), (0.0, 1.0)):
        found = projections.to_hyperplane(points, normal, gap, norm, bounds)
        wanted = projections.way_by_sorting(points, normal, gap, norm, bounds)
        assert found.dtype == dtype and found.shape == points.shape
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)
    empty = projections.to_hyperplane(points[:0], normal[:0], gap[:0], norm, (0.0, 1.0))
    assert empty.shape == (0, 3, 17)


@pytest.mark.parametrize("size", [1, 2, 3, 40])
def test_the_compiled_level_is_that_of_sorting(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    amounts = torch.rand(50, size, generator=generator, dtype=torch.float64)
    caps = (
        torch.rand(50, size, generator=generator, dtype=torch.float64).mul(4).round()
    )  # ties, zeros
    whole = (amounts * caps).sum(1)
    for share in (0.0, 0.3, 0.999, 1.0, 1.2):
        found = projections.level(amounts, caps, share * whole)
        wanted = projections.level_by_sorting(amounts, caps, share * whole)
        reached = [(amounts * torch.minimum(t, caps)).sum(1) for t in (found, wanted)]
        torch.testing.assert_close(reached[0], reached[1])
        if share in (0.3, 1.2):
            torch.testing.assert_close(found, wanted)
    nothing = projections.level(amounts[:, :0], caps[:, :0], whole)
    assert nothing.isinf().all()


def test_the_compiled_projections_refuse_other_shapes_and_dtypes() -> None:
    x, gap = torch.rand(2, 5), torch.ones(2)
    ops = torch.ops.fastadv
    for points, normal, gaps in ((x, x[:, :4], gap), (x, x, gap[:1]), (x[0], x[0], gap)):
        with pytest.raises(ValueError, match="must have"):
            ops.hyperplane_way(points, normal, gaps, True, 0.0, 1.0)
    with pytest.raises(TypeError, match="normal must be Float as points are, got Double"):
        ops.hyperplane_way(x, x.double(), gap, True, 0.0, 1.0)
    with pytest.raises(TypeError, match="points must be float32 or float64, got Half"):
        ops.hyperplane_way(x.half(), x.half(), gap, True, 0.0, 1.0)
    with pytest.raises(ValueError, match="must have"):
        ops.water_level(x, x[:1], gap)
