"""The feature split F(x) = g(h(x)) of every fastadv model, and normalisation that keeps it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias, cast, runtime_checkable

import torch
from torch import Tensor, nn

from fastadv.ops.values import integer, shown

Halves: TypeAlias = Callable[[Any, Tensor], Tensor]
_ROUNDING = 1e-3  # largest relative difference of logits; in float32 rounding is much less


@runtime_checkable
class FeatureSplit(Protocol):
    """A model that can be cut in two just before its global pooling (timm's method names)."""

    def forward_features(self, x: Tensor) -> Tensor:
        """Return h(x), the map before global pooling: [B, 3, H, W] -> [B, C, H', W']."""
        ...

    def forward_head(self, features: Tensor) -> Tensor:
        """Return the logits of features: [B, C, H', W'] -> [B, num_classes]."""
        ...


class SplitModel(nn.Module):
    """Base of the models here: subclasses define the two halves, and `forward` is their composition.

    Attributes:
        num_features: length of the pooled vector that the classifier sees.
        num_classes: number of logits.
    """

    num_features: int
    num_classes: int

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the map before global pooling, [B, num_features, H', W']."""
        raise NotImplementedError

    def feature_stages(self) -> Sequence[Callable[[Tensor], Tensor]]:
        """Return the parts of `forward_features`, one per stage; one after the other they are the whole."""
        return (self.forward_features,)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify.

        Args:
            features: the result of `forward_features`, [B, num_features, H', W'].
            pre_logits: stop after the pooling.

        Returns:
            Logits [B, num_classes], or the pooled vectors [B, num_features] with `pre_logits`.
        """
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits [B, num_classes] of images [B, C, H, W] in 0..1."""
        return self.forward_head(self.forward_features(x))


def check_counts(**counts: int) -> None:
    """Require that each of a model's sizes, by its name, is at least 1.

    Raises:
        TypeError: one is no integer.
        ValueError: one is below 1.
    """
    for name, count in counts.items():
        integer(name, count, at_least=1)


def global_average(features: Tensor) -> Tensor:
    """Mean over height and width, [B, C, H, W] -> [B, C].

    It uses `mean` and not adaptive pooling, because the backward pass of `mean` is deterministic on every device.
    """
    return features.mean(dim=(-2, -1))


class Normalized(nn.Module):
    """A model behind per-channel normalisation: model((x - mean) / std), so that x stays in 0..1.

    It keeps the feature split of the model inside. `mean` and `std` are buffers [1, C, 1, 1], so the state dict
    holds them.

    Args:
        model: any module on normalised images.
        mean: per-channel mean in units of the 0..1 image, or one number for all channels.
        std: per-channel standard deviation, likewise; must be positive.

    Raises:
        ValueError: if mean and std differ in length, or std is not positive and finite.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: nn.Module,
        mean: float | Sequence[float] | Tensor = 0.0,
        std: float | Sequence[float] | Tensor = 1.0,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a module, got {shown(model)}")
        means, stds = _channel_buffer("mean", mean), _channel_buffer("std", std)
        if means.shape != stds.shape:
            raise ValueError(
                f"mean and std must have the same number of channels, "
                f"got {means.numel()} and {stds.numel()}"
            )
        if not bool((stds > 0).all()):
            raise ValueError(f"std must be > 0 in every channel, got {stds.flatten().tolist()}")
        self.model = model
        self.register_buffer("mean", means)
        self.register_buffer("std", stds)

    def normalize(self, x: Tensor) -> Tensor:
        """Return (x - mean) / std.

        Raises:
            ValueError: the images have another number of channels than mean and std.
        """
        channels = self.mean.shape[1]
        if channels > 1 and x.dim() > 2 and x.shape[-3] != channels:  # one would be spread over all
            raise ValueError(
                f"x must have {channels} channels, as mean and std have, got {x.shape[-3]} in shape "
                f"{tuple(x.shape)}"
            )
        return (x - self.mean) / self.std

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the inner model's map before global pooling for images in 0..1."""
        return cast(Tensor, cast(Any, self.model).forward_features(self.normalize(x)))

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the inner model's logits, or its pooled vectors with `pre_logits`."""
        head = cast(Any, self.model).forward_head
        return cast(Tensor, head(features, pre_logits=True) if pre_logits else head(features))

    def forward(self, x: Tensor) -> Tensor:
        """Return the inner model's logits for images in 0..1."""
        return cast(Tensor, self.model(self.normalize(x)))


def without_normalization(model: nn.Module) -> nn.Module:
    """Return the model inside a `Normalized`; any other model is returned as it is."""
    return model.model if isinstance(model, Normalized) else model


def logits_of_halves(model: nn.Module, x: Tensor) -> Tensor:
    """Return the logits [B, K] of images [B, C, H, W] by the two halves of a model with the feature split."""
    split = cast(Any, model)
    return cast(Tensor, split.forward_head(split.forward_features(x)))


def difference_of_logits(whole: Tensor, parts: Tensor) -> float:
    """Return the size of whole - parts in proportion to whole; infinite for other shapes."""
    if whole.shape != parts.shape:
        return float("inf")
    whole, parts = whole.double(), parts.double()
    return float((whole - parts).norm() / whole.norm().clamp_min(torch.finfo(torch.float32).tiny))


def refuse_other_halves(
    name: str,
    model: nn.Module,
    run: Callable[[Callable[[Tensor], Tensor]], Tensor],
    user: str,
    halves: Halves = logits_of_halves,
) -> None:
    """Refuse a model whose logits differ from the logits by its halves.

    Anything in its own forward and in its hooks, such as a normalisation, is passed by where halves are run.
    Differences by rounding are accepted, and so is a model whose logits differ from pass to pass.

    Args:
        name: the model's name in the message.
        model: the model.
        run: runs a function from images to logits on some images, in evaluation mode and without gradients.
        user: the code that runs the halves, for the message.
        halves: a function of model and images that gives the logits by the halves.

    Raises:
        ValueError: if they differ.
    """
    whole = run(model)
    apart = difference_of_logits(whole, run(lambda x: halves(model, x)))
    if apart <= _ROUNDING or difference_of_logits(whole, run(model)) > 0:
        return
    raise ValueError(
        f"{name} must compute forward_head(forward_features(x)), which {user} runs, got a "
        f"{type(model).__name__} whose logits differ from that by {100 * apart:.2g} %: its own forward or a "
        "hook does more, such as a normalisation. Do it in forward_features, or wrap the network in "
        "fastadv.models.Normalized"
    )


def _channel_buffer(name: str, value: float | Sequence[float] | Tensor) -> Tensor:
    """A float32 copy of value as [1, C, 1, 1] (C = 1 broadcasts over any number of channels)."""
    try:
        if torch.is_complex(torch.as_tensor(value, device="cpu")):
            raise TypeError("complex numbers")
        buffer = (
            torch.as_tensor(value, dtype=torch.float32, device="cpu")
            .detach()
            .clone()
            .reshape(1, -1, 1, 1)
        )
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{name} must be a number, or one number per channel, got {shown(value)}"
        ) from error
    if buffer.is_meta or buffer.numel() == 0 or not bool(torch.isfinite(buffer).all()):
        raise ValueError(f"{name} must be one finite number per channel, got {value!r}")
    return buffer


def check_feature_split(model: object) -> None:
    """Check that a model has the two halves that feature-based methods need.

    Args:
        model: the model, possibly inside `Normalized`.

    Raises:
        TypeError: naming the methods that are missing.
    """
    if isinstance(model, Normalized):
        check_feature_split(model.model)
        return
    halves = ("forward_features", "forward_head")
    missing = [name for name in halves if not callable(getattr(model, name, None))]
    if not missing:
        return
    hint = ""
    if isinstance(getattr(model, "module", None), FeatureSplit):
        hint = "; it wraps a model that has them, so pass `model.module`"
    raise TypeError(
        f"{type(model).__name__} has no {' and no '.join(missing)}. This method needs a model "
        "that is cut before its global pooling: forward_features(x) -> [B, C, H, W] and "
        f"forward_head(features) -> [B, num_classes], with "
        f"forward(x) = forward_head(forward_features(x)){hint}"
    )
