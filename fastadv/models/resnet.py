"""ResNet-18 for small images."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from fastadv.fields import arguments_checked
from fastadv.models.split import SplitModel, check_counts, global_average


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm and a skip, [B, C, H, W] -> [B, C', H', W']."""

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_planes != planes:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_planes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(residual(x) + shortcut(x))."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class ResNet(SplitModel):
    """Residual network of He et al. (2015) in its CIFAR form: 3x3 stem, no first pooling.

    The feature map of 32x32 images is [B, 512, 4, 4]; any size of at least 8x8 works.
    The state dict has the names of the widely published CIFAR form (`conv1`, `bn1`,
    `layer1.0.conv1`, `layer2.0.shortcut.0`, `linear`).

    The stages have strides 1, 2, 2, 2. The natural model of LBGAT's code (Cui et al. 2021) has stride 1 in the
    second stage as well. Its state dict has the same names and shapes; its feature map of 32x32 images is
    [B, 512, 8, 8].

    Args:
        blocks: number of blocks in each of the four stages.
        num_classes: number of logits.
        in_channels: channels of the images.
        layer2_stride: stride of the second stage, 2 or 1.
    """

    @arguments_checked
    def __init__(
        self,
        blocks: tuple[int, int, int, int],
        num_classes: int,
        in_channels: int,
        layer2_stride: int = 2,
    ) -> None:
        super().__init__()
        check_counts(num_classes=num_classes, in_channels=in_channels)
        if layer2_stride not in (1, 2):
            raise ValueError(f"layer2_stride must be 1 or 2, got {layer2_stride}")
        self.num_classes = num_classes
        self.num_features = 512
        self.layer2_stride = layer2_stride
        self.conv1 = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = _stage(64, 64, blocks[0], stride=1)
        self.layer2 = _stage(64, 128, blocks[1], layer2_stride)
        self.layer3 = _stage(128, 256, blocks[2], stride=2)
        self.layer4 = _stage(256, 512, blocks[3], stride=2)
        self.linear = nn.Linear(512, num_classes)

    # Only LBGAT's natural model is published in the other form.
    usual_form_prevails = True

    @property
    def forms(self) -> dict[str, str]:
        """The networks that take the same state dict, by name; see `fastadv.models.forms_of`."""
        return {
            "resnet18": "its stages have strides 1, 2, 2, 2",
            "resnet18_layer2_stride1": "its stages have strides 1, 1, 2, 2",
        }

    @property
    def form(self) -> str:
        """The name of this network's form, a key of `forms`."""
        return list(self.forms)[self.layer2_stride == 1]

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the map before global pooling, [B, 512, H/8, W/8], after the last ReLU."""
        return self.layer4(self.layer3(self.layer2(self._first_stage(x))))

    def feature_stages(self) -> Sequence[Callable[[Tensor], Tensor]]:
        """Return layer1, behind the stem, to layer4."""
        return self._first_stage, self.layer2, self.layer3, self.layer4

    def _first_stage(self, x: Tensor) -> Tensor:
        return self.layer1(F.relu(self.bn1(self.conv1(x))))

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits [B, num_classes], or the pooled [B, 512] with `pre_logits`."""
        pooled = global_average(features)
        return pooled if pre_logits else self.linear(pooled)


def _stage(in_planes: int, planes: int, count: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_planes, planes, stride)
    return nn.Sequential(first, *(BasicBlock(planes, planes, 1) for _ in range(count - 1)))


def resnet18(num_classes: int = 10, in_channels: int = 3, layer2_stride: int = 2) -> ResNet:
    """ResNet-18 in its CIFAR form: 11,173,962 parameters for 10 classes and 3 channels.

    Args:
        num_classes: number of logits.
        in_channels: number of channels of an image.
        layer2_stride: stride of the second stage, as in `ResNet`.

    Returns:
        The network with random weights, from images [B, in_channels, H, W] to logits [B, num_classes].
    """
    return ResNet((2, 2, 2, 2), num_classes, in_channels, layer2_stride)
