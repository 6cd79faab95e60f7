"""Finding the weights of a network inside a saved object: behind keys of nested mappings, prefixes and copies."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import TypeAlias

import torch
from torch import Tensor, nn

from fastadv.models.normalization_constants import constants
from fastadv.models.state_files import Foreign, is_dense

MAX_DEPTH = 4  # levels of mappings inside each other

_Place: TypeAlias = tuple[str, dict[str, Tensor]]


def find_weights(
    state: object, network: nn.Module, targets: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], str, set[str]]:
    """Find the weights of a network inside a saved object.

    Returns:
        The tensors by name of the mapping that holds the weights; the prefix before the network's names; the names
        in the mapping that belong to further copies of the weights.

    Raises:
        TypeError: if there are no tensors by name.
        ValueError: if there are several sets of weights that differ.
    """
    mappings = dict(_tensor_mappings(state))
    if not mappings:
        raise TypeError(f"state must map names to tensors, got {_described(state)}")
    parameters = [name for name, _ in network.named_parameters()] or list(targets)
    whole = [
        (place, prefix)
        for place, tensors in mappings.items()
        for prefix in _prefixes(tensors, targets)
        if all(prefix + name in tensors for name in parameters)
    ]
    if not whole:
        place, prefix = max(
            (
                (p, prefix)
                for p, tensors in mappings.items()
                for prefix in _prefixes(tensors, targets)
            ),
            key=lambda found: sum(found[1] + name in mappings[found[0]] for name in targets),
        )
        return mappings[place], prefix, set()
    # Of copies in several precisions the first one of the widest dtype is taken.
    whole.sort(key=lambda found: -_width(mappings[found[0]], found[1], parameters))
    place, prefix = whole[0]
    for other in whole[1:]:
        _require_same(mappings, whole[0], other, targets)
    copies = {
        other_prefix + name
        for other_place, other_prefix in whole[1:]
        if other_place == place
        for name in targets
    }
    return mappings[place], prefix, copies - {prefix + name for name in targets}


def _width(tensors: Mapping[str, Tensor], prefix: str, names: Iterable[str]) -> int:
    """Bytes of each number of the narrowest tensor of these names."""
    return min(tensors[prefix + name].element_size() for name in names)


def _tensor_mappings(
    state: object, place: str = "", around: Mapping[str, Tensor] = MappingProxyType({})
) -> Iterator[_Place]:
    """The mappings from names to tensors inside a saved object, with the keys that lead to them.

    Constants of a normalisation that stand around a mapping (`around`) count as its own.
    """
    if not isinstance(state, Mapping) or place.count("[") > MAX_DEPTH:
        return
    tensors = {k: v for k, v in state.items() if isinstance(k, str) and isinstance(v, Tensor)}
    around = {**around, **constants(state)}
    if tensors:
        yield place, {**around, **tensors}
    for key, value in state.items():
        if isinstance(key, str):
            yield from _tensor_mappings(value, f"{place}[{key!r}]", around)


def _prefixes(tensors: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> list[str]:
    """The possible prefixes of the network's names, the shortest first."""
    anchor = next(iter(targets))
    candidates = {name[: -len(anchor)] for name in tensors if name.endswith(anchor)}
    # Names that merely end in the anchor, such as layer1.0.conv1.weight, match little else.
    candidates = {prefix for prefix in candidates if prefix == "" or prefix.endswith(".")} | {""}
    return sorted(candidates, key=lambda prefix: (len(prefix), prefix))


def _require_same(
    mappings: Mapping[str, Mapping[str, Tensor]],
    one: tuple[str, str],
    other: tuple[str, str],
    targets: Mapping[str, Tensor],
) -> None:
    """Check that two places hold the same weights, up to rounding to the dtype of ``other``."""
    for name in targets:
        a, b = (mappings[place].get(prefix + name) for place, prefix in (one, other))
        if a is None or b is None or name.endswith("num_batches_tracked"):
            continue
        require_dense(name, a)
        require_dense(name, b)
        if a.shape != b.shape or not torch.equal(a.to(b.dtype), b):
            places = " and ".join(
                f"state{place}" + f" behind {prefix!r}" * bool(prefix)
                for place, prefix in (one, other)
            )
            place, prefix = other if other[0] else one
            alone = f"state{place}" if one[0] != other[0] else f"the entries behind {prefix!r}"
            raise ValueError(
                f"state holds several sets of weights that differ, {places} (for example in {name!r}); give the "
                f"one you mean alone, such as {alone}, or save it in a file of its own"
            )


def _described(state: object) -> str:
    """The description of a saved object, for a message."""
    if isinstance(state, Foreign) and state.is_array:
        return "an array of numpy's; torch.from_numpy(array) is the tensor to save"
    if isinstance(state, Foreign):
        return f"an object of {state.kind}; open it where its code is, and save its state_dict()"
    if not isinstance(state, Mapping):
        return f"{type(state).__name__}; torch.load(path, weights_only=True) returns such a mapping"
    objects = [f"{k!r} is {_described(v)}" for k, v in state.items() if isinstance(v, Foreign)]
    return f"a mapping with {list(state)[:5]}" + "".join(
        f", of which {text}" for text in objects[:1]
    )


def require_dense(name: str, tensor: Tensor) -> None:
    """Refuse a tensor without values or with a layout that is not dense; the message has its name."""
    if is_dense(tensor):
        return
    if tensor.device.type == "meta":
        found = "one on the device 'meta'"
        advice = "it has a shape alone, and the weights were not saved"
    else:
        found = "a nested one" if tensor.is_nested else f"one of layout {tensor.layout}"
        advice = "save the result of its to_dense()"
    raise ValueError(
        f"state must hold dense tensors with values, got {found} in {name!r}; {advice}"
    )
