"""The normalisation of images that a network's own modules compute, which must not be applied a second time."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fastadv.models.normalization_constants import (
    MEAN_NAMES,
    STD_NAMES,
    changes_images,
    is_close,
    named_vector,
)

if TYPE_CHECKING:
    from fastadv.models.published import LoadReport

# Names of constants of modules, whose other means and stds, such as those of a layer, have longer names.
_OWN_MEAN = re.compile(
    r"((data|image|img|pixel|input|norm(alize)?)_)?(mean|mu|new_mean)s?", re.IGNORECASE
)
_OWN_STD = re.compile(
    r"((data|image|img|pixel|input|norm(alize)?)_)?(std|sigma|new_std)s?", re.IGNORECASE
)


def own_normalization(
    network: nn.Module, loaded: Mapping[str, Tensor] = MappingProxyType({})
) -> tuple[str, list[float], list[float]] | None:
    """The normalisation that one of a network's own modules holds, in parameters, buffers or plain attributes.

    Args:
        network: the network, without a `Normalized` around it.
        loaded: tensors that are to take the place of the network's own, by name.

    Returns:
        The module's name, the mean and the std; None if there is none, or if the mean is 0.
    """
    for place, module in network.named_modules():
        held: dict[str, Any] = dict(vars(module))
        held.update(module.named_buffers(recurse=False))
        held.update(module.named_parameters(recurse=False))
        prefix = f"{place}." if place else ""
        held.update({name: loaded[prefix + name] for name in held if prefix + name in loaded})
        mean, std = (named_vector(held, names) for names in (_OWN_MEAN, _OWN_STD))
        # A module that adds noise may have a mean of 0 and a std.
        if mean is not None and std is not None and any(mean) and min(std) > 0:
            return place, mean, std
    return None


def leave_to_network(network: nn.Module, loaded: Mapping[str, Tensor], report: LoadReport) -> None:
    """Apply no normalisation of a file that the network applies by itself.

    Args:
        network: the network, without a `Normalized` around it.
        loaded: the entries of the file that the network takes.
        report: what was found in the file. Its mean and std become None if they are the network's own.

    Raises:
        ValueError: the network normalises by other numbers than the file.
    """
    own = own_normalization(network, loaded)
    if own is None or not report.normalizes:
        return
    place, mean, std = own
    if not (is_close(mean, report.mean) and is_close(std, report.std)):
        raise ValueError(
            f"state normalises with mean={report.mean}, std={report.std}, and the model by itself with "
            f"mean={mean}, std={std}{_in_module(place)}; leave the wrong ones out of the file or of the model"
        )
    report.mean = report.std = None
    prefix = f"{place}." if place else ""
    if not any(prefix + name in loaded for name in MEAN_NAMES):
        warnings.warn(
            f"state normalises with a mean {mean} and a std {std}, which are applied once: by the model "
            f"itself{_in_module(place)}. If the forward pass does not use them there, every figure is of another "
            "function",
            stacklevel=3,
        )


def without_own_constants(network: nn.Module, missing: list[str]) -> list[str]:
    """The names that a file lacks, without the constants of a normalisation that the network's code has set.

    RobustBench's networks have such buffers, and the files of their authors do not.
    """
    own = own_normalization(network)
    if own is None:
        return missing
    prefix = f"{own[0]}." if own[0] else ""
    constant = {prefix + name for name in (*MEAN_NAMES, *STD_NAMES)}
    constant -= {name for name, p in network.named_parameters() if p.requires_grad}  # untrained
    return [name for name in missing if name not in constant]


def refuse_second_normalization(
    network: nn.Module, mean: Sequence[float], std: Sequence[float]
) -> None:
    """Check that a network has no normalisation of its own where its user names one.

    Raises:
        ValueError: it has one, and the named one would change the images, too.
    """
    own = own_normalization(network)
    if own is not None and changes_images(mean, std):
        raise ValueError(
            f"normalise must be left out, because the network normalises by itself, with mean {own[1]} and std "
            f"{own[2]}{_in_module(own[0])}"
        )


def _in_module(place: str) -> str:
    return f" in its module {place!r}" if place else ""
