"""Checks of an attack's arguments, made before anything is computed."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Literal, get_type_hints

import torch
from torch import Tensor, nn

from fastadv.attacks.soft_labels import check_probabilities, check_soft_labels, is_soft
from fastadv.engine.engines import Model
from fastadv.ops import checks
from fastadv.ops.pgd_step_per_channel import Bounds
from fastadv.ops.values import largest_radius

Precision = Literal["auto", "fp32", "bf16", "fp16"]
EngineName = Literal["auto", "fixed", "eager", "compiled", "graph"]
TrainMode = bool | Literal["moving"]


def check_seed(seed: object) -> int | None:
    """Check that a seed is None or an integer of 64 bits, and return it as a Python integer.

    Raises:
        TypeError: if it is neither.
        ValueError: if it has more than 64 bits.
    """
    return None if seed is None else checks.check_seed(seed)  # type: ignore[arg-type]


def check_model(model: Model) -> Model:
    """Check that a model is a module or another callable, and neither a class nor a function that makes a module.

    Raises:
        TypeError: if it is not.
    """
    if isinstance(model, type):
        raise TypeError(
            f"model must be a module or a callable, got the class {model.__name__}; make the module first: "
            f"{model.__name__}(...)"
        )
    if inspect.isfunction(model) and _makes_a_module(model):
        raise TypeError(
            f"model must be a module or a callable, got {model.__name__}, a function that makes a module; call it "
            f"first: {model.__name__}(...)"
        )
    if not callable(model):
        hint = "; model.load_state_dict takes a state dict" if isinstance(model, Mapping) else ""
        raise TypeError(f"model must be a module or a callable, got {type(model).__name__}{hint}")
    return model


def _makes_a_module(function: Callable[..., object]) -> bool:
    """Whether a function is annotated to return a module, as `fastadv.models.resnet18` is."""
    try:
        found = get_type_hints(function).get("return")
    except (NameError, TypeError):  # a name in the annotations may be known only to type checkers
        return False
    return isinstance(found, type) and issubclass(found, nn.Module)


def check_batch(
    x: Tensor,
    y: Tensor | None,
    sample_ids: Tensor | None,
    model: Model,
    soft_obstacle: str | None,
    labels_obstacle: str | None = "for this attack",
) -> Tensor:
    """Check shapes, dtypes and devices of a batch; nothing is read from the device.

    Args:
        x: images.
        y: labels, or None.
        sample_ids: numbers of the samples, or None.
        model: the model.
        soft_obstacle: the reason why the attack accepts no soft labels; None if it accepts them.
        labels_obstacle: the reason why the attack needs labels; None if it does not look at them.

    Returns:
        The labels in int64, soft labels in float32 or float64. Without labels, class 0 for each image.

    Raises:
        TypeError: if ``x`` is no float tensor, ``y`` no tensor of labels, ``sample_ids`` no tensor, or the model
            not callable.
        ValueError: if shapes or devices do not fit.
        RuntimeError: inside a transform of `torch.func`.
    """
    check_model(model)
    checks.check_float("x", x)
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise RuntimeError(
            "an attack must run outside the transforms of torch.func, such as grad and vmap; attack the whole "
            "batch before"
        )
    if x.dim() < 2:
        raise ValueError(f"x must have shape [B, ...] with at least two axes, got {tuple(x.shape)}")
    if 0 in x.shape[1:]:
        raise ValueError(f"x must have images with elements, got shape {tuple(x.shape)}")
    if x.dim() == 3 and x.shape[0] != 1 and isinstance(y, Tensor) and y.shape in ((), (1,)):
        raise ValueError(
            f"x must have shape [B, ...], got {tuple(x.shape)} with one label; of a single image pass "
            "x.unsqueeze(0) and y.reshape(1)"
        )
    if y is None:
        if labels_obstacle is not None:
            raise TypeError(f"y must be the labels [B] {labels_obstacle}, got None")
        y = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
    if is_soft(y):
        labels = check_soft_labels(y, x.shape[0], soft_obstacle)
    else:
        labels = checks.class_labels("y", y, x.shape[0])
    if y.device != x.device:
        raise ValueError(f"y must be on the device of x, {x.device}, got {y.device}")
    if not isinstance(sample_ids, Tensor | None):
        raise TypeError(f"sample_ids must be an int64 tensor, got {type(sample_ids).__name__}")
    checks.check_sample_ids(sample_ids, x)
    device = module_device(model)
    if device is not None and device != x.device:
        raise ValueError(f"model must be on the device of x, {x.device}, got {device}")
    return labels


def check_images(x: Tensor, bounds: Bounds) -> None:
    """Check the values of the images; on a GPU this waits for the device once.

    Raises:
        ValueError: an image is not finite or outside the bounds.
    """
    if any(isinstance(bound, Tensor) for bound in bounds):
        _check_within(x, bounds)
        return
    low, high = x.aminmax()
    found = torch.stack((low.double(), high.double())).tolist()
    limits = torch.tensor(bounds, dtype=x.dtype, device="cpu")  # rounded to the images' dtype
    lowest, highest = limits.tolist()
    if not (lowest <= found[0] and found[1] <= highest):  # also where one of them is NaN
        raise ValueError(
            f"x must be finite and within bounds {tuple(bounds)}, got values from {found[0]:.9g} to "
            f"{found[1]:.9g}; {_remedy(found[0], found[1], highest)}"
        )


def _remedy(low: float, high: float, bound: float) -> str:
    """What may be wrong with images whose values go from ``low`` to ``high``, beyond the upper ``bound``."""
    if bound == 1 and low >= 0 and 2 < high <= 255:
        return "images of 0..255 must be divided by 255"
    return "normalisation belongs inside the model"


def _check_within(x: Tensor, bounds: Bounds) -> None:
    """`check_images` where a bound is a tensor; the rounding of a normalisation may lead a little out of it."""
    low, high = (torch.as_tensor(bound, dtype=x.dtype, device=x.device) for bound in bounds)
    slack = 4 * torch.finfo(x.dtype).eps * torch.maximum(low.abs(), high.abs())
    outside = int((~((x >= low - slack) & (x <= high + slack))).sum())  # NaN among them
    if outside:
        raise ValueError(
            f"x must be finite and within bounds, which differ by channel, got {outside} of {x.numel()} elements "
            "that are not"
        )


def check_limits(name: str, values: float | Tensor | None, largest: float = math.inf) -> None:
    """Check the values of radii or step sizes, if they are a tensor; on a GPU this waits for the device once.

    Args:
        name: name of the argument.
        values: the numbers.
        largest: the largest allowed number.

    Raises:
        ValueError: if a number is negative, not finite or too large.
    """
    if not isinstance(values, Tensor) or values.numel() == 0:
        return
    low, high = torch.stack(values.detach().double().aminmax()).tolist()
    if not (low >= 0 and high < math.inf and high <= largest * (1 + 1e-6)):  # also where one is NaN
        most = (
            "" if largest == math.inf else f" and at most {largest:.6g}, in the units of the images"
        )
        raise ValueError(
            f"{name} must be finite and >= 0{most}, got values from {low:.6g} to {high:.6g}"
        )


def check_step_sizes(alpha: float | Tensor | None, norm: str, bounds: Bounds) -> None:
    """Check the step sizes of a call; on a GPU this waits for the device where they are a tensor.

    Raises:
        ValueError: if one is negative, not finite, or as in `check_step`.
    """
    check_limits("alpha", alpha)
    if alpha is None or norm != "linf" or (isinstance(alpha, Tensor) and alpha.numel() == 0):
        return
    check_step(float(alpha.max()) if isinstance(alpha, Tensor) else alpha, bounds)


def check_step(alpha: float, bounds: Bounds) -> None:
    """Refuse a step in linf that leads from any image to a corner. It must be in other units.

    Raises:
        ValueError: if the step is at least twice the width of the bounds, unless they are tensors.
    """
    longest = 2 * largest_radius(bounds, "linf", 1)
    if alpha >= longest > 0:
        raise ValueError(
            f"alpha must be below {longest:g}, twice the width of the bounds, got {alpha:g}; it is in the units "
            "of the images: 2/255 of 0..1, say"
        )


def check_start(start: Tensor) -> None:
    """Check the values of points to start from; on a GPU this waits for the device once.

    Raises:
        ValueError: if a value is not finite.
    """
    lowest, highest = torch.stack(start.aminmax()).tolist()
    if not (math.isfinite(lowest) and math.isfinite(highest)):
        raise ValueError(f"start must be finite, got values from {lowest:.9g} to {highest:.9g}")


def check_labels(y: Tensor, num_classes: int) -> None:
    """Check the values of the labels; on a GPU this waits for the device once.

    Raises:
        ValueError: if a label is out of range, or soft labels are not probabilities of the model's classes.
    """
    if is_soft(y):
        check_probabilities(y, num_classes)
        return
    if y.numel() == 0:
        return
    first, last = torch.stack(y.aminmax()).tolist()
    if not (first >= 0 and last < num_classes):
        raise ValueError(
            f"y must be in 0 .. {num_classes - 1}, the model's {num_classes} classes, got values "
            f"from {first} to {last}"
        )


def module_device(model: object) -> torch.device | None:
    """The device of a module's first parameter or buffer; None for other callables."""
    if not isinstance(model, nn.Module):
        return None
    first = next(chain(model.parameters(), model.buffers()), None)
    return None if first is None else first.device
