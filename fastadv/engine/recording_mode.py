"""Preparing a live model for a recording, and restoring it afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastadv.engine.compiled_parts import has_compiled_parts
from fastadv.engine.errors import Unrecordable
from fastadv.engine.frozen import frozen
from fastadv.engine.networks import modules_of

_WARMUP_IMAGES = 2  # number of images


@contextmanager
def recording_mode(model: nn.Module) -> Iterator[None]:
    """Within, a model is in eval mode and may be recorded; on leaving, it is as it was.

    Raises:
        Unrecordable: the model has backward hooks.
    """
    _refuse_backward_hooks(model)
    with frozen(model, keep_attributes=True), uncompiled(model), _kept_seed():
        yield


@contextmanager
def _kept_seed() -> Iterator[None]:
    """Put torch's generator back if the model seeds it. Other threads may draw meanwhile, but hardly ever seed."""
    seed, state = torch.initial_seed(), torch.get_rng_state()
    try:
        yield
    finally:
        if torch.initial_seed() != seed:
            torch.set_rng_state(state)


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
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Run parts that `torch.compile` has compiled as they were written, so that their operations can be seen.

    torch has one such switch for the whole process; it is touched for models with compiled parts only.
    """
    if not has_compiled_parts(model):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def warm_up(model: nn.Module, images: Tensor, calls: int) -> None:
    """Call a model in `recording_mode` on a few images, so that its next calls are alike."""
    with torch.no_grad():
        for _ in range(calls):
            model(images[:_WARMUP_IMAGES].detach().clone())


@contextmanager
def without_graph(model: nn.Module) -> Iterator[None]:
    """Within, no parameter requires grad, so that a pass keeps no graph though gradients are enabled."""
    frozen = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_()
