"""Preparing a live model for a recording, and restoring it afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from fastadv.engine.compiled_parts import has_compiled_parts
from fastadv.engine.errors import Unrecordable
from fastadv.engine.frozen import frozen
from fastadv.engine.networks import modules_of


@contextmanager
def held(model: nn.Module) -> Iterator[None]:
    """Within, a model is in eval mode and may be recorded; on leaving, it is as it was.

    Raises:
        Unrecordable: the model has backward hooks.
    """
    _refuse_backward_hooks(model)
    with frozen(model, freeze_parameters=False), _kept_attributes(model), _uncompiled(model):
        yield


def _refuse_backward_hooks(model: nn.Module) -> None:
    """Refuse hooks that see or change gradients, which no copy would call."""
    everywhere = (
        nn.modules.module._global_backward_hooks,
        nn.modules.module._global_backward_pre_hooks,
    )
    if any(everywhere):
        raise Unrecordable("there are backward hooks for all modules")
    hooked = [m for m in modules_of(model) if m._backward_hooks or m._backward_pre_hooks]
    for name, module in model.named_modules() if hooked else ():
        if module in hooked:
            raise Unrecordable(f"module {name or type(module).__name__!r} has backward hooks")


@contextmanager
def _kept_attributes(model: nn.Module) -> Iterator[None]:
    """Put back the plain attributes of every module, such as features that a forward pass keeps."""
    saved = [(module, dict(vars(module))) for module in modules_of(model)]
    try:
        yield
    finally:
        for module, attributes in saved:
            current = vars(module)
            for name in [n for n in current if n not in attributes]:
                del current[name]
            for name, value in attributes.items():
                if current.get(name, _ABSENT) is not value:
                    current[name] = value


_ABSENT = object()


@contextmanager
def _uncompiled(model: nn.Module) -> Iterator[None]:
    """Run parts that `torch.compile` has compiled as they were written, so that their operations can be seen.

    torch has one such switch for the whole process; it is touched for models with compiled parts only.
    """
    if not has_compiled_parts(model):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
