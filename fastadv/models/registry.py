"""Models by name: our own, timm's, and factories of other packages."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from fastadv.imports import import_named, working_directory_kept
from fastadv.models.imagenet_resnet import resnet18_imagenet, resnet50
from fastadv.models.preact_resnet import preact_resnet18
from fastadv.models.resnet import resnet18
from fastadv.models.small_cnn import small_cnn
from fastadv.models.stack import Stack
from fastadv.models.vgg import vgg16_bn
from fastadv.models.wide_resnet import WideResNet, wrn_28_10, wrn_34_10
from fastadv.ops.values import did_you_mean, integer, shown

ModelFactory = Callable[..., nn.Module]
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_.]+")
# Wide residual networks of any size. The sizes used in the papers are listed below.
_WIDE = re.compile(r"wrn_(?P<depth>[1-9][0-9]{0,3})_(?P<widen>[1-9][0-9]{0,2})")

_FACTORIES: dict[str, ModelFactory] = {
    "resnet18": resnet18,
    "resnet18_layer2_stride1": partial(resnet18, layer2_stride=1),
    "preact_resnet18": preact_resnet18,
    "preact_resnet18_raw_shortcut": partial(preact_resnet18, raw_shortcut=True),
    "preact_resnet18_no_last_norm": partial(preact_resnet18, final_norm=False),
    "preact_resnet18_raw_shortcut_no_last_norm": partial(
        preact_resnet18, raw_shortcut=True, final_norm=False
    ),
    "wrn_28_10": wrn_28_10,
    "wrn_34_10": wrn_34_10,
    "vgg16_bn": vgg16_bn,
    "small_cnn": small_cnn,
    "resnet50": resnet50,
    "resnet18_imagenet": resnet18_imagenet,
}


def model_names() -> list[str]:
    """Return the names of the models that fastadv has itself."""
    return list(_FACTORIES)


def create_model(
    name: str, num_classes: int = 10, in_channels: int = 3, **options: Any
) -> nn.Module:
    """Build a model with fresh weights.

    Args:
        name: one of four forms:

            - a name from `model_names()`; case does not matter, and "wrn-34-10" is "wrn_34_10"; or "wrn_D_W", a
              wide residual network of depth D, which must be 6 n + 4, and width W, such as "wrn_28_30";
            - "timm:NAME" for any model of timm, which must be installed;
            - "stack:NAME+NAME" for several such networks under one linear merger, see `Stack`; "stack:3*NAME" for
              three networks of the same name;
            - "package.module:function" for a factory of your own. It is called with `num_classes` and
              `in_channels`, where it has arguments of these names.
        num_classes: number of logits, at least 1.
        in_channels: channels of the images, at least 1.
        **options: passed on to the factory, e.g. `final_norm=False` for "preact_resnet18".

    Returns:
        The model. fastadv's models and most of timm's have the feature split; see `check_feature_split`.

    Raises:
        ValueError: for an unknown name or a number below 1.
        ImportError: if timm or the factory's module cannot be imported.
        TypeError: if a number is no integer, or a factory does not return a module.
    """
    for argument, value in (("num_classes", num_classes), ("in_channels", in_channels)):
        integer(argument, value, at_least=1)
    if not isinstance(name, str):
        raise TypeError(f"name must be text, got {shown(name)}")
    source, colon, rest = name.partition(":")
    if not colon:
        factory = _own_factory(name)
        return factory(num_classes=num_classes, in_channels=in_channels, **options)
    if source == "timm":
        return _create_timm(rest, num_classes, in_channels, options)
    if source == "stack":
        names = stacked_names(rest)
        return Stack(
            [create_model(n, num_classes, in_channels, **options) for n in names], num_classes
        )
    return _create_from_factory(source, rest, num_classes, in_channels, options)


def stacked_names(names: str) -> list[str]:
    """Return the names in the part of a stack's name behind "stack:": a, a, b for "2*a+b".

    Raises:
        ValueError: if a name is empty or a number is not at least 1.
    """
    found: list[str] = []
    for part in names.split("+"):
        count, star, name = part.rpartition("*")
        if not name or (star and not (count.isdecimal() and int(count) >= 1)):
            raise ValueError(
                f"name must be 'stack:' and names joined by '+', each with 'N*' before it for N of them, "
                f"got 'stack:{names}'"
            )
        found += [name] * (int(count) if star else 1)
    return found


def check_plain_name(argument: str, name: str | None) -> None:
    """Refuse a model name that makes Python import code of the user's: the files of a run must not name such code.

    Raises:
        ValueError: naming the argument.
    """
    if name is not None and ":" in name.removeprefix("timm:"):
        raise ValueError(
            f"{argument} must be the name of a model of fastadv or 'timm:NAME', got {name!r}"
        )


def names_code(name: str) -> bool:
    """Return whether a name stands for code that is not fastadv's or timm's own, or makes timm fetch something.

    Such a name is accepted only from the user. A file must not decide which code runs.

    Args:
        name: what `create_model` takes.
    """
    if not isinstance(name, str):
        return False
    source, colon, rest = name.partition(":")
    if source == "stack":
        parts = (part.rpartition("*")[2] for part in rest.split("+"))
        return any(names_code(part) for part in parts)
    if source == "timm":
        # timm takes "hf-hub:..." and "local-dir:..." for models of its hub and of folders.
        return _PLAIN_NAME.fullmatch(rest) is None or _timm_is_beside()
    return bool(colon)


def _timm_is_beside() -> bool:
    """Whether the module that would be imported as timm lies in the current directory, beside the user's files."""
    if "timm" in sys.modules:
        return False
    try:
        spec = importlib.util.find_spec("timm")
    except (ImportError, ValueError):
        return False
    if spec is None or spec.origin is None:
        return False
    file = Path(spec.origin).resolve()
    return Path.cwd().resolve() in (file.parent, file.parent.parent)


def check_model_name(argument: str, name: str) -> None:
    """Check the name of a model, where that needs neither timm nor code of the user's.

    Args:
        argument: the argument that the name was given as, for messages.
        name: what `create_model` takes.

    Raises:
        ValueError: if there is no such model.
    """
    source, colon, rest = name.partition(":")
    names = stacked_names(rest) if source == "stack" else [] if colon else [name]
    for one in names:
        if ":" not in one:
            _own_factory(one, argument)


def _own_factory(name: str, argument: str = "name") -> ModelFactory:
    key = name.lower().replace("-", "_")
    if key in _FACTORIES:
        return _FACTORIES[key]
    if size := _WIDE.fullmatch(key):
        return partial(WideResNet, int(size["depth"]), int(size["widen"]))
    raise ValueError(
        f"{argument} must be one of {', '.join(_FACTORIES)}, 'wrn_DEPTH_WIDTH', 'timm:NAME', 'stack:NAME+NAME' or "
        f"'package.module:function', got {name!r}{did_you_mean(name, _FACTORIES)}"
    )


def _create_timm(
    name: str, num_classes: int, in_channels: int, options: dict[str, Any]
) -> nn.Module:
    try:
        timm: Any = importlib.import_module("timm")
    except Exception as error:  # a torchvision that does not fit torch raises RuntimeError
        raise ImportError(
            f"model 'timm:{name}' needs timm, which cannot be imported here ({error}). Install it "
            "with `pip install timm`, together with a torchvision built for the installed torch"
        ) from error
    return timm.create_model(name, num_classes=num_classes, in_chans=in_channels, **options)


def _create_from_factory(
    module_name: str, attribute: str, num_classes: int, in_channels: int, options: dict[str, Any]
) -> nn.Module:
    label = f"{module_name}:{attribute}"
    with working_directory_kept():
        factory = import_named(label, "model", "function")
        if not callable(factory):
            raise ImportError(f"model {label!r}: {module_name} has no function {attribute!r}")
        offered = {"num_classes": num_classes, "in_channels": in_channels}
        model = factory(**_accepted(factory, offered), **options)
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model {label!r} must return a torch.nn.Module, got {type(model).__name__}"
        )
    return model


def _accepted(factory: Callable[..., Any], offered: dict[str, int]) -> dict[str, int]:
    """The offered arguments that the factory takes by name."""
    parameters = inspect.signature(factory).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return offered
    return {name: value for name, value in offered.items() if name in parameters}
