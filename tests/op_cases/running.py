"""Calling raw ops on a chosen backend, whatever they return or overwrite."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from fastadv.ops import REGISTRY, backend
from fastadv.ops.registry import Op
from op_cases.case import Arguments, OpCase, as_tuple


def devices() -> tuple[str, ...]:
    """The devices at hand."""
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def backends_of(op: Op, device: str) -> tuple[str, ...]:
    """The backends that can run an op on a device type.

    Triton counts on the CPU when its interpreter is switched on (TRITON_INTERPRET=1).
    """
    found = ("native",) if op.has_native(device) else ()
    found += ("triton",) if has_triton(op, device) else ()
    return (*found, "reference")


def places(op_name: str) -> list[Any]:
    """Parameter sets (device, backend) of an op, for `pytest.mark.parametrize`."""
    return [
        pytest.param(device, name, marks=[pytest.mark.gpu] if device == "cuda" else [])
        for device in devices()
        for name in backends_of(REGISTRY[op_name], device)
    ]


def has_triton(op: Op, device: str) -> bool:
    """Whether the op has a Triton kernel that runs on the device."""
    if op.triton is None or not (device == "cuda" or interpreted(device)):
        return False
    try:
        op.triton_function()
    except RuntimeError:
        return False
    return True


def interpreted(device: str) -> bool:
    """Whether Triton kernels run in its (very slow) interpreter on the device."""
    return device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"


def emulated() -> bool:
    """Whether CUDA kernels run in place of the C++ kernels, in the emulator."""
    plugin = sys.modules.get("cuda_emulator.plugin")
    return plugin is not None and plugin.library is not None


def written_arguments(op: Op) -> tuple[str, ...]:
    """Names of the arguments that the op writes to."""
    schema = op.overload._schema
    return tuple(a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write)


def copied(t: Tensor) -> Tensor:
    """A tensor of the same values and strides on memory of its own."""
    copy = t.new_empty(0)
    return copy.set_(t.untyped_storage().clone(), t.storage_offset(), t.size(), t.stride())


def run(case: OpCase, arguments: Arguments, backend_name: str | None = None) -> tuple[Tensor, ...]:
    """All results of the raw op; what it overwrites is copied before.

    Args:
        case: names the op.
        arguments: by name; left as they are.
        backend_name: the backend to force; None takes the dispatcher's owner.
    """
    op = case.registered
    written = written_arguments(op)
    arguments = {
        name: copied(value) if name in written and value is not None else value
        for name, value in arguments.items()
    }
    results = _call(op, arguments, backend_name)
    return (*results, *(arguments[name] for name in written if arguments[name] is not None))


def _call(op: Op, arguments: Arguments, backend_name: str | None) -> tuple[Any, ...]:
    if backend_name is None:
        return as_tuple(op.overload(**arguments))
    with backend(backend_name):
        return as_tuple(op.overload(**arguments))
