"""VGG-16 with BatchNorm for small images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn

from fastadv.fields import arguments_checked
from fastadv.models.split import SplitModel, check_counts, global_average

# Output channels of the 3x3 convolutions between one pooling and the next.
VGG16_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG(SplitModel):
    """VGG (Simonyan and Zisserman, 2014) with BatchNorm and one linear classifier.

    The last 2x2 max pooling belongs to the head: on 32x32 images it is the global pooling, and
    the feature map before it is [B, 512, 2, 2]. On larger images a mean over its output
    follows. State-dict names follow the widely published CIFAR form: `features.N` and
    `classifier`.

    Args:
        stages: output channels of the convolutions of each stage; a pooling follows each stage.
        num_classes: number of logits.
        in_channels: channels of the images, which must be at least 32x32.
    """

    @arguments_checked
    def __init__(
        self, stages: tuple[tuple[int, ...], ...], num_classes: int, in_channels: int
    ) -> None:
        super().__init__()
        check_counts(num_classes=num_classes, in_channels=in_channels)
        self.num_classes = num_classes
        self.num_features = stages[-1][-1]
        layers: list[nn.Module] = []
        channels = in_channels
        for index, widths in enumerate(stages):
            if index > 0:
                layers.append(nn.MaxPool2d(2))
            for width in widths:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width)]
                layers.append(nn.ReLU())
                channels = width
        self.features = nn.Sequential(*layers)
        self.pool = nn.MaxPool2d(2)
        self.classifier = nn.Linear(channels, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the map before the last pooling, [B, 512, H/16, W/16], after the last ReLU."""
        return self.features(x)

    def feature_stages(self) -> Sequence[Callable[[Tensor], Tensor]]:
        """Return the convolutions between one pooling and the next; a stage begins with the pooling before it."""
        starts = [i for i, layer in enumerate(self.features) if isinstance(layer, nn.MaxPool2d)]
        return [
            partial(self._run, start, end)
            for start, end in zip([0, *starts], [*starts, len(self.features)], strict=True)
        ]

    def _run(self, start: int, end: int, x: Tensor) -> Tensor:
        for index in range(start, end):
            x = self.features[index](x)
        return x

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits [B, num_classes], or the pooled [B, 512] with `pre_logits`."""
        pooled = global_average(self.pool(features))
        return pooled if pre_logits else self.classifier(pooled)


def vgg16_bn(num_classes: int = 10, in_channels: int = 3) -> VGG:
    """VGG-16 with BatchNorm: 14,728,266 parameters for 10 classes and 3 channels.

    Args:
        num_classes: number of logits.
        in_channels: number of channels of an image.

    Returns:
        The network with random weights, from images [B, in_channels, H, W] to logits [B, num_classes].
    """
    return VGG(VGG16_STAGES, num_classes, in_channels)
