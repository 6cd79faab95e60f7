"""Pre-activation ResNet-18 for small images."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from fastadv.fields import arguments_checked
from fastadv.models.split import SplitModel, check_counts, global_average

# Parts of the names of forms.
_RAW_SHORTCUT, _NO_LAST_NORM = "_raw_shortcut", "_no_last_norm"


class PreActBlock(nn.Module):
    """BatchNorm and ReLU before each 3x3 convolution, [B, C, H, W] -> [B, C', H', W'].

    A projecting shortcut starts from the activated input, as in He et al. (2016), or with `raw_shortcut` from the
    input itself; an identity shortcut takes the input itself in both.
    """

    shortcut: nn.Sequential | None

    def __init__(
        self, in_planes: int, planes: int, stride: int, raw_shortcut: bool = False
    ) -> None:
        super().__init__()
        self.raw_shortcut = raw_shortcut
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.shortcut = None
        if stride != 1 or in_planes != planes:
            self.shortcut = nn.Sequential(nn.Conv2d(in_planes, planes, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """Return residual(x) + shortcut, without an activation after the sum."""
        activated = F.relu(self.bn1(x))
        skip = x
        if self.shortcut is not None:
            skip = self.shortcut(x if self.raw_shortcut else activated)
        out = self.conv2(F.relu(self.bn2(self.conv1(activated))))
        return out + skip


class PreActResNet(SplitModel):
    """Pre-activation residual network (He et al., 2016, arXiv:1603.05027) in its CIFAR form.

    State-dict names follow the widely published CIFAR form (`conv1`,
    `layer1.0.bn1`, `layer2.0.shortcut.0`, `linear`). Two variants circulate: with a last BatchNorm
    and ReLU (`bn`), as in the paper and in the code of Rice et al. (2020) and AWP, and without.

    Each variant has two forms with the same names and shapes in their state dicts. A projecting shortcut starts
    from relu(bn1(x)), as in He et al. and most published code, or from x, as in the code of Wong et al. (2020,
    fast_adversarial) and AFS.

    Args:
        blocks: number of blocks in each of the four stages.
        num_classes: number of logits.
        in_channels: channels of the images.
        final_norm: end in BatchNorm and ReLU, so that the feature map is activated.
        raw_shortcut: let projecting shortcuts start from x.
    """

    bn: nn.BatchNorm2d | None

    @arguments_checked
    def __init__(
        self,
        blocks: tuple[int, int, int, int],
        num_classes: int,
        in_channels: int,
        final_norm: bool = True,
        raw_shortcut: bool = False,
    ) -> None:
        super().__init__()
        check_counts(num_classes=num_classes, in_channels=in_channels)
        self.num_classes = num_classes
        self.num_features = 512
        self.raw_shortcut = raw_shortcut
        self.conv1 = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
        self.layer1 = _stage(64, 64, blocks[0], 1, raw_shortcut)
        self.layer2 = _stage(64, 128, blocks[1], 2, raw_shortcut)
        self.layer3 = _stage(128, 256, blocks[2], 2, raw_shortcut)
        self.layer4 = _stage(256, 512, blocks[3], 2, raw_shortcut)
        self.bn = nn.BatchNorm2d(512) if final_norm else None
        self.linear = nn.Linear(512, num_classes)

    @property
    def forms(self) -> dict[str, str]:
        """The networks that take the same state dict, by name; see `fastadv.models.forms_of`."""
        last = "" if self.bn is not None else _NO_LAST_NORM
        return {
            f"preact_resnet18{last}": "projecting shortcuts start from relu(bn1(x))",
            f"preact_resnet18{_RAW_SHORTCUT}{last}": "projecting shortcuts start from x",
        }

    @property
    def form(self) -> str:
        """The name of this network's form, a key of `forms`."""
        return list(self.forms)[self.raw_shortcut]

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the map before global pooling, [B, 512, H/8, W/8]."""
        return self._last_stage(self.layer3(self.layer2(self._first_stage(x))))

    def feature_stages(self) -> Sequence[Callable[[Tensor], Tensor]]:
        """Return layer1, behind the first convolution, to layer4, with the last BatchNorm and ReLU, if any."""
        return self._first_stage, self.layer2, self.layer3, self._last_stage

    def _first_stage(self, x: Tensor) -> Tensor:
        return self.layer1(self.conv1(x))

    def _last_stage(self, x: Tensor) -> Tensor:
        out = self.layer4(x)
        return out if self.bn is None else F.relu(self.bn(out))

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits [B, num_classes], or the pooled [B, 512] with `pre_logits`."""
        pooled = global_average(features)
        return pooled if pre_logits else self.linear(pooled)


def _stage(
    in_planes: int, planes: int, count: int, stride: int, raw_shortcut: bool
) -> nn.Sequential:
    first = PreActBlock(in_planes, planes, stride, raw_shortcut)
    return nn.Sequential(first, *(PreActBlock(planes, planes, 1) for _ in range(count - 1)))


def preact_resnet18(
    num_classes: int = 10,
    in_channels: int = 3,
    final_norm: bool = True,
    raw_shortcut: bool = False,
) -> PreActResNet:
    """PreAct ResNet-18: 11,172,170 parameters for 10 classes (11,171,146 without `final_norm`).

    Args:
        num_classes: number of logits.
        in_channels: number of channels of an image.
        final_norm: as in `PreActResNet`.
        raw_shortcut: as in `PreActResNet`.

    Returns:
        The network with random weights, from images [B, in_channels, H, W] to logits [B, num_classes].
    """
    return PreActResNet((2, 2, 2, 2), num_classes, in_channels, final_norm, raw_shortcut)
