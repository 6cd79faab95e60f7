"""Checks of the values that a method returns.

They read only types, shapes and dtypes, so they do not wait for the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from fastadv.trainers.method import Method, TrainBatch

# Names of a record that the loop itself writes, besides `seconds_...`.
RESERVED = frozenset(
    {"kind", "step", "epoch", "lr", "loss", "grad_norm", "bad_steps", "images_per_second"}
)


def check_attacked(method: Method[Any, Any], attacked: object, batch: TrainBatch) -> None:
    """Check the result of `attack`.

    Raises:
        TypeError: if it is not an `Attacked`, or does not hold a tensor of floats.
        ValueError: if its images do not have the size of the batch's images.
    """
    from fastadv.trainers.method import Attacked

    where = f"{type(method).__name__}.attack"
    if not isinstance(attacked, Attacked):
        raise TypeError(
            f"{where} must return Attacked(x), or a subclass of it, got {described(attacked)}"
        )
    x = attacked.x
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(
            f"{where} must return Attacked(x) with x a tensor of float images, got {described(x)}"
        )
    if x.shape[1:] != batch.x.shape[1:]:
        raise ValueError(
            f"{where} must return Attacked(x) with images {_shape(batch.x)}, got {described(x)}"
        )


def check_loss(method: Method[Any, Any], result: object) -> None:
    """Check the result of `training_loss`, or the loss that `step` gives to the update.

    Raises:
        TypeError: if it is not a `LossResult`, or does not hold tensors.
        ValueError: if the loss or a metric is not a scalar, if the loss has no gradient, or if a metric has a name
            that the loop uses.
    """
    from fastadv.trainers.method import LossResult

    where = f"{type(method).__name__}.training_loss"
    if not isinstance(result, LossResult):
        raise TypeError(f"{where} must return LossResult(loss, metrics), got {described(result)}")
    loss = result.loss
    if not isinstance(loss, Tensor) or not loss.is_floating_point():
        raise TypeError(
            f"{where} must return LossResult(loss, metrics) with loss a scalar tensor of floats, "
            f"got {described(loss)}"
        )
    if loss.shape != ():
        raise ValueError(
            f"{where} must return a scalar loss, such as batch.mean(losses), got {described(loss)}"
        )
    if not loss.requires_grad:
        raise ValueError(
            f"{where} must return a loss with a gradient to the trained model, got one without: was it computed "
            "under torch.no_grad(), or from detached tensors?"
        )
    check_scalars(where, "metrics", result.metrics)


def check_scalars(where: str, what: str, values: object) -> None:
    """Check scalars that will be logged.

    Args:
        where: the function that returned them, for messages.
        what: the name of the values, for messages.
        values: the returned values.

    Raises:
        TypeError: if they are not a mapping of names to real tensors.
        ValueError: if a value is not a scalar, or has a name that the loop uses.
    """
    if not isinstance(values, Mapping):
        raise TypeError(
            f"{where}: {what} must be a dict of scalar tensors by name, got {described(values)}"
        )
    for name, value in values.items():
        if not isinstance(name, str):
            raise TypeError(f"{where}: names of {what} must be text, got {name!r}")
        if name in RESERVED or name.startswith("seconds_"):
            raise ValueError(
                f"{where}: {what} must not be called {name!r}, as the loop writes this itself"
            )
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{where}: {what}[{name!r}] must be a scalar tensor, got {described(value)}"
            )
        if value.shape != ():
            raise ValueError(
                f"{where}: {what}[{name!r}] must be a scalar, such as the mean over the batch, "
                f"got {described(value)}"
            )
        if value.is_complex():
            raise TypeError(f"{where}: {what}[{name!r}] must be real, got {described(value)}")


def check_trainable(method: Method[Any, Any]) -> None:
    """Check the results of `trainable` and `passes`, before the first step.

    Raises:
        TypeError: if `trainable` does not return modules by name, or `passes` does not return a number.
        ValueError: if `trainable` returns no module.
    """
    kind, models = type(method).__name__, method.trainable()
    good = isinstance(models, dict) and all(
        isinstance(name, str) and isinstance(model, nn.Module) for name, model in models.items()
    )
    if not good:
        raise TypeError(
            f"{kind}.trainable must return a dict of modules by name, got {described(models)}"
        )
    if not models:
        raise ValueError(f"{kind}.trainable must return at least one model, got an empty dict")
    passes = method.passes(0)
    if not isinstance(passes, int | float) or isinstance(passes, bool):
        raise TypeError(
            f"{kind}.passes must return a number of forward passes per image, got {described(passes)}"
        )


def described(value: object) -> str:
    """Return a description of a value: a tensor's shape and dtype, a number or a text itself, or the type."""
    if isinstance(value, Tensor):
        return f"a tensor {_shape(value)} of {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    if value is None or isinstance(value, int | float | str):
        return repr(value)
    return f"a {type(value).__name__}"


def _shape(value: torch.Tensor) -> str:
    return str(list(value.shape))
