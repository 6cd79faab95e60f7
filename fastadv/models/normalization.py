"""The normalisation of inputs that a published file of weights holds, or only hints at."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastadv.models.split import Normalized, without_normalization
from fastadv.models.state_files import Foreign

if TYPE_CHECKING:
    from fastadv.models.published import LoadReport

MAX_DEPTH = 4  # levels of mappings inside each other

_MEAN_NAMES = ("mean", "mu", "new_mean")
_STD_NAMES = ("std", "sigma", "new_std")
_MAX_CHANNELS = 16  # of images; a longer vector called "mean" does not normalise them
_PICTURE_CHANNELS = (1, 3, 4)
_MAX_MEAN = 2.0  # of images in 0..1; a larger one is in the units of 0..255
# Names of constants among the options of a training, such as "data_mean" and "img_std".
_ANY_MEAN = re.compile(r"(\w+_)?(mean|mu)s?", re.IGNORECASE)
_ANY_STD = re.compile(r"(\w+_)?(std|sigma|sd)s?", re.IGNORECASE)
# The same of modules, whose other means and stds, such as those of a layer, have longer names.
_OWN_MEAN = re.compile(
    r"((data|image|img|pixel|input|norm(alize)?)_)?(mean|mu|new_mean)s?", re.IGNORECASE
)
_OWN_STD = re.compile(
    r"((data|image|img|pixel|input|norm(alize)?)_)?(std|sigma|new_std)s?", re.IGNORECASE
)
# A prefix such as "1.": the network is not the first part of an nn.Sequential.
_LATER_PART = re.compile(r"(.*\.)?[1-9]\d*\.")


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor has values (it is not on "meta") and a dense layout."""
    return tensor.layout == torch.strided and not tensor.is_nested and tensor.device.type != "meta"


def constants(state: Mapping[Any, Any]) -> dict[str, Tensor]:
    """The mean and the std per channel among the entries of a mapping; empty without both.

    They may be tensors, arrays of numpy's or lists.
    """
    found: dict[str, Tensor] = {}
    for names in (_MEAN_NAMES, _STD_NAMES):
        for name in names:
            value = _vector(state.get(name))
            if value is not None:
                found[name] = value
                break
    return found if len(found) == 2 else {}


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


def note_normalization(name: str, tensor: Tensor, report: LoadReport) -> bool:
    """Put the entry in the report if it is a normalisation constant, and return whether it is one."""
    last = name.rpartition(".")[2]
    kind = "mean" if last in _MEAN_NAMES else "std" if last in _STD_NAMES else None
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
    checked = Normalized(nn.Identity(), _as_many(mean, std), _as_many(std, mean))
    for name in ("mean", "std"):
        if getattr(report, name) is not None:
            old: Tensor = getattr(model, name)
            setattr(model, name, getattr(checked, name).to(dtype=old.dtype, device=old.device))


def _as_many(values: list[float], others: list[float]) -> list[float]:
    """The values, repeated to the length of ``others`` if there is one value for all channels."""
    return values * len(others) if len(values) == 1 else values


# Networks that may lack the normalisation of their training. The figures of these are in doubt.
_DOUBTED: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def doubt_about_normalization(model: object) -> str:
    """The doubt about a model whose file only hinted at a normalisation; empty without doubt.

    A module around the network, such as a `Normalized` with a mean and a std, ends the doubt.
    """
    if not isinstance(model, nn.Module) or _normalizes(model):
        return ""
    return _DOUBTED.get(without_normalization(model), "")


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
        mean, std = (_named_vector(held, names) for names in (_OWN_MEAN, _OWN_STD))
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
    if not (_is_close(mean, report.mean) and _is_close(std, report.std)):
        raise ValueError(
            f"state normalises with mean={report.mean}, std={report.std}, and the model by itself with "
            f"mean={mean}, std={std}{_in_module(place)}; leave the wrong ones out of the file or of the model"
        )
    report.mean = report.std = None
    prefix = f"{place}." if place else ""
    if not any(prefix + name in loaded for name in _MEAN_NAMES):
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
    constant = {prefix + name for name in (*_MEAN_NAMES, *_STD_NAMES)}
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
    if own is not None and _changes_images(mean, std):
        raise ValueError(
            f"normalise must be left out, because the network normalises by itself, with mean {own[1]} and std "
            f"{own[2]}{_in_module(own[0])}"
        )


def _in_module(place: str) -> str:
    return f" in its module {place!r}" if place else ""


def _is_close(some: list[float], others: list[float] | None) -> bool:
    """Whether two vectors, or a vector and one number for all channels, are the same constants."""
    others = others or []
    some, others = _as_many(some, others), _as_many(others, some)
    return len(some) == len(others) and all(
        abs(a - b) < 1e-3 for a, b in zip(some, others, strict=True)
    )


def _changes_images(mean: Sequence[float], std: Sequence[float]) -> bool:
    return any(mean) or set(std) != {1}


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
        if own is not None and _is_close(own[1], mean) and _is_close(own[2], std):
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
    mean, std = (_named_vector(state, names) for names in (_ANY_MEAN, _ANY_STD))
    if mean is not None and std is not None and min(std) > 0 and _changes_images(mean, std):
        yield place, mean, std
    for key, value in state.items():
        if isinstance(key, str):
            yield from _hints(value, f"{place}[{key!r}]")


def _named_vector(state: Mapping[Any, Any], names: re.Pattern[str]) -> list[float] | None:
    """The first list of one number per channel with such a name."""
    for key, value in state.items():
        if isinstance(key, str) and names.fullmatch(key):
            vector = _vector(value)
            if vector is not None and is_dense(vector) and vector.numel() in _PICTURE_CHANNELS:
                return [round(number, 4) for number in vector.detach().double().flatten().tolist()]
    return None
