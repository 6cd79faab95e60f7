"""The op registry: one record per op, from which dispatch, tests, benchmarks and docs are driven.

An op has one schema and up to four implementations: ``native`` (C++ for CPU tensors, CUDA C++ for CUDA
tensors), ``triton`` and ``reference`` (plain torch). Per dispatch key exactly one of them owns the op:

* CPU: native;
* CUDA: native if it was built, else triton;
* every other device: reference.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fastadv.ops import traced, transforms

NAMESPACE = "fastadv"
BACKENDS = ("native", "triton", "reference")
SOURCES = ("C++", "CUDA C++", "Triton")  # the languages of an op's implementations, beside torch


@dataclass(frozen=True)
class Op:
    """One registered op.

    Attributes:
        name: the op's name in ``torch.ops.fastadv``.
        schema: its arguments and results in torch's schema language.
        reference: the plain torch implementation.
        fake: shapes, dtypes and strides of the results, for tracing. None for an op without results, and for an op
            whose result is like its first argument.
        triton: where the Triton implementation is, as ``"file:function"`` below ``fastadv.kernels``; None
            where there is none.
        backward_of: the op whose gradient this one computes, None for a forward op.
        without: for each implementation of `SOURCES` that the source does not have, the reason. The source has
            the others, which a build or a machine may still lack.
        batched: the tensor arguments (or lists of tensors) that have a row per sample, where each row of
            every result depends on that row of these alone: ``torch.func.vmap`` merges its axis with theirs
            and calls the op once. None where a result combines rows: the op is then called slice by slice.
    """

    name: str
    schema: str
    reference: Callable[..., Any]
    fake: Callable[..., Any] | None = None
    triton: str | None = None
    backward_of: str | None = None
    without: Mapping[str, str] = field(default_factory=dict, hash=False)
    batched: tuple[str, ...] | None = None

    @property
    def qualified_name(self) -> str:
        """The name with its namespace, as ``torch.library`` takes it."""
        return f"{NAMESPACE}::{self.name}"

    @property
    def tracing(self) -> Callable[..., Any]:
        """The fake, or its substitute. It checks nothing, because the public functions check the arguments."""
        if self.fake is not None:
            return self.fake
        return _nothing if self.schema.endswith("-> ()") else _like_the_first

    @property
    def overload(self) -> torch._ops.OpOverload:
        """The callable in ``torch.ops``."""
        return getattr(torch.ops.fastadv, self.name).default

    def has_native(self, device_type: str) -> bool:
        """Whether compiled code of this package is registered for a device type."""
        if device_type not in ("cpu", "cuda"):
            return False
        if device_type == "cuda" and self.name in _TRITON_OWNED:
            return False
        return has_kernel(self.qualified_name, device_type)

    def owner(self, device_type: str) -> str:
        """Which backend runs the op on a device type when none is forced."""
        if self.has_native(device_type):
            return "native"
        if device_type == "cuda" and self.triton is not None:
            return "triton"
        return "reference"

    def missing(self) -> dict[str, str]:
        """For each of `SOURCES` that cannot run the op in this installation, the reason."""
        found = dict(self.without)
        if "C++" not in found and not self.has_native("cpu"):
            found["C++"] = "in the source (csrc/cpu), but not in this build"
        if "CUDA C++" not in found and not self.has_native("cuda"):
            found["CUDA C++"] = "in the source (csrc/cuda), but not in this build"
        if "Triton" not in found and importlib.util.find_spec("triton") is None:
            found["Triton"] = "in the source (kernels), but the package triton is not installed"
        return found

    def triton_function(self) -> Callable[..., Any]:
        """Import and return the Triton implementation.

        Raises:
            RuntimeError: the op has no Triton kernel, or triton cannot be imported.
        """
        if self.triton is None:
            raise RuntimeError(f"op {self.name} has no triton implementation")
        module, _, function = self.triton.partition(":")
        try:
            return getattr(importlib.import_module(f"fastadv.kernels.{module}"), function)
        except ImportError as error:
            raise RuntimeError(
                f"op {self.name}: the triton backend needs the package triton, which cannot be imported: {error}"
            ) from error


def _nothing(*_: Any) -> None:
    return None


def _like_the_first(first: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(first)


REGISTRY: dict[str, Op] = {}
_TRITON_OWNED: set[str] = set()
_TRACED: dict[str, Op] = {}  # by the op's name
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


def has_kernel(qualified_name: str, device_type: str) -> bool:
    """Whether the dispatcher holds a kernel for exactly this op and device type."""
    key = device_type.upper()
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(qualified_name, key))


def define(op: Op) -> Op:
    """Register an op's schema, fake and reference with torch, and list it.

    Raises:
        ValueError: an op of this name is already registered.
    """
    if op.name in REGISTRY:
        raise ValueError(f"op name must be new, got {op.name!r} a second time")
    torch.library.define(op.qualified_name, op.schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(op.qualified_name, "default", op.reference)
    torch.library.register_fake(op.qualified_name, op.tracing)
    transforms.install(op, _LIBRARY)
    if op.backward_of is not None:
        register_gradient(op, _no_second_derivative(op))
    _define_traced(op)
    REGISTRY[op.name] = op
    return op


def _define_traced(op: Op) -> None:
    """Register the form of an op that takes its floats as tensors, if it has floats; it is not in `REGISTRY`."""
    schema = traced.traced_schema(op.schema)
    if schema is None:
        return
    reference = traced.traced_reference(op.overload)
    form = replace(op, name=op.name + traced.SUFFIX, schema=schema, reference=reference)
    # It reads numbers on the host, which a CUDA graph would keep as they were when it was recorded.
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe)
    torch.library.define(form.qualified_name, form.schema, tags=tags)
    torch.library.impl(form.qualified_name, "default", form.reference)
    torch.library.register_fake(form.qualified_name, form.tracing)
    transforms.install(form, _LIBRARY)
    _TRACED[op.name] = form


def register_gradient(
    op: Op, backward: Callable[..., Any], setup_context: Callable[..., None] | None = None
) -> None:
    """Register an op's gradient formula, for plain autograd and for ``torch.func``.

    Args:
        op: a defined op.
        backward: as ``torch.library.register_autograd`` takes it.
        setup_context: likewise.
    """
    torch.library.register_autograd(op.qualified_name, backward, setup_context=setup_context)
    transforms.GRADIENTS[op.name] = transforms.Gradient(backward, setup_context)


def register_traced_gradient(
    op: Op, backward: Callable[..., Any], setup_context: Callable[..., None] | None = None
) -> None:
    """`register_gradient` for the form of an op that takes its floats as tensors."""
    register_gradient(_TRACED[op.name], backward, setup_context)


def _no_second_derivative(op: Op) -> Callable[..., Any]:
    """A gradient formula that raises: without one torch would only warn, and leave the gradient out."""

    def backward(*_: Any) -> Any:
        raise RuntimeError(f"{op.backward_of} has no second derivative")

    return backward


def claim_cuda_for_triton() -> None:
    """Make Triton the owner of the CUDA key for every op that has no compiled CUDA kernel.

    The Triton module is imported on the op's first call on a CUDA tensor, not here.
    """
    for op in REGISTRY.values():
        if op.triton is None or has_kernel(op.qualified_name, "cuda"):
            continue
        torch.library.impl(op.qualified_name, "cuda", _lazy_triton(op))
        _TRITON_OWNED.add(op.name)


def _lazy_triton(op: Op) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return op.triton_function()(*args, **kwargs)

    return call
