"""A fingerprint of what a model computes, its weights aside: when it changes, a traced copy is stale."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)
_SMALL = 4096  # elements
# What every module has: modes, which the attack sets and restores, hooks and tensors, which are read below.
_COMMON = frozenset(vars(nn.Module()))


def structure_of(model: Any) -> tuple[Any, ...]:
    """Everything that tracing a model depends on and that can be compared cheaply.

    Args:
        model: a module; of another callable only the identity is known.

    Returns:
        A tuple that is equal for two calls when no module was replaced, no plain attribute (a flag, a number,
        a function, a list of them) changed, no hook added, and no parameter or buffer changed its shape,
        dtype or device.
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
    own = ((name, value) for name, value in vars(module).items() if name not in _COMMON)
    return (hooks, *((name, _comparable(value)) for name, value in own))


def _comparable(value: Any) -> Any:
    """The value itself, a container's values, a function's identity; None for what cannot be compared.

    A small tensor that is no buffer, such as the mean of the images, counts by identity and version:
    tracing may have computed with it. Large ones are activations that a model keeps.
    """
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Tensor) and value.numel() <= _SMALL and not value.is_inference():
        return (id(value), value._version)
    if isinstance(value, (list, tuple)):
        return tuple(_comparable(item) for item in value)
    if isinstance(value, dict):
        return tuple((str(key), _comparable(item)) for key, item in value.items())
    return id(value) if callable(value) and not isinstance(value, (Tensor, nn.Module)) else None


def _tensors(module: nn.Module) -> tuple[Any, ...]:
    owned = (*module._parameters.items(), *module._buffers.items())
    return tuple(
        (name, tensor.shape, tensor.dtype, tensor.device)
        for name, tensor in owned
        if tensor is not None
    )
