"""Force one backend for every op of fastadv in a ``with`` block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from fastadv.ops.registry import BACKENDS, NAMESPACE, REGISTRY, Op


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run every fastadv op in the block, backward passes included, on one backend.

    A backend that an op or a device does not have is an error at the op's call, never a fallback. The block
    acts on the calling thread and on eager calls; of nested blocks the innermost counts. A function compiled
    by ``torch.compile`` keeps the owners that the dispatcher gives it and cannot be called inside. Kernels that
    are no op of `fastadv.ops`, such as a copied model's convolutions, have one implementation and run as outside.

    Args:
        name: ``"native"`` (C++ on CPU tensors, CUDA C++ on CUDA tensors), ``"triton"`` or ``"reference"``.

    Raises:
        ValueError: ``name`` is another word.
        RuntimeError: from an op in the block, when the forced backend does not have it.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    outer = [
        mode for mode in _get_current_dispatch_mode_stack() if isinstance(mode, _ForcedBackend)
    ]
    active = [mode.active for mode in outer]
    for mode in outer:
        mode.active = False
    try:
        with _ForcedBackend(name):
            yield
    finally:
        for mode, was_active in zip(outer, active, strict=True):
            mode.active = was_active


class _ForcedBackend(TorchDispatchMode):
    """Reroutes the ops of our namespace; it sits below autograd, so gradients follow by themselves."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Do not wrap the method below, at whose first call torch would import its compiler for seconds."""
        return False

    def __init__(self, name: str) -> None:
        super().__init__()
        self.active = True  # False while a block inside this one decides
        self._name = name

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if not self.active or func.namespace != NAMESPACE:
            return func(*args, **kwargs)
        op = REGISTRY.get(func._schema.name.split("::")[1])
        if op is None:  # a kernel of the engine's or an attack's own
            return func(*args, **kwargs)
        return _implementation(op, self._name, _device_type(args))(*args, **kwargs)


def _device_type(args: tuple[Any, ...]) -> str:
    tensors = (a for arg in args for a in (arg if isinstance(arg, (list, tuple)) else (arg,)))
    return next(a.device.type for a in tensors if isinstance(a, torch.Tensor))


def _implementation(op: Op, name: str, device_type: str) -> Any:
    if name == "reference":
        return op.reference
    if name == "triton":
        return op.triton_function()
    if not op.has_native(device_type):
        raise RuntimeError(
            f"backend 'native' has no kernel of {op.name} for {device_type} tensors; "
            f"its owner there is '{op.owner(device_type)}'"
        )
    return op.overload
