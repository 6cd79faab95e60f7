"""Wide residual networks: WRN-28-10 and WRN-34-10."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from fastadv.fields import arguments_checked
from fastadv.models.split import SplitModel, check_counts, global_average


class WideBlock(nn.Module):
    """Pre-activation block with two 3x3 convolutions, [B, C, H, W] -> [B, C', H', W'].

    A projecting shortcut starts from the activated input, an identity one from the raw input.
    """

    convShortcut: nn.Conv2d | None

    def __init__(self, in_planes: int, planes: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.dropout = dropout
        # Published checkpoints use this name.
        self.convShortcut = None
        if in_planes != planes:
            self.convShortcut = nn.Conv2d(in_planes, planes, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return residual(x) + shortcut, without an activation after the sum."""
        activated = F.relu(self.bn1(x))
        skip = x if self.convShortcut is None else self.convShortcut(activated)
        out = F.relu(self.bn2(self.conv1(activated)))
        if self.dropout > 0:
            out = F.dropout(out, self.dropout, self.training)
        return self.conv2(out) + skip


class WideStage(nn.Module):
    """A run of `count` blocks; the first one changes the width and the resolution."""

    def __init__(self, in_planes: int, planes: int, count: int, stride: int, dropout: float):
        super().__init__()
        first = WideBlock(in_planes, planes, stride, dropout)
        rest = (WideBlock(planes, planes, 1, dropout) for _ in range(count - 1))
        self.layer = nn.Sequential(first, *rest)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the blocks in order."""
        return self.layer(x)


class WideResNet(SplitModel):
    """Wide residual network (Zagoruyko and Komodakis, 2016, arXiv:1605.07146).

    The feature map of 32x32 images is [B, 64 * widen, 8, 8], after the last BatchNorm and ReLU;
    any size of at least 4x4 works. State-dict names and initialisation (He normal by fan-out) are
    those of the form that TRADES published (`conv1`, `block1.layer.0.bn1`,
    `block1.layer.0.convShortcut`, `bn1`, `fc`); its `sub_block1`, which no forward pass
    reaches, is left out.

    Args:
        depth: number of layers; (depth - 4) must be a positive multiple of 6.
        widen: width factor.
        num_classes: number of logits.
        in_channels: channels of the images.
        dropout: probability of dropping an element between the convolutions of a block.

    Raises:
        ValueError: if depth is not of that form.
    """

    @arguments_checked
    def __init__(
        self, depth: int, widen: int, num_classes: int, in_channels: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        check_counts(num_classes=num_classes, in_channels=in_channels, widen=widen)
        count, rest = divmod(depth - 4, 6)
        if rest != 0 or count < 1:
            raise ValueError(f"depth must be 6 * n + 4 with n >= 1, got {depth}")
        widths = (16 * widen, 32 * widen, 64 * widen)
        self.num_classes = num_classes
        self.num_features = widths[2]
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.block1 = WideStage(16, widths[0], count, 1, dropout)
        self.block2 = WideStage(widths[0], widths[1], count, 2, dropout)
        self.block3 = WideStage(widths[1], widths[2], count, 2, dropout)
        self.bn1 = nn.BatchNorm2d(widths[2])
        self.fc = nn.Linear(widths[2], num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the convolutions' weights as He et al. 2015, by fan-out; the classifier has no bias at first."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the map before global pooling, [B, 64 * widen, H/4, W/4], after the last ReLU."""
        return self._last_stage(self.block2(self._first_stage(x)))

    def feature_stages(self) -> Sequence[Callable[[Tensor], Tensor]]:
        """Return block1, behind the first convolution, block2, and block3 with the last BatchNorm and ReLU."""
        return self._first_stage, self.block2, self._last_stage

    def _first_stage(self, x: Tensor) -> Tensor:
        return self.block1(self.conv1(x))

    def _last_stage(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(self.block3(x)))

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits [B, num_classes], or the pooled [B, 64 * widen] with `pre_logits`."""
        pooled = global_average(features)
        return pooled if pre_logits else self.fc(pooled)


def wrn_28_10(num_classes: int = 10, in_channels: int = 3, dropout: float = 0.0) -> WideResNet:
    """WRN-28-10: 36,479,194 parameters for 10 classes and 3 channels.

    Args:
        num_classes: number of logits.
        in_channels: number of channels of an image.
        dropout: rate of dropout inside the blocks.

    Returns:
        The network with random weights, from images [B, in_channels, H, W] to logits [B, num_classes].
    """
    return WideResNet(28, 10, num_classes, in_channels, dropout)


def wrn_34_10(num_classes: int = 10, in_channels: int = 3, dropout: float = 0.0) -> WideResNet:
    """WRN-34-10: 46,160,474 parameters for 10 classes and 3 channels.

    Args:
        num_classes: number of logits.
        in_channels: number of channels of an image.
        dropout: rate of dropout inside the blocks.

    Returns:
        The network with random weights, from images [B, in_channels, H, W] to logits [B, num_classes].
    """
    return WideResNet(34, 10, num_classes, in_channels, dropout)
