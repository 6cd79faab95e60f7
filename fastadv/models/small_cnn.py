"""A small convolutional network for 8x8 digits and for trying things out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from fastadv.fields import arguments_checked
from fastadv.models.split import SplitModel, check_counts, global_average


class SmallCNN(SplitModel):
    """Three 3x3 convolutions with BatchNorm, the second of stride 2, then global pooling.

    The feature map of 8x8 images is [B, 64, 4, 4]; any size works.

    Args:
        num_classes: number of logits.
        in_channels: channels of the images.
    """

    @arguments_checked
    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        check_counts(num_classes=num_classes, in_channels=in_channels)
        self.num_classes = num_classes
        self.num_features = 64
        self.conv1 = nn.Conv2d(in_channels, 32, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.conv2 = nn.Conv2d(32, 64, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(64)
        self.conv3 = nn.Conv2d(64, 64, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(64)
        self.linear = nn.Linear(64, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the map before global pooling, [B, 64, H/2, W/2], after the last ReLU."""
        return self._third(self._second(self._first(x)))

    def feature_stages(self) -> Sequence[Callable[[Tensor], Tensor]]:
        """Return the three convolutions, each with its BatchNorm and ReLU."""
        return self._first, self._second, self._third

    def _first(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv1(x)))

    def _second(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(x)))

    def _third(self, x: Tensor) -> Tensor:
        return F.relu(self.bn3(self.conv3(x)))

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits [B, num_classes], or the pooled [B, 64] with `pre_logits`."""
        pooled = global_average(features)
        return pooled if pre_logits else self.linear(pooled)


def small_cnn(num_classes: int = 10, in_channels: int = 1) -> SmallCNN:
    """A network of 56,554 parameters for 10 classes and 1 channel.

    Args:
        num_classes: number of logits.
        in_channels: number of channels of an image.

    Returns:
        The network with random weights, from images [B, in_channels, H, W] to logits [B, num_classes].
    """
    return SmallCNN(num_classes, in_channels)
