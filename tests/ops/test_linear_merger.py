"""The linear merger: against torch's linear layer, in half precision, and what is computed and kept."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from op_cases.running import places
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fastadv.ops import backend, linear_merger

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")
everywhere = pytest.mark.parametrize(("device", "name"), places("linear_merger"))


def _normal(device: str, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


@everywhere
@pytest.mark.parametrize("widths", [(5,), (3, 4), (1, 7, 2), (2,) * 16], ids=str)
def test_it_is_the_linear_layer_on_the_concatenation(
    device: str, name: str, widths: tuple[int, ...]
) -> None:
    layer = torch.nn.Linear(sum(widths), 6).to(device)
    features = [_normal(device, 9, width, seed=i) for i, width in enumerate(widths)]
    with backend(name):
        merged = linear_merger(features, layer.weight, layer.bias)
        torch.testing.assert_close(merged, layer(torch.cat(features, 1)))
        without = linear_merger(tuple(features), layer.weight)
    torch.testing.assert_close(without, F.linear(torch.cat(features, 1), layer.weight))


@everywhere
def test_each_part_meets_its_own_columns(device: str, name: str) -> None:
    weight = torch.tensor([[1.0, 10.0, 100.0], [2.0, 20.0, 200.0]], device=device)
    one = torch.ones(1, 1, device=device)
    with backend(name):
        assert linear_merger([one, 2 * one, 3 * one], weight).tolist() == [[321.0, 642.0]]
        assert linear_merger([one, one.expand(1, 2)], weight).tolist() == [[111.0, 222.0]]


@everywhere
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(device: str, name: str, dtype: torch.dtype) -> None:
    """256 and 32 times 1/16: each of these would be lost where the sum is held in half precision."""
    features = [torch.full((2, 1), 256.0, dtype=dtype, device=device)]
    features += [torch.full((2, 1), 0.0625, dtype=dtype, device=device)] * 32
    weight = torch.ones(3, 33, dtype=dtype, device=device)
    with backend(name):
        assert linear_merger(features, weight).float().unique().tolist() == [258.0]


@everywhere
def test_one_extractor_twice_gets_both_gradients(device: str, name: str) -> None:
    shared = _normal(device, 4, 3).requires_grad_()
    weight = _normal(device, 5, 6, seed=1)
    with backend(name):
        (found,) = torch.autograd.grad(linear_merger([shared, shared], weight).sum(), shared)
    expected = (weight[:, :3] + weight[:, 3:]).sum(0).expand(4, 3)
    torch.testing.assert_close(found, expected)


class Calls(TorchDispatchMode):
    """The fastadv ops called in its block, with the last argument of each."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastadv":
            self.found.append((func._opname.removeprefix("linear_merger_"), args[-1]))
        return func(*args, **(kwargs or {}))


def test_only_what_is_asked_for_is_computed() -> None:
    features = [_normal("cpu", 4, width).requires_grad_(width != 3) for width in (2, 3, 5)]
    weight, bias = _normal("cpu", 6, 10), _normal("cpu", 6).requires_grad_()
    with Calls() as calls:
        linear_merger(features, weight, bias).sum().backward()
    assert calls.found[1:] == [("backward_features", [True, False, True])]
    assert [part.grad is None for part in features] == [False, True, False]
    assert bias.grad.tolist() == [4.0] * 6
    frozen = [part.detach() for part in features]
    with Calls() as calls:
        linear_merger(frozen, weight.requires_grad_()).sum().backward()
    assert [name for name, _ in calls.found[1:]] == ["backward_weight"]


def test_features_are_kept_only_for_the_gradient_of_the_weight() -> None:
    """An attack through a frozen merger would otherwise hold the features of all extractors."""
    features = [_normal("cpu", 4, 3).requires_grad_() for _ in range(2)]
    for trained in (False, True):
        weight = _normal("cpu", 6, 6).requires_grad_(trained)
        kept: list[Tensor] = []

        def keep(t: Tensor, kept: list[Tensor] = kept) -> Tensor:
            kept.append(t)
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            linear_merger(features, weight)
        assert len(kept) == (3 if trained else 1)


@everywhere
def test_a_batch_of_none(device: str, name: str) -> None:
    """The weight's gradient is then a sum of no terms, hence zero."""
    features = [torch.zeros(0, 3, device=device), torch.zeros(0, 2, device=device)]
    weight, bias = _normal(device, 4, 5).requires_grad_(), _normal(device, 4).requires_grad_()
    with backend(name):
        merged = linear_merger(features, weight, bias)
        merged.sum().backward()
    assert merged.shape == (0, 4)
    assert not weight.grad.any() and not bias.grad.any()


@everywhere
def test_nan_stays_in_its_row(device: str, name: str) -> None:
    features = [_normal(device, 3, 4), _normal(device, 3, 4, seed=1)]
    features[1][1, 2] = torch.nan
    with backend(name):
        merged = linear_merger(features, _normal(device, 5, 8))
    assert merged.isnan().all(1).tolist() == [False, True, False]
    assert merged.isnan().any(1).tolist() == [False, True, False]


def test_calls_from_several_threads_at_once() -> None:
    """Each of them on several threads of its own."""
    features = [_normal("cpu", 200, 64), _normal("cpu", 200, 32, seed=1)]
    weight = _normal("cpu", 300, 96)
    alone = linear_merger(features, weight)
    torch.set_num_threads(2)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: linear_merger(features, weight), range(6)))
    assert all(torch.equal(result, alone) for result in found)
