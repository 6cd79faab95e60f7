"""A normalisation of images at which a file of weights hints without holding it, and the doubt that follows."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from torch import nn

from fastadv.models.normalization_constants import changes_images, is_close, named_vector
from fastadv.models.own_normalization import own_normalization
from fastadv.models.split import Normalized, without_normalization
from fastadv.models.state_files import Foreign
from fastadv.models.weight_search import MAX_DEPTH

if TYPE_CHECKING:
    from fastadv.models.published import LoadReport

# Names of constants among the options of a training, such as "data_mean" and "img_std".
_ANY_MEAN = re.compile(r"(\w+_)?(mean|mu)s?", re.IGNORECASE)
_ANY_STD = re.compile(r"(\w+_)?(std|sigma|sd)s?", re.IGNORECASE)
# A prefix such as "1.": the network is not the first part of an nn.Sequential.
_LATER_PART = re.compile(r"(.*\.)?[1-9]\d*\.")

# Networks that may lack the normalisation of their training. The figures of these are in doubt.
_DOUBTED: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def doubt_about_normalization(model: object) -> str:
    """The doubt about a model whose file only hinted at a normalisation; empty without doubt.

    A module around the network, such as a `Normalized` with a mean and a std, ends the doubt.
    """
    if not isinstance(model, nn.Module) or _normalizes(model):
        return ""
    return _DOUBTED.get(without_normalization(model), "")


def trust_normalization(network: nn.Module) -> None:
    """End the doubt about a network, as its user has named the normalisation."""
    _DOUBTED.pop(network, None)


def warn_of_lost_normalization(model: nn.Module, state: object, report: LoadReport) -> None:
    """Warn where a file hints at a normalisation that it does not hold, and the model does not normalise.

    `doubt_about_normalization` tells of it later.

    Args:
        model: the model that has been filled.
        state: the saved object.
        report: what was loaded, with the normalisation that the file holds.
    """
    network = without_normalization(model)
    trust_normalization(network)
    if report.mean is not None or report.std is not None or _normalizes(model):
        return
    advice = (
        "If the network was trained on normalised images, load it into Normalized(model, mean, std) "
        "(fastadv eval --normalise MEAN STD), because without it every figure is of another function; if it was "
        "not, --normalise 0 1 says so"
    )
    hint, own = next(_hints(state), None), own_normalization(network)
    if hint is not None:
        place, mean, std = hint
        if own is not None and is_close(own[1], mean) and is_close(own[2], std):
            return
        found = f"state{place} has a mean {mean} and a std {std}, which are not applied"
    elif _LATER_PART.fullmatch(report.prefix) and own is None:
        found = (
            f"the names in state begin with {report.prefix!r}: before the network stood another module, without "
            "weights in the file, and often it normalises the images"
        )
    else:
        return
    _DOUBTED[network] = f"the network may lack the normalisation of its training: {found}"
    warnings.warn(f"{found}. {advice}", stacklevel=3)


def _normalizes(model: nn.Module) -> bool:
    """Whether a model normalises its inputs."""
    if not isinstance(model, Normalized):
        return False
    return bool((model.mean != 0).any() or (model.std != 1).any())


def _hints(state: object, place: str = "") -> Iterator[tuple[str, list[float], list[float]]]:
    """Means and stds of pictures anywhere in a saved object, with the keys that lead to them."""
    if isinstance(state, Foreign):
        state = state.state  # the attributes of an argparse.Namespace
    if not isinstance(state, Mapping) or place.count("[") > MAX_DEPTH:
        return
    mean, std = (named_vector(state, names) for names in (_ANY_MEAN, _ANY_STD))
    if mean is not None and std is not None and min(std) > 0 and changes_images(mean, std):
        yield place, mean, std
    for key, value in state.items():
        if isinstance(key, str):
            yield from _hints(value, f"{place}[{key!r}]")
