"""How far a result may be from the truth, and whether it is.

The truth is an op's definition evaluated in float64, "torch's own error" the largest error of the same definition
evaluated by torch in the dtype in which the op computes (float32 for half precision) and rounded to the result's
dtype. A result may be off by ``FACTOR * (torch's own error + eps * scale)``, eps the spacing of the result's
dtype at 1 and scale the magnitude of the largest number that is rounded on the way. A float64 result has no wider
truth, so that torch's own error reads 0; its eps counts sqrt(N) times instead, as the roundings of N terms add up.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from op_cases.case import Arguments, OpCase, in_dtype, mapped, tensors_of

FACTOR = 2.0


@dataclass(frozen=True)
class Truth:
    """What a definition gives in float64.

    Attributes:
        results: all of them.
        scales: per result, the magnitude of the largest number that is rounded on the way.
    """

    results: tuple[Tensor, ...]
    scales: tuple[float, ...]


def truth_of(case: OpCase, arguments: Arguments) -> Truth:
    """The truth for tensors on the CPU, whatever their layout."""
    wide = in_dtype(arguments, torch.float64)
    results = case.formula(**wide)
    if not any(result.numel() for result in results):
        return Truth(results, (0.0,) * len(results))
    return Truth(results, case.scale(**wide))


def check_budget(
    case: OpCase,
    arguments: Arguments,
    results: tuple[Tensor, ...],
    where: object,
    truth: Callable[[Arguments], Truth] | None = None,
) -> None:
    """Assert that every result is within its budget; what is not a float must be equal."""
    # On the CPU, where torch has a deterministic kernel for everything.
    arguments = mapped(arguments, Tensor.cpu)
    results = tuple(result.cpu() for result in results)
    true = truth_of(case, arguments) if truth is None else truth(arguments)
    own = case.formula(**in_dtype(arguments, _compute_dtype(arguments)))
    count = len(true.results)
    assert len(results) == count, f"{case.name}: {len(results)} results, not {count}"
    for index, (result, exact, rival) in enumerate(zip(results, true.results, own, strict=True)):
        label = f"{case.name} result {index}, {where}"
        assert result.shape == exact.shape, f"{label}: shape {tuple(result.shape)}"
        if not result.is_floating_point():
            assert torch.equal(result, exact), f"{label}: differs from the truth"
            continue
        allowed = _allowed(result.dtype, exact, rival, true.scales[index], _terms(arguments))
        error = (result.double() - exact).abs()
        worst = float(error.max()) if error.numel() else 0.0
        assert not error.isnan().any(), f"{label}: NaN (memory left unwritten?)"
        assert worst <= allowed, f"{label}: off by {worst:.3g}, allowed {allowed:.3g}"


def _allowed(dtype: torch.dtype, exact: Tensor, rival: Tensor, scale: float, terms: int) -> float:
    if not exact.numel():
        return 0.0
    own_error = float((rival.to(dtype).double() - exact).abs().max())
    roundings = max(16.0, math.sqrt(terms)) if dtype == torch.float64 else 1.0
    return FACTOR * (own_error + roundings * torch.finfo(dtype).eps * scale)


def _terms(arguments: Arguments) -> int:
    """Elements of the largest sample."""
    return max(t.numel() // max(t.shape[0], 1) if t.dim() else 1 for t in tensors_of(arguments))


def _compute_dtype(arguments: Arguments) -> torch.dtype:
    wide = any(t.dtype == torch.float64 for t in tensors_of(arguments))
    return torch.float64 if wide else torch.float32


def check_same_bits(result: Tensor, expected: Tensor, where: object) -> None:
    """Assert equal values and equal signs of zeros; one NaN is as good as another."""
    assert result.dtype == expected.dtype and result.shape == expected.shape, where
    both_nan = result.isnan() & expected.isnan()
    same = (result == expected) & (result.signbit() == expected.signbit())
    wrong = ~(same | both_nan)
    if wrong.any():
        at = tuple(int(i) for i in wrong.nonzero()[0])
        raise AssertionError(
            f"{where}: {int(wrong.sum())} of {wrong.numel()} elements differ, "
            f"first at {at}: {result[at].item()!r}, expected {expected[at].item()!r}"
        )
