"""The constants of a normalisation of images: the mean and the std per channel that a file of weights may hold."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastadv.models.split import Normalized
from fastadv.models.state_files import Foreign, is_dense

if TYPE_CHECKING:
    from fastadv.models.published import LoadReport

MEAN_NAMES = ("mean", "mu", "new_mean")
STD_NAMES = ("std", "sigma", "new_std")
_MAX_CHANNELS = 16  # of images; a longer vector called "mean" does not normalise them
_PICTURE_CHANNELS = (1, 3, 4)
_MAX_MEAN = 2.0  # of images in 0..1; a larger one is in the units of 0..255


def constants(state: Mapping[Any, Any]) -> dict[str, Tensor]:
    """The mean and the std per channel among the entries of a mapping; empty without both.

    They may be tensors, arrays of numpy's or lists.
    """
    found: dict[str, Tensor] = {}
    for names in (MEAN_NAMES, STD_NAMES):
        for name in names:
            value = _vector(state.get(name))
            if value is not None:
                found[name] = value
                break
    return found if len(found) == 2 else {}


def note_normalization(name: str, tensor: Tensor, report: LoadReport) -> bool:
    """Put the entry in the report if it is a normalisation constant, and return whether it is one."""
    last = name.rpartition(".")[2]
    kind = "mean" if last in MEAN_NAMES else "std" if last in STD_NAMES else None
    if kind is None or not is_dense(tensor) or tensor.numel() > _MAX_CHANNELS:
        return False
    values, earlier = tensor.flatten().tolist(), getattr(report, kind)
    if earlier is not None and earlier != values:
        raise ValueError(f"state normalises with two {kind}s, {earlier} and {values} ({name!r})")
    setattr(report, kind, values)
    return True


def set_normalization(model: Normalized, report: LoadReport) -> None:
    """Set the model's mean and std to the values in the file, where it has them."""
    mean, std = report.mean or [0.0], report.std or [1.0]
    if any(abs(value) > _MAX_MEAN for value in mean):
        raise ValueError(
            f"state normalises images in 0..255, with mean={mean}, std={std}, where the model takes them in 0..1; "
            "leave these entries out, and load the others into Normalized(model, mean / 255, std / 255)"
        )
    # The constructor refuses a wrong normalisation, such as a std of 0.
    checked = Normalized(nn.Identity(), as_many(mean, std), as_many(std, mean))
    for name in ("mean", "std"):
        if getattr(report, name) is not None:
            old: Tensor = getattr(model, name)
            setattr(model, name, getattr(checked, name).to(dtype=old.dtype, device=old.device))


def named_vector(state: Mapping[Any, Any], names: re.Pattern[str]) -> list[float] | None:
    """The first list of one number per channel with such a name."""
    for key, value in state.items():
        if isinstance(key, str) and names.fullmatch(key):
            vector = _vector(value)
            if vector is not None and is_dense(vector) and vector.numel() in _PICTURE_CHANNELS:
                return [round(number, 4) for number in vector.detach().double().flatten().tolist()]
    return None


def _vector(value: object) -> Tensor | None:
    """A tensor, an array or a list of numbers as a tensor; None for a single number, which may be a score."""
    if isinstance(value, Tensor):
        return value if value.dim() and value.numel() else None
    if isinstance(value, Foreign) and value.is_array:
        numbers = value.numbers
    elif isinstance(value, list | tuple):
        numbers = [n for one in value for n in _numbers(one)]
        if len(numbers) != len(value):
            return None
    else:
        return None
    return torch.tensor(numbers, dtype=torch.float64, device="cpu") if numbers else None


def _numbers(value: object) -> list[float]:
    if isinstance(value, Foreign):
        return value.numbers
    return [float(value)] if isinstance(value, float | int) else []


def as_many(values: list[float], others: list[float]) -> list[float]:
    """The values, repeated to the length of ``others`` if there is one value for all channels."""
    return values * len(others) if len(values) == 1 else values


def is_close(some: list[float], others: list[float] | None) -> bool:
    """Whether two vectors, or a vector and one number for all channels, are the same constants."""
    others = others or []
    some, others = as_many(some, others), as_many(others, some)
    return len(some) == len(others) and all(
        abs(a - b) < 1e-3 for a, b in zip(some, others, strict=True)
    )


def changes_images(mean: Sequence[float], std: Sequence[float]) -> bool:
    """Whether images are other numbers after a normalisation by these constants."""
    return any(mean) or set(std) != {1}
