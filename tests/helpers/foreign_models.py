"""Classifiers of 3x8x8 images, 4 logits each, in other people's styles: of these a copy must be made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations


def conv(in_channels: int, out_channels: int, size: int = 3, **options: Any) -> nn.Conv2d:
    """A convolution that keeps height and width."""
    return nn.Conv2d(in_channels, out_channels, size, padding=size // 2, **options)


class Pooled(nn.Module):
    """Any body, global average pooling, a classifier."""

    def __init__(self, *body: nn.Module, channels: int = 8) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)
        self.pool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(channels, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(self.pool(self.body(x)), 1))


class InPlaceBlock(nn.Module):
    """torchvision's habits: one in-place ReLU for all places, `out += identity`, a downsample path."""

    def __init__(self, planes: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = (
            conv(planes, 2 * planes, stride=2, bias=False),
            nn.BatchNorm2d(2 * planes),
        )
        self.conv2, self.bn2 = conv(2 * planes, 2 * planes, bias=False), nn.BatchNorm2d(2 * planes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential(
            nn.Conv2d(planes, 2 * planes, 1, 2, bias=False), nn.BatchNorm2d(2 * planes)
        )

    def forward(self, x: Tensor) -> Tensor:
        identity = self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


def in_place_resnet() -> nn.Module:
    stem = (conv(3, 8, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
    return Pooled(*stem, nn.MaxPool2d(3, 2, 1), InPlaceBlock(8), channels=16)


class IdentityBlock(nn.Module):
    """A pre-activation block whose skip is its input; in-place ReLUs on results of its own."""

    def __init__(self, planes: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(planes), conv(planes, planes)
        self.bn2, self.conv2 = nn.BatchNorm2d(planes), conv(planes, planes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.bn1(x), inplace=True))
        out = self.conv2(F.relu_(self.bn2(out)))
        return x + out


class SharedConv(nn.Module):
    """One convolution behind two BatchNorms, as with separate statistics for clean and adversarial images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(3, 8)
        self.bn1, self.bn2 = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.bn1(self.conv(x)), self.bn2(self.conv(x.flip(3)))
        return self.fc((first.relu() + second.sigmoid()).mean((2, 3)))


class SharedNorm(nn.Module):
    """One BatchNorm behind two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.bn = conv(3, 8), conv(8, 8), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn(self.conv1(x)))
        return self.fc(F.relu(self.bn(self.conv2(out))).mean((2, 3)))


class ReusedConvOutput(nn.Module):
    """The convolution's result is read before its BatchNorm, too, so it cannot be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = conv(3, 8), nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        raw = self.conv(x)
        return self.fc((self.bn(raw).relu() + raw.tanh()).mean((2, 3)))


class DenseBlocks(nn.Module):
    """DenseNet's concatenations."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = conv(3, 4), conv(7, 4), conv(11, 8)
        self.bn1, self.bn2 = nn.BatchNorm2d(7), nn.BatchNorm2d(11)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, self.conv1(x)], 1)
        x = torch.cat([x, self.conv2(F.relu(self.bn1(x)))], 1)
        return self.fc(self.conv3(F.relu(self.bn2(x))).mean((2, 3)))


class Gated(nn.Module):
    """Squeeze-and-excitation, and a one-channel map that is added to, and multiplies, many channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.map = conv(3, 8), nn.BatchNorm2d(8), conv(8, 1)
        self.squeeze, self.excite = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x)))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        x = x * gate
        x = self.map(x) + x
        return self.fc((x + self.map(x).sigmoid() * 0.5).mean((2, 3)))


class Normalised(nn.Module):
    """Normalises inside, its statistics being flat buffers that the forward pass reshapes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.49, 0.48, 0.45]))
        self.register_buffer("std", torch.tensor([0.25, 0.24, 0.26]))
        self.net = Pooled(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x - self.mean[None, :, None, None]) / self.std.view(1, 3, 1, 1))


class PlainStatistics(nn.Module):
    """Normalises inside by tensors that are neither parameters nor buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = torch.tensor([0.49, 0.48, 0.45]).view(1, 3, 1, 1)
        self.std = [0.25, 0.24, 0.26]
        self.net = Pooled(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x - self.mean) / torch.tensor(self.std)[:, None, None])


class NormAct(nn.BatchNorm2d):
    """timm's BatchNorm: checks its input, calls the function itself, and ends in dropout and an activation."""

    def __init__(self, channels: int, eps: float | None = None) -> None:
        super().__init__(channels)
        self.other_eps = eps
        self.drop, self.act = nn.Identity(), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.ndim == 4, f"expected 4 dimensions, got {x.ndim}")
        eps = self.eps if self.other_eps is None else self.other_eps
        out = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, eps
        )
        return self.act(self.drop(out))


def norms_with_activations() -> nn.Module:
    """The second one's eps is not that of the module."""
    first = (conv(3, 8, bias=False), nn.Dropout(0.5), NormAct(8))
    return Pooled(*first, conv(8, 8), NormAct(8, eps=0.5), NormAct(8))


class AttentionBlock(nn.Module):
    """A small vision transformer: patches, class token, positions, attention, an MLP."""

    def __init__(self, attention: str) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.positions = nn.Parameter(torch.randn(1, 5, 16))
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.mha = nn.MultiheadAttention(16, 4, batch_first=True) if attention == "module" else None
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Dropout(0.1), nn.Linear(32, 16))
        self.head = nn.Linear(16, 4)

    def attend(self, x: Tensor) -> Tensor:
        if self.mha is not None:
            return self.mha(x, x, x, need_weights=False)[0]
        q, k, v = self.qkv(x).reshape(x.shape[0], -1, 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.expand(x.shape[0], -1, -1), x), dim=1) + self.positions
        x = x + self.attend(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return self.head(x[:, 0])


class ViewedBeforeLinear(nn.Module):
    """LeNet's `view`, which needs maps in the order of channels, rows, columns."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(3, 16), conv(16, 16)
        self.fc = nn.Linear(256, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv2(F.relu(self.conv1(x)))), 2)
        return self.fc(x.view(-1, 256))


class PartialNorms(nn.Module):
    """BatchNorms without weights, without statistics, and with neither."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = conv(3, 8), conv(8, 8), conv(8, 8)
        self.bn1 = nn.BatchNorm2d(8, affine=False)
        self.bn2 = nn.BatchNorm2d(8, track_running_stats=False)
        self.bn3 = nn.BatchNorm2d(8, affine=False, track_running_stats=False)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.fc(F.relu(self.bn3(self.conv3(x))).mean((2, 3)))


def odd_convolutions() -> nn.Module:
    return Pooled(
        conv(3, 8, bias=True),
        nn.BatchNorm2d(8),
        nn.LeakyReLU(0.1),
        nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=4),
        nn.BatchNorm2d(8),
        nn.SiLU(inplace=True),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
        nn.BatchNorm2d(8),
        nn.Hardtanh(inplace=True),
        nn.Conv2d(8, 8, (1, 3), padding="same", bias=False),
        nn.BatchNorm2d(8),
        nn.ELU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU6(),
        nn.ConvTranspose2d(8, 8, 2, 2),
        nn.BatchNorm2d(8),
        nn.PReLU(8),
    )


def convolution_as_head() -> nn.Module:
    """No pooling and no linear layer: the result of a convolution is the logits."""
    body = (nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 2))
    return nn.Sequential(*body, nn.Flatten())


def reparametrised() -> nn.Module:
    return Pooled(
        parametrizations.weight_norm(conv(3, 8)),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        parametrizations.spectral_norm(conv(8, 8, bias=False)),
        nn.BatchNorm2d(8),
        nn.ReLU(),
    )


def other_norms() -> nn.Module:
    return Pooled(
        conv(3, 8),
        nn.GroupNorm(2, 8),
        nn.ReLU(),
        conv(8, 8),
        nn.LayerNorm([8, 8, 8]),
        nn.ReLU(),
        conv(8, 8),
        nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
        nn.GELU(),
    )


def sequential() -> nn.Module:
    first = (conv(3, 8), nn.ReLU(), nn.BatchNorm2d(8), nn.Dropout2d(0.3), nn.MaxPool2d(2))
    second = (nn.BatchNorm2d(8), nn.Identity(), conv(8, 8), nn.BatchNorm2d(8), nn.ReLU(True))
    head = (nn.Flatten(), nn.Linear(128, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))
    return nn.Sequential(*first, nn.Sequential(*second), *head)


COPIED: dict[str, Callable[[], nn.Module]] = {
    "in-place ResNet": in_place_resnet,
    "identity blocks": lambda: Pooled(conv(3, 8), IdentityBlock(8), IdentityBlock(8)),
    "Sequential": sequential,
    "convolution shared by two norms": SharedConv,
    "norm shared by two convolutions": SharedNorm,
    "convolution used twice": ReusedConvOutput,
    "concatenations": DenseBlocks,
    "gates": Gated,
    "view before the classifier": ViewedBeforeLinear,
    "norms without weights or statistics": PartialNorms,
    "odd convolutions": odd_convolutions,
    "convolution as head": convolution_as_head,
    "other norms": other_norms,
    "normalised by buffers": Normalised,
    "normalised by plain tensors": PlainStatistics,
    "nn.MultiheadAttention": lambda: AttentionBlock("module"),
    "scaled_dot_product_attention": lambda: AttentionBlock("functional"),
    "reparametrised weights": reparametrised,
    "norms with activations": norms_with_activations,
}
