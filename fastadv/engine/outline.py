"""Passes of a model that run all of its own code and compute no result that depends on the images.

Which operations a model calls, for how many images and in which order, does not depend on the values that it
computes: a model that looks at them is not copied. So where a recording's values are not needed, a result is only
memory of the right shape, which torch's own shape functions (its device "meta") tell. Results that do not depend
on the images are computed as ever, since the model's code may look at them.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from fastadv.engine.recorder import Recorder, recorded, tensors_in
from fastadv.engine.recording import Recording, item


def outlined(
    model: nn.Module, images: Tensor, *, careful: bool, gradients: bool = True
) -> Recording | None:
    """As `fastadv.engine.recorder.recorded`, without the values; None where only a real pass can tell."""
    try:
        return recorded(model, images, careful=careful, gradients=gradients, kind=_Outline)
    except Exception:  # if it is the model's own, the real pass raises it again
        return None


def is_torchs(function: Any) -> bool:
    """Whether the result of a function depends only on its arguments.

    Operators and autograd functions that others have added to torch may look at whatever they like.
    """
    if isinstance(function, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return str(function).startswith("fastadv.")
    if isinstance(function, (types.FunctionType, types.MethodType)):
        return function is item or function.__module__.startswith("torch.")
    return True  # built in


def blank(like: Tensor, device: torch.device, requires_grad: bool) -> Tensor:
    """Memory for a result of a shape and order of elements, whatever it holds; whole numbers are 0."""
    made = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=device)
    if not made.is_floating_point():
        return made.zero_()
    return made.requires_grad_(requires_grad)


class _Outline(Recorder):
    """Records without computing."""

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """As in `Recorder.call`.

        Raises:
            RuntimeError: the function is none of torch's, and may not take arbitrary values.
        """
        operands = tensors_in((args, kwargs))
        if not any(self._depends(t) for t in operands):
            return super().call(func, args, kwargs)
        if not is_torchs(func):
            raise RuntimeError("only a real pass can tell")
        found = _result_of(func, args, kwargs, operands)
        return super().call(func, args, kwargs) if found is None else found

    def _record_own_function(self, cls: Any, args: tuple[Any, ...], result: Any) -> None:
        raise RuntimeError("only a real pass can tell")


def _result_of(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], operands: list[Tensor]
) -> Tensor | None:
    """A blank result, or the operand that is the result; None where that is not known, as of views."""
    by_operand = {id(t): _shape_of(t) for t in operands}
    before = {key: shape._version for key, shape in by_operand.items()}
    try:
        with torch.no_grad():
            result = func(*_mapped(args, by_operand), **_mapped(kwargs, by_operand))
    except Exception:  # not every function has a shape function
        return None
    written = [key for key, shape in by_operand.items() if shape._version != before[key]]
    for operand in operands:
        if result is by_operand[id(operand)] and written in ([], [id(operand)]):
            if written:
                increment_version(operand)
            return operand
    if not isinstance(result, Tensor) or written or result._is_view():
        return None
    tracked = torch.is_grad_enabled() and any(t.requires_grad for t in operands)
    return blank(result, operands[0].device, tracked)


def _shape_of(t: Tensor) -> Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


def _mapped(value: Any, by_operand: dict[int, Tensor]) -> Any:
    """Nested arguments with other tensors."""
    if isinstance(value, Tensor):
        return by_operand[id(value)]
    if type(value) in (tuple, list):
        return type(value)(_mapped(part, by_operand) for part in value)
    if isinstance(value, dict):
        return {key: _mapped(part, by_operand) for key, part in value.items()}
    if isinstance(value, slice):
        return slice(*(_mapped(part, by_operand) for part in (value.start, value.stop, value.step)))
    return value
