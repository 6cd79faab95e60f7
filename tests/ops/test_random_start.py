"""The random start: what its noise is distributed like, and what it does and does not depend on."""

from __future__ import annotations

import pytest
import torch
from op_cases.running import places
from torch import Tensor

from fastadv.ops import backend, random_start

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")
everywhere = pytest.mark.parametrize(("device", "name"), places("random_start"))
norms = pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
SHAPE = (64, 3, 16, 16)
SIZE = 768  # elements of a sample
FREE = (-9.0, 9.0)  # bounds that clip nothing


def _noise(name: str, device: str, norm: str, eps: float, seed: int = 1) -> Tensor:
    """[64, 768] in float64, undisturbed by bounds and by rounding of an image."""
    with backend(name):
        x = torch.zeros(SHAPE, device=device)
        return random_start(x, eps, norm, FREE, seed).double().flatten(1).cpu()


@everywhere
def test_linf_noise_is_uniform(device: str, name: str) -> None:
    eps = 0.25
    noise = _noise(name, device, "linf", eps) / eps
    count = noise.numel()
    assert abs(float(noise.mean())) < 4 * (1 / 3 / count) ** 0.5
    # The variance of x**2 for uniform x in -1..1 is 1/5 - 1/9.
    assert abs(float(noise.square().mean()) - 1 / 3) < 4 * ((1 / 5 - 1 / 9) / count) ** 0.5
    assert -1 <= float(noise.min()) < -0.999
    assert 0.999 < float(noise.max()) <= 1
    shares = torch.histc(noise, 16, -1, 1) / count
    assert float((shares - 1 / 16).abs().max()) < 4 * (15 / 256 / count) ** 0.5


@everywhere
def test_l2_noise_is_uniform_in_the_ball(device: str, name: str) -> None:
    """Direction: no preferred axis or sign. Radius: P(|noise| < r * eps) = r**SIZE."""
    eps = 2.0
    noise = _noise(name, device, "l2", eps) / eps
    radius = noise.norm(dim=1)
    assert float(radius.max()) <= 1 + 1e-6
    share = radius**SIZE  # uniform in 0..1
    assert abs(float(share.mean()) - 0.5) < 4 * (1 / 12 / 64) ** 0.5
    assert abs(float(share.var()) - 1 / 12) < 0.04
    scaled = noise / radius[:, None] * SIZE**0.5
    assert abs(float(scaled.mean())) < 4 / scaled.numel() ** 0.5
    fourth = float(scaled.pow(4).mean())  # 3 for a Gaussian, 2.7 for a sum of four uniforms
    assert 2.5 < fourth < 3.1


@everywhere
def test_l1_noise_is_uniform_in_the_ball(device: str, name: str) -> None:
    """Magnitudes over their mean are exponential, signs are fair, P(|noise| < r * eps) = r**SIZE."""
    eps = 8.0
    noise = _noise(name, device, "l1", eps) / eps
    radius = noise.abs().sum(1)
    assert float(radius.max()) <= 1 + 1e-6
    share = radius**SIZE  # uniform in 0..1
    assert abs(float(share.mean()) - 0.5) < 4 * (1 / 12 / 64) ** 0.5
    assert abs(float(share.var()) - 1 / 12) < 0.04
    scaled = noise / radius[:, None] * SIZE
    magnitude, count = scaled.abs(), noise.numel()
    # Kolmogorov and Smirnov's test at 1 %; the mean of a sample in place of the true one changes less than that.
    ranked = magnitude.flatten().sort().values
    steps = torch.arange(count + 1, dtype=torch.float64) / count
    reached = -torch.expm1(-ranked)
    distance = torch.maximum(reached - steps[:-1], steps[1:] - reached).max()
    assert float(distance) < 1.63 / count**0.5
    # E|e|**2 = 2, with standard deviation 20**0.5; E e**4 = 24.
    assert abs(float(magnitude.square().mean()) - 2) < 4 * (20 / count) ** 0.5
    assert 20 < float(magnitude.pow(4).mean()) < 28
    # Signs are fair, and magnitudes of both signs alike.
    assert abs(float(scaled.sign().mean())) < 4 / count**0.5
    assert abs(float(scaled.mean())) < 4 * (2 / count) ** 0.5
    of_sign = [magnitude[scaled > 0].mean(), magnitude[scaled < 0].mean()]
    assert abs(float(of_sign[0] - of_sign[1])) < 4 * (4 / count) ** 0.5


@everywhere
def test_neighbours_and_samples_are_uncorrelated(device: str, name: str) -> None:
    for norm in ("linf", "l2", "l1"):
        noise = _noise(name, device, norm, 1.0)
        noise = noise / noise.norm(dim=1, keepdim=True)
        limit = 5 / SIZE**0.5
        between = noise @ noise.T - torch.eye(64, dtype=torch.float64)
        assert float(between.abs().max()) < limit
        for lag in (1, 2, 3, 4, 16, 256):
            assert float((noise * noise.roll(lag, 1)).sum(1).abs().max()) < limit


@everywhere
@norms
def test_noise_depends_on_seed_and_sample_id_alone(device: str, name: str, norm: str) -> None:
    x = torch.rand(SHAPE, device=device)
    ids = torch.randperm(64).to(device) * 2**33
    with backend(name):
        whole = random_start(x, 0.1, norm, seed=5, sample_ids=ids)
        part = random_start(x[10:13], 0.1, norm, seed=5, sample_ids=ids[10:13])
        assert torch.equal(whole[10:13], part)
        assert not torch.equal(whole, random_start(x, 0.1, norm, seed=6, sample_ids=ids))
        assert not torch.equal(whole, random_start(x, 0.1, norm, seed=5))
        by_place = random_start(x, 0.1, norm, seed=5)
        named = torch.arange(64, device=device)
        assert torch.equal(by_place, random_start(x, 0.1, norm, seed=5, sample_ids=named))


@everywhere
@norms
def test_starts_lie_in_the_ball_and_the_bounds(device: str, name: str, norm: str) -> None:
    x = torch.rand(SHAPE, device=device)
    eps = {"linf": 0.1, "l2": 3.0, "l1": 60.0}[norm]
    with backend(name):
        start = random_start(x, eps, norm, (0.2, 0.7), seed=0)
        assert float(start.min()) >= 0.2 and float(start.max()) <= 0.7 + 1e-7
        free = random_start(x, eps, norm, FREE, seed=0)
    delta = (free.double() - x).flatten(1)
    order = {"linf": torch.inf, "l2": 2, "l1": 1}[norm]
    largest = torch.linalg.vector_norm(delta, order, dim=1).max()
    assert float(largest) <= eps * (1 + 1e-6) + 1e-7


@everywhere
@norms
def test_eps_zero_is_the_image_itself(device: str, name: str, norm: str) -> None:
    x = torch.rand(SHAPE, device=device)
    eps = torch.zeros(64, device=device)
    eps[1] = 0.5
    with backend(name):
        assert torch.equal(random_start(x, 0.0, norm, seed=3), x)
        start = random_start(x, eps, norm, seed=3)
        alone = random_start(x, 0.5, norm, seed=3)
    assert torch.equal(start[[0, *range(2, 64)]], x[[0, *range(2, 64)]])
    assert torch.equal(start[1], alone[1])


@everywhere
@norms
def test_a_nan_pixel_stays_a_nan(device: str, name: str, norm: str) -> None:
    x = torch.rand(2, 10, device=device)
    x[1, 3] = torch.nan
    with backend(name):
        start = random_start(x, 0.1, norm, seed=0)
    assert start.isnan().nonzero().tolist() == [[1, 3]]


@everywhere
def test_a_direction_of_length_zero_is_no_noise(device: str, name: str) -> None:
    """The byte sums of one word in 370 are 0, which with one pixel is all there is of a direction."""
    x = torch.full((1024, 1), 0.5, device=device)
    with backend(name):
        start = random_start(x, 0.25, "l2", seed=0)
    assert start.isfinite().all()
    assert 1 <= int((start == x).sum()) <= 20


def test_no_seed_follows_torchs_generator() -> None:
    x = torch.rand(2, 3, 4, 4)
    torch.manual_seed(0)
    first, second = random_start(x, 0.1), random_start(x, 0.1)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(random_start(x, 0.1), first)


@pytest.mark.compiles
def test_no_seed_inside_compile_is_an_error_that_says_so() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: random_start(x, 0.1), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="seed must be an integer inside"):
        compiled(torch.rand(2, 3))


@pytest.mark.compiles
def test_a_compiled_start_takes_any_seed_without_compiling_again() -> None:
    torch._dynamo.reset()
    graphs = 0

    def count(module: torch.fx.GraphModule, _: object) -> object:
        nonlocal graphs
        graphs += 1
        return module.forward

    compiled = torch.compile(
        lambda x, seed: random_start(x, 0.1, seed=seed), fullgraph=True, backend=count
    )
    x = torch.rand(2, 3, 4, 4)
    for seed in (2, 3, 4, 5, 2**62, 2**63 - 1):
        assert torch.equal(compiled(x, seed), random_start(x, 0.1, seed=seed))
    assert graphs <= 2
