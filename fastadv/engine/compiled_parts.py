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


_WRAPPERS = (
    nn.DataParallel,
    nn.parallel.DistributedDataParallel,
    torch.optim.swa_utils.AveragedModel,
)


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside wrappers that only hand images on to it, and inside `torch.compile`'s."""
    while not (model._forward_hooks or model._forward_pre_hooks):
        if is_compiled_wrapper(model):
            model = cast(nn.Module, model._orig_mod)
        elif type(model) in _WRAPPERS:
            model = cast(nn.Module, model.module)
        else:
            break
    return model
