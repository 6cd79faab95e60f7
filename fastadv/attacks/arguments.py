"""Checks of an attack's arguments, made before anything is computed."""

from __future__ import annotations

from numbers import Integral, Real

import torch
from torch import Tensor, nn

from fastadv.engine.precision import PRECISIONS
from fastadv.ops import checks
from fastadv.ops.pgd_step import NORMS

ENGINES = ("auto", "eager", "compiled", "graph")


def check_common(*, norm: str, bounds: tuple[float, float], precision: str, engine: str) -> None:
    """Check what every attack is told.

    Raises:
        TypeError: a bound is no number.
        ValueError: a value out of range or an unknown word, named in the message.
    """
    checks.check_choice("norm", norm, NORMS)
    if isinstance(bounds, (tuple, list)):
        for number in bounds:
            check_number("bounds", number)
    checks.check_bounds(bounds)
    checks.check_choice("precision", precision, PRECISIONS)
    checks.check_choice("engine", engine, ENGINES)


def check_limit(name: str, value: object) -> None:
    """Require a finite number that is not negative, such as a radius or a step size.

    Raises:
        TypeError: it is no number.
        ValueError: it is negative or not finite.
    """
    check_number(name, value)
    checks.check_finite_at_least_zero(name, float(value))  # type: ignore[arg-type]


def check_count(name: str, value: object) -> None:
    """Require an integer of at least 1.

    Raises:
        TypeError: it is no integer.
        ValueError: it is below 1.
    """
    check_integer(name, value)
    if value < 1:  # type: ignore[operator]
        raise ValueError(f"{name} must be >= 1, got {value}")


def check_number(name: str, value: object) -> None:
    """Require a Python or numpy number; a tensor or the text "8/255" is none.

    Raises:
        TypeError: it is no number.
    """
    if not isinstance(value, Real) or isinstance(value, bool):
        found = (
            f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        )
        raise TypeError(f"{name} must be a number, got {found}")


def check_integer(name: str, value: object) -> None:
    """Require a Python or numpy integer.

    Raises:
        TypeError: it is no integer.
    """
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")


def check_seed(seed: object) -> int | None:
    """Require None or an integer of 64 bits, and return it as Python's.

    Raises:
        TypeError: it is neither.
        ValueError: it has more than 64 bits.
    """
    if seed is None:
        return None
    check_integer("seed", seed)
    number = int(seed)  # type: ignore[call-overload]
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"seed must be in -2**63 .. 2**63 - 1, got {number}")
    return number


def check_batch(x: Tensor, y: Tensor, sample_ids: Tensor | None, model: object) -> None:
    """Check shapes, dtypes and devices of a batch; nothing is read from the device.

    Raises:
        TypeError: ``x`` is no float tensor, ``y`` no int64 tensor, ``sample_ids`` no tensor, the model not
            callable.
        ValueError: shapes or devices do not fit.
    """
    if not callable(model):
        raise TypeError(f"model must be a module or a callable, got {type(model).__name__}")
    checks.check_float("x", x)
    if x.dim() < 2:
        raise ValueError(f"x must have shape [B, ...] with at least two axes, got {tuple(x.shape)}")
    if not isinstance(y, Tensor) or y.dtype != torch.int64:
        kind = y.dtype if isinstance(y, Tensor) else type(y).__name__
        raise TypeError(f"y must be an int64 tensor of class indices, got {kind}")
    if y.shape != x.shape[:1]:
        raise ValueError(f"y must have shape ({x.shape[0]},), got {tuple(y.shape)}")
    if y.device != x.device:
        raise ValueError(f"y must be on the device of x, {x.device}, got {y.device}")
    if not isinstance(sample_ids, Tensor | None):
        raise TypeError(f"sample_ids must be an int64 tensor, got {type(sample_ids).__name__}")
    checks.check_sample_ids(sample_ids, x)
    device = module_device(model)
    if device is not None and device != x.device:
        raise ValueError(f"model must be on the device of x, {x.device}, got {device}")


def check_images(x: Tensor, bounds: tuple[float, float]) -> None:
    """Check the values of the images; on a GPU this waits for the device once.

    Raises:
        ValueError: an image is not finite or outside the bounds.
    """
    low, high = x.aminmax()
    found = torch.stack((low.double(), high.double())).tolist()
    limits = torch.tensor(bounds, dtype=x.dtype, device="cpu")  # as the images can have them
    lowest, highest = limits.tolist()
    if not (lowest <= found[0] and found[1] <= highest):  # also where one of them is NaN
        raise ValueError(
            f"x must be finite and within bounds {tuple(bounds)}, got values from {found[0]:.9g} to "
            f"{found[1]:.9g}; normalisation belongs inside the model"
        )


def check_labels(y: Tensor, num_classes: int) -> None:
    """Check the values of the labels; on a GPU this waits for the device once.

    Raises:
        ValueError: a label is out of range.
    """
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
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return None
