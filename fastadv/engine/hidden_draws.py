"""Random numbers that are drawn where no watch of torch's functions looks.

An operator that others have added is one function to whoever watches. So the states of torch's generators are
compared around it. A gradient is one function, too, in which the backward methods of autograd functions run.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastadv.engine.recording import Recording, item

_Result = TypeVar("_Result")
_TORCHS = frozenset(("aten", "prims", "mkldnn", "quantized", "fastadv"))  # whose draws torch marks


def is_torchs(function: Any) -> bool:
    """Whether the result of a function depends only on its arguments.

    Operators and autograd functions that others have added to torch may look at whatever they like.
    """
    if isinstance(function, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return str(function).startswith("fastadv.")
    if isinstance(function, (types.FunctionType, types.MethodType)):
        return function is item or f"{function.__module__}.".startswith("torch.")
    return True  # built in


def may_hide_draws(function: Any) -> bool:
    """Whether a function may draw random numbers without a call of torch that can be seen."""
    if is_torchs(function):
        return False
    if isinstance(function, torch._ops.OpOverloadPacket):
        return any(may_hide_draws(getattr(function, name)) for name in function.overloads())
    if isinstance(function, torch._ops.OpOverload) and function.namespace in _TORCHS:
        return torch.Tag.nondeterministic_seeded in function.tags
    return True


def hides_draws(recording: Recording) -> bool:
    """Whether a recorded pass, or its gradient, may draw so: by such a function, or by an autograd function."""
    return recording.own_functions or any(may_hide_draws(op.function) for op in recording.ops)


def gradient_runs_others_code(outputs: Iterable[Tensor]) -> bool:
    """Whether the graph of tensors holds autograd functions that others have written."""
    waiting, seen = [tensor.grad_fn for tensor in outputs], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        written = getattr(type(node), "_forward_cls", None)
        if written is not None and written.__module__.split(".")[0] not in ("torch", "fastadv"):
            return True
        waiting.extend(following for following, _ in node.next_functions)
    return False


def watched_for_draws(run: Callable[[], _Result], device: torch.device) -> tuple[_Result, bool]:
    """Run something that may draw.

    Another thread that draws meanwhile counts as well: the model then runs live, which is right all the same.

    Returns:
        Its result, and whether it has moved a generator of torch's, which is then put back.
    """
    generators = [torch.default_generator]
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        generators.append(torch.cuda.default_generators[index])
    before = [generator.get_state() for generator in generators]
    result = run()
    moved = [
        (generator, state)
        for generator, state in zip(generators, before, strict=True)
        if not torch.equal(generator.get_state(), state)
    ]
    for generator, state in moved:
        generator.set_state(state)
    return result, bool(moved)
