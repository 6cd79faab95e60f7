"""The layers of a network at which its features can be taken: the ends of its stages, and the logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from fastadv.models.split import (
    Normalized,
    SplitModel,
    check_feature_split,
    without_normalization,
)

LAST, LOGITS = "last", "logits"
_Part = Callable[[Tensor], Tensor]
# The modules of ResNet in torchvision and in timm, in the order in which an image passes them.
_STEMS = (["conv1", "bn1", "relu", "maxpool"], ["conv1", "bn1", "act1", "maxpool"])
_LAYERS = ["layer1", "layer2", "layer3", "layer4"]
_HEADS = (["avgpool", "fc"], ["global_pool", "fc"])


def layer_names(model: nn.Module) -> tuple[str, ...]:
    """Return the layers of a network at which its features can be taken.

    Args:
        model: the network, possibly inside `Normalized`.

    Returns:
        "layer1", "layer2", ... and "logits". layer1 is the map behind the first stage. The last stage's layer is
        the map before global pooling, with the network's last BatchNorm and ReLU if it ends in these. A network
        with the feature split whose stages are not known has "last", the map before global pooling. The stages
        are known for the networks of fastadv, for ResNet in torchvision and timm, and for any `SplitModel` with
        `feature_stages`.
    """
    network = without_normalization(model)
    stages = _stages(network)
    if stages is not None:
        return (*(f"layer{i}" for i in range(1, len(stages) + 1)), LOGITS)
    try:
        check_feature_split(network)
    except TypeError:
        return (LOGITS,)
    return LAST, LOGITS


class MissingLayerError(ValueError):
    """A network has no layer of the name that was asked for."""


def check_layer(model: nn.Module, layer: str, role: str = "model") -> None:
    """Check that a network has a layer.

    Args:
        model: the network.
        layer: a name of `layer_names`, or "last", which any network with the feature split has.
        role: the network's name in messages.

    Raises:
        TypeError: if the network cannot be cut before its pooling, and the layer is "last".
        MissingLayerError: if it has no such layer; the message lists its layers.
    """
    names = layer_names(model)
    if layer in names or (layer == LAST and len(names) > 1):
        return
    if layer == LAST:
        check_feature_split(model)
    kind = type(without_normalization(model)).__name__
    raise MissingLayerError(
        f"layer must be one of {', '.join(dict.fromkeys((*names, LAST)))} of the {role}, a {kind}, got {layer!r}"
    )


def layer_output(model: nn.Module, layer: str, x: Tensor) -> Tensor:
    """Return a layer's features of images; nothing behind the layer is computed.

    Args:
        model: the network.
        layer: a name of `layer_names`, or "last".
        x: images [B, C, H, W].

    Returns:
        The map behind a stage [B, C', H', W'], or the logits [B, K].
    """
    if layer == LOGITS:
        return _called(model, x)
    network, x = _prepared(model, x)
    stages = _stages(network)
    if stages is None:
        features: Tensor = network.forward_features(x)
        return features
    for stage in stages[: _count(stages, layer)]:
        x = stage(x)
    return x


def layer_and_logits(model: nn.Module, layer: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return a layer's features and the logits of images, from one pass.

    Args:
        model: the network.
        layer: a name of `layer_names`, or "last".
        x: images [B, C, H, W].

    Returns:
        The map behind a stage [B, C', H', W'], or the logits, and the logits [B, K].
    """
    if layer == LOGITS:
        logits = _called(model, x)
        return logits, logits
    network, x = _prepared(model, x)
    stages = _stages(network)
    if stages is None:
        features = network.forward_features(x)
        return features, network.forward_head(features)
    wanted, features = _count(stages, layer), x
    for index, stage in enumerate(stages, 1):
        x = stage(x)
        if index == wanted:
            features = x
    return features, _head(network)(x)


def _count(stages: Sequence[_Part], layer: str) -> int:
    """The number of stages up to a layer, inclusive."""
    return len(stages) if layer == LAST else int(layer.removeprefix("layer"))


def _stages(network: Any) -> Sequence[_Part] | None:
    """The stages of a network, the first one with the stem before it; None if they are not known."""
    if isinstance(network, SplitModel):
        return network.feature_stages()
    stem = _foreign_stem(network)
    if stem is None:
        return None

    def first(x: Tensor) -> Tensor:
        for name in [*stem, "layer1"]:
            x = getattr(network, name)(x)
        return x

    return [first, network.layer2, network.layer3, network.layer4]


def _head(network: Any) -> _Part:
    if callable(getattr(network, "forward_head", None)):
        head: _Part = network.forward_head
        return head

    def classify(x: Tensor) -> Tensor:
        logits: Tensor = network.fc(network.avgpool(x).flatten(1))
        return logits

    return classify


def _foreign_stem(network: nn.Module) -> list[str] | None:
    """The names of the modules before layer1 of ResNet in torchvision or timm; None for anything else."""
    if type(network).__module__ not in ("torchvision.models.resnet", "timm.models.resnet"):
        return None
    names = [name for name, _ in network.named_children()]
    for stem, head in zip(_STEMS, _HEADS, strict=True):
        if names == [*stem, *_LAYERS, *head]:
            return stem
    return None


def _prepared(model: nn.Module, x: Tensor) -> tuple[Any, Tensor]:
    """The network without `Normalized`, and its input."""
    return (model.model, model.normalize(x)) if isinstance(model, Normalized) else (model, x)


def _called(model: nn.Module, x: Tensor) -> Tensor:
    logits: Tensor = model(x)
    return logits
