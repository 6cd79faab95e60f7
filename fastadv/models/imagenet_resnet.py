"""ResNets for images of ImageNet's size, with the names of torchvision's and timm's state dicts."""

from __future__ import annotations

from typing import ClassVar, TypeAlias

import torch.nn.functional as F
from torch import Tensor, nn

from fastadv.fields import arguments_checked
from fastadv.models.split import SplitModel, check_counts, global_average


class PlainBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm and a skip, [B, C, H, W] -> [B, C', H', W']."""

    expansion: ClassVar[int] = 1

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = _skip(in_planes, planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(residual(x) + skip(x))."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class BottleneckBlock(nn.Module):
    """A 1x1, a 3x3 and a 1x1 convolution with BatchNorm and a skip, [B, C, H, W] -> [B, 4 C', H', W'].

    The 3x3 convolution has the stride, as in torchvision and timm. In He et al. the first convolution has it.
    """

    expansion: ClassVar[int] = 4

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        out_planes = self.expansion * planes
        self.conv1 = nn.Conv2d(in_planes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, out_planes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_planes)
        self.downsample = _skip(in_planes, out_planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(residual(x) + skip(x))."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


Block: TypeAlias = type[PlainBlock] | type[BottleneckBlock]


class ImageNetResNet(SplitModel):
    """Residual network of He et al. (2015) in its ImageNet form: a 7x7 stem of stride 2, then max pooling.

    The feature map of 224x224 images is [B, num_features, 7, 7]; any size of at least 32x32 works. The state dict
    has the names of torchvision and timm (`conv1`, `bn1`, `layer1.0.conv1`, `layer1.0.downsample.0`, `fc`).
    Convolutions begin with He's normal weights.

    Args:
        block: the class of the stages' blocks.
        blocks: number of blocks in each of the four stages.
        num_classes: number of logits.
        in_channels: channels of the images.
    """

    @arguments_checked
    def __init__(
        self,
        block: Block,
        blocks: tuple[int, int, int, int],
        num_classes: int = 1000,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        check_counts(num_classes=num_classes, in_channels=in_channels)
        self.num_classes = num_classes
        self.num_features = 512 * block.expansion
        self.conv1 = nn.Conv2d(in_channels, 64, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        width = block.expansion
        self.layer1 = _stage(block, 64, 64, blocks[0], stride=1)
        self.layer2 = _stage(block, 64 * width, 128, blocks[1], stride=2)
        self.layer3 = _stage(block, 128 * width, 256, blocks[2], stride=2)
        self.layer4 = _stage(block, 256 * width, 512, blocks[3], stride=2)
        self.fc = nn.Linear(self.num_features, num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the convolutions' weights as He et al. 2015, by fan-out."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the map before global pooling, [B, num_features, H/32, W/32], after the last ReLU."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.max_pool2d(out, 3, 2, padding=1)
        return self.layer4(self.layer3(self.layer2(self.layer1(out))))

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits [B, num_classes], or the pooled [B, num_features] with `pre_logits`."""
        pooled = global_average(features)
        return pooled if pre_logits else self.fc(pooled)


def _skip(in_planes: int, out_planes: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and in_planes == out_planes:
        return None
    return nn.Sequential(
        nn.Conv2d(in_planes, out_planes, 1, stride, bias=False), nn.BatchNorm2d(out_planes)
    )


def _stage(block: Block, in_planes: int, planes: int, count: int, stride: int) -> nn.Sequential:
    first, width = block(in_planes, planes, stride), planes * block.expansion
    return nn.Sequential(first, *(block(width, planes, 1) for _ in range(count - 1)))


def resnet50(num_classes: int = 1000, in_channels: int = 3) -> ImageNetResNet:
    """ResNet-50 in its ImageNet form: 25,557,032 parameters for 1000 classes and 3 channels.

    Args:
        num_classes: number of logits.
        in_channels: number of channels of an image.

    Returns:
        The network with random weights, from images [B, in_channels, H, W] to logits [B, num_classes].
    """
    return ImageNetResNet(BottleneckBlock, (3, 4, 6, 3), num_classes, in_channels)


def resnet18_imagenet(num_classes: int = 1000, in_channels: int = 3) -> ImageNetResNet:
    """ResNet-18 in its ImageNet form: 11,689,512 parameters for 1000 classes and 3 channels.

    Args:
        num_classes: number of logits.
        in_channels: number of channels of an image.

    Returns:
        The network with random weights, from images [B, in_channels, H, W] to logits [B, num_classes].
    """
    return ImageNetResNet(PlainBlock, (2, 2, 2, 2), num_classes, in_channels)
