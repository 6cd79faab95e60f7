"""How often Square reads values of the device, for which the host waits on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attack_helpers import digits_test, trained_small_cnn
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastadv
from fastadv.attacks.best import Best
from fastadv.attacks.square_ahead import AheadSearch, _true_places

pytestmark = pytest.mark.usefixtures("one_thread")

aten = torch.ops.aten
# Operations whose results have a size, or are a number, that only the device knows.
READS = (aten._local_scalar_dense, aten.nonzero, aten._unique2, aten.masked_select)


class Reads(TorchDispatchMode):
    """Counts the reads of a block, but for `Tensor.tolist`, which is no operation."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        masks = [
            t for t in tree_leaves(args[1:2]) if isinstance(t, Tensor) and t.dtype == torch.bool
        ]
        by_mask = func.overloadpacket in (aten.index, aten.index_put_) and bool(masks)
        self.count += func.overloadpacket in READS or by_mask
        return func(*args, **(kwargs or {}))


class Lists(TorchFunctionMode):
    """Counts the calls of `Tensor.tolist`."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += getattr(func, "__name__", "") == "tolist"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.05), ("l2", 0.5)])
def test_a_round_of_looking_ahead_reads_three_times(
    norm: str, eps: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads, lists, rounds = Reads(), Lists(), []
    carry_out, one_round = AheadSearch.carry_out, AheadSearch._round

    def watched(self: AheadSearch, result: Best, rows: Tensor) -> None:
        with reads, lists:
            carry_out(self, result, rows)

    def noted(self: AheadSearch, used: list[int]) -> None:
        rounds.append(1)
        one_round(self, used)

    monkeypatch.setattr(AheadSearch, "carry_out", watched)
    monkeypatch.setattr(AheadSearch, "_round", noted)
    (x, y), model = digits_test(8), trained_small_cnn()
    fastadv.Square(model, eps, 150, norm=norm, seed=3, rescale_schedule=True)(x, y)
    assert len(rounds) > 20
    # More only where images have squares of different sides, or nothing to try any more.
    assert reads.count + lists.count < 3.5 * len(rounds)


def test_the_places_of_true_flags_are_those_of_nonzero() -> None:
    generator = torch.Generator().manual_seed(0)
    flags = torch.rand(5, 7, generator=generator) < 0.3
    flags[1] = False
    rows, columns = _true_places(flags, int(flags.sum()))
    assert torch.equal(torch.stack((rows, columns), 1), flags.nonzero())
