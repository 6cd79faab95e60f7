"""The linf step and start with eps, alpha and bounds per channel, as code on normalised images has them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_cases.running import places
from torch import Tensor

from fastadv.ops import backend, pgd_step, pgd_step_, random_start

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")
everywhere = pytest.mark.parametrize(
    ("device", "name"), places("pgd_step_per_channel"), ids=lambda value: str(value)
)
formats = pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "last"]
)
MEAN, STD = (torch.tensor(v).view(3, 1, 1) for v in ((0.49, 0.48, 0.45), (0.2, 0.25, 0.3)))


def _normalised(device: str, dtype: torch.dtype) -> dict[str, Any]:
    """A step's arguments: images of [4, 3, 9, 11] less the mean, over the standard deviation."""
    mean, std = MEAN.to(device, dtype), STD.to(device, dtype)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand((4, 3, 9, 11), generator=generator).to(device, dtype)
    grad = torch.randn(x.shape, generator=generator).to(device, dtype)
    adv = (x + 0.06 * torch.randn(x.shape, generator=generator).to(device, dtype)).clamp(0, 1)
    return {
        "adv": (adv - mean) / std,
        "grad": grad,
        "x": (x - mean) / std,
        "eps": 8 / 255 / std,
        "alpha": 10 / 255 / std,
        "bounds": ((0 - mean) / std, (1 - mean) / std),
    }


@everywhere
@pytest.mark.parametrize("argument", ["grad", "x"])
def test_an_argument_that_shares_a_part_of_the_points_memory(
    device: str, name: str, argument: str
) -> None:
    """As windows of one tensor: the step reads the elements as they were before it."""
    given = _normalised(device, torch.float32)
    shared = torch.cat((given["adv"].flatten(), given["adv"].flatten()))
    adv, given[argument] = (shared[at : at + 4 * 297].view(4, 3, 9, 11) for at in (1, 0))
    before = {**given, "adv": adv.clone(), argument: given[argument].clone()}
    with backend(name):
        expected = pgd_step(**before)
        pgd_step_(**{**given, "adv": adv})
    assert torch.equal(adv, expected)


@everywhere
@formats
def test_three_steps_are_the_published_loop(
    device: str, name: str, memory_format: torch.memory_format
) -> None:
    """On a perturbation, with torch.max and torch.min, in float64."""
    given = _normalised(device, torch.float64)
    x, eps, alpha, (low, high) = given["x"], given["eps"], given["alpha"], given["bounds"]
    delta = given["adv"] - x
    adv = given["adv"].contiguous(memory_format=memory_format)
    for turn in range(3):
        grad = given["grad"].roll(turn, 0)
        stepped = delta + alpha * grad.sign()
        delta = torch.max(torch.min(stepped, eps), -eps)
        delta = torch.max(torch.min(delta, high - x), low - x)
        with backend(name):
            pgd_step_(adv, grad, x, eps, alpha, bounds=(low, high))
    torch.testing.assert_close(adv, x + delta, rtol=0, atol=1e-14)


@everywhere
@formats
def test_equal_channels_are_one_number(
    device: str, name: str, memory_format: torch.memory_format
) -> None:
    given = _normalised(device, torch.float32)
    adv = given["adv"].contiguous(memory_format=memory_format)
    same = torch.ones(3, 1, 1, device=device)
    with backend(name):
        wanted = pgd_step(adv, given["grad"], given["x"], 0.1, 0.07, bounds=(-1.0, 1.5))
        found = pgd_step(
            adv, given["grad"], given["x"], 0.1 * same, 0.07, bounds=(-1.0 * same, 1.5)
        )
    assert torch.equal(found, wanted) and found.stride() == wanted.stride()


@everywhere
def test_shapes_that_mean_the_same(device: str, name: str) -> None:
    given = _normalised(device, torch.float32)
    with backend(name):
        wanted = pgd_step(**given)
        for spread in (
            lambda t: t[None],
            lambda t: t.expand(4, 3, 1, 1),
            lambda t: t.double().expand(4, 3, 1, 1).contiguous(),
        ):
            low, high = given["bounds"]
            other = {n: spread(given[n]) for n in ("eps", "alpha")}
            bounds = (spread(low), spread(high))
            assert torch.equal(pgd_step(**{**given, **other, "bounds": bounds}), wanted)


@everywhere
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_one_per_image_may_have_the_images_axes(device: str, name: str, norm: str) -> None:
    given = _normalised(device, torch.float32) | {"bounds": (-3.0, 3.0), "norm": norm}
    eps = torch.tensor([0.01, 0.1, 0.2, 5.0], device=device)
    with backend(name):
        wanted = pgd_step(**{**given, "eps": eps, "alpha": 0.5 * eps})
        column = eps.view(4, 1, 1, 1)
        assert torch.equal(pgd_step(**{**given, "eps": column, "alpha": 0.5 * column}), wanted)


@everywhere
def test_bounds_of_each_image(device: str, name: str) -> None:
    given = _normalised(device, torch.float32)
    high = torch.tensor([0.0, 0.5, 1.0, 2.0], device=device)
    with backend(name):
        moved = pgd_step(**{**given, "bounds": (-9.0, high)})
    assert torch.equal(moved.amax((1, 2, 3)).clamp(max=high), moved.amax((1, 2, 3)))
    assert float(moved[0].max()) == 0.0


@everywhere
@formats
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_start_is_the_noise_of_a_number_scaled(
    device: str, name: str, memory_format: torch.memory_format, dtype: torch.dtype
) -> None:
    given = _normalised(device, torch.float32)
    x = given["x"].to(dtype).contiguous(memory_format=memory_format)
    low, high = given["bounds"]
    with backend(name):
        found = random_start(x, given["eps"], bounds=(low, high), seed=5)
        noise = random_start(torch.zeros_like(x, dtype=torch.float32), 1.0, bounds=(-1, 1), seed=5)
        plain = random_start(x, 0.1, bounds=(-1.0, 1.5), seed=5)
        same = random_start(
            x, torch.full((3, 1, 1), 0.1, device=device), bounds=(-1.0, 1.5), seed=5
        )
    moved = x.float() + noise * given["eps"]
    assert torch.equal(found, torch.max(torch.min(moved, high), low).to(dtype))
    assert found.stride() == x.stride() and found.dtype == dtype
    assert torch.equal(same, plain)


def test_the_whole_loop_compiles_to_one_graph() -> None:
    given = _normalised("cpu", torch.float32)

    def loop(x: Tensor, grad: Tensor, eps: Tensor, low: Tensor, high: Tensor) -> Tensor:
        adv = random_start(x, eps, bounds=(low, high), seed=1)
        for _ in range(2):
            pgd_step_(adv, grad, x, eps, eps / 4, bounds=(low, high))
        return pgd_step(adv, grad, x, eps, eps / 4, bounds=(low, high))

    arguments = (given["x"], given["grad"], given["eps"], *given["bounds"])
    torch._dynamo.reset()
    compiled = torch.compile(loop, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), loop(*arguments))


def test_per_channel_is_refused_where_it_means_nothing() -> None:
    x = torch.rand(4, 3, 5, 5)
    with pytest.raises(ValueError, match=r"eps must be a number.* in l2, whose ball is over whole"):
        random_start(x, torch.ones(3, 1, 1), "l2")
    with pytest.raises(ValueError, match=r"eps must be a number.*per channel \(3, 1, 1\).*got"):
        random_start(x, torch.ones(3))
    with pytest.raises(ValueError, match=r"bounds\[1\] must be a number or a tensor of shape"):
        random_start(x, 0.1, bounds=(0.0, torch.ones(5)))
