"""Recognise the modules that `torch.compile` has made, and wrappers around a network."""

from __future__ import annotations

import sys
import types
import weakref
from typing import cast

import torch
from torch import nn

from fastadv.engine.named_code import named_by
from fastadv.engine.networks import modules_of


def is_compiled_wrapper(part: object) -> bool:
    """Whether `torch.compile` has made this module from another one.

    torch's compiler takes a second to import. If it has not been imported, there is no such module.
    """
    dynamo = sys.modules.get("torch._dynamo")
    kind = getattr(dynamo, "OptimizedModule", None)
    return kind is not None and isinstance(part, kind)


def has_compiled_parts(model: nn.Module) -> bool:
    """Whether `torch.compile` has made a part of a model, or a function that the model calls."""
    return any(
        is_compiled_wrapper(part) or part._compiled_call_impl is not None
        for part in modules_of(model)
    ) or _calls_compiled_functions(model)


_calling: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def _calls_compiled_functions(model: nn.Module) -> bool:
    """Whether the code of a model names functions that `torch.compile` has made; looked for once."""
    if "torch._dynamo" not in sys.modules:
        return False
    if model not in _calling:
        _calling[model] = any(
            type(value) is types.FunctionType and hasattr(value, "_torchdynamo_orig_callable")
            for _, value in named_by(model)
        )
    return _calling[model]


# The wrappers that only hand images on to a network, each with its forward method.
_WRAPPERS: dict[type[nn.Module], object] = {
    kind: kind.forward
    for kind in (
        nn.DataParallel,
        nn.parallel.DistributedDataParallel,
        torch.optim.swa_utils.AveragedModel,
    )
}


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside wrappers that only hand images on to it, and inside `torch.compile`'s."""
    while not _has_hooks(model):
        if is_compiled_wrapper(model) and _is_compiled_forward(model):
            model = cast(nn.Module, model._orig_mod)
        elif type(model) in _WRAPPERS and _has_forward(model, _WRAPPERS[type(model)]):
            model = cast(nn.Module, model.module)
        else:
            break
    return model


def _has_hooks(model: nn.Module) -> bool:
    """Whether hooks see the images or the result of a module, those for all modules included."""
    everywhere = nn.modules.module
    return bool(
        model._forward_hooks
        or model._forward_pre_hooks
        or everywhere._global_forward_hooks
        or everywhere._global_forward_pre_hooks
    )


def _has_forward(model: nn.Module, plain: object) -> bool:
    """Whether nobody has replaced the forward method of a module."""
    return getattr(model.forward, "__func__", None) is plain


def _is_compiled_forward(wrapper: nn.Module) -> bool:
    """Whether the forward method of a module that `torch.compile` has made is still the compiler's."""
    forward = wrapper.forward
    is_of_wrapper = getattr(forward, "__self__", None) is wrapper  # of a lazy network
    return is_of_wrapper or hasattr(forward, "_torchdynamo_orig_callable")
