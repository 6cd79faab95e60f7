"""A fingerprint of what a model computes, its weights aside: when it changes, a traced copy is stale."""

from __future__ import annotations

from typing import Any

from torch import nn

_PLAIN = (bool, int, float, str, type(None))


def structure_of(model: Any) -> tuple[Any, ...]:
    """Everything that tracing a model depends on and that can be compared cheaply.

    Args:
        model: a module; of another callable only the identity is known.

    Returns:
        A tuple that is equal for two calls when no module was replaced, no plain attribute (a flag, a number)
        changed, no hook added, and no parameter or buffer changed its shape, dtype or device.
    """
    if not isinstance(model, nn.Module):
        return (id(model),)
    return tuple(
        (name, id(module), type(module), _plain_attributes(module), _tensors(module))
        for name, module in model.named_modules()
    )


def _plain_attributes(module: nn.Module) -> tuple[Any, ...]:
    hooks = len(module._forward_hooks) + len(module._forward_pre_hooks)
    hooks += len(module._backward_hooks) + len(module._backward_pre_hooks)
    attributes = (
        (name, value)
        for name, value in vars(module).items()
        # The attack restores the mode, and the copy is made in eval mode whatever it is now.
        if name != "training" and isinstance(value, _PLAIN)
    )
    return (hooks, *attributes)


def _tensors(module: nn.Module) -> tuple[Any, ...]:
    owned = (*module._parameters.items(), *module._buffers.items())
    return tuple(
        (name, tensor.shape, tensor.dtype, tensor.device)
        for name, tensor in owned
        if tensor is not None
    )
