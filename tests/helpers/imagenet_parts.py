"""Small networks of the layers that networks of ImageNet's size are made of."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

import imagenet_nets as nets


class Pool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def convnext() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 24, 2, 2), nets.ChannelNorm(24), nets.ConvNeXtBlock(24),
        nets.ConvNeXtBlock(24), Pool(), nn.LayerNorm(24), nn.Linear(24, 5),
    )  # fmt: skip


class ScaledBehind(nn.Module):
    """A layer scale [C, 1, 1] behind the permutation, as other libraries have it."""

    def __init__(self) -> None:
        super().__init__()
        self.widen, self.narrow = nn.Linear(16, 48), nn.Linear(48, 16)
        self.scale = nn.Parameter(torch.rand(16, 1, 1) + 0.5)
        self.stem, self.last = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = F.gelu(self.widen(torch.permute(x, (0, 2, 3, 1))), approximate="tanh")
        x = x + self.scale * torch.permute(self.narrow(y), (0, 3, 1, 2))
        return self.last(x.mean((2, 3)))


def mobile(act: type, gate: type, stride: int = 2) -> nn.Module:
    squeeze = nets.SqueezeExcite(40, 8, nn.ReLU, gate)
    return nn.Sequential(
        nets.conv_norm(3, 16, 3, act=act),
        nets.InvertedResidual(16, 40, 16, 5, 1, act, squeeze),
        nets.InvertedResidual(16, 48, 24, 3, stride, act, None),
        Pool(), nn.Linear(24, 5),
    )  # fmt: skip


def dense() -> nn.Module:
    return nn.Sequential(
        nets.conv_norm(3, 16, 3, act=nn.ReLU), nets.DenseBlock(16, 3, 8),
        nn.BatchNorm2d(40), nn.ReLU(), nn.Conv2d(40, 16, 1), nn.AvgPool2d(2, 2),
        nets.DenseBlock(16, 2, 8), Pool(), nn.Linear(32, 5),
    )  # fmt: skip


def vit() -> nn.Module:
    model = nets.ViT(image=9, patch=3, dim=24, depth=2, heads=3)
    model.head = nn.Linear(24, 5)
    return model


def swin() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 2, 2), nets.ChannelsToTheEnd(), nets.SwinBlock(16, 2, 14, 0),
        nets.SwinBlock(16, 2, 14, 3), nets.PatchMerging(16), nets.MeanOfPlaces(),
        nn.Linear(32, 5),
    )  # fmt: skip


SIZES = {"vit": (9, 9), "swin": (28, 28)}  # of the images of two of them


def settled(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()


class Odd(nn.Module):
    """Calls that look like those of a step, and are others."""

    def __init__(self, variant: str) -> None:
        super().__init__()
        self.variant = variant
        self.stem, self.other = nn.Conv2d(3, 16, 3), nn.Conv2d(3, 16, 3)
        self.rows, self.last = nn.Linear(16, 16), nn.Linear(16, 5)
        self.norms = nn.ModuleList([nn.BatchNorm2d(32), nn.BatchNorm2d(64)])
        self.number, self.grid = nn.Parameter(torch.rand(1)), nn.Parameter(torch.rand(10, 16))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.stem(x), self.other(x)
        rows = a.permute(0, 2, 3, 1)
        if self.variant == "norm over three axes":
            a = F.layer_norm(a, a.shape[1:])
        elif self.variant == "norm across memory":
            a = F.layer_norm(a, a.shape[-1:]) * b
        elif self.variant == "masked attention":
            a = F.scaled_dot_product_attention(a, b, b, is_causal=True)
        elif self.variant == "scaled attention":
            a = F.scaled_dot_product_attention(a, b, a + b, scale=0.3)
        elif self.variant == "grouped heads":
            a = F.scaled_dot_product_attention(a, b[:, :1], b[:, :1] * 2)
        elif self.variant == "attention with a mask of the images":
            a = F.scaled_dot_product_attention(a, b, a + b, attn_mask=b.mean(1, keepdim=True))
        elif self.variant == "concatenations that branch":
            c = F.relu(self.norms[0](torch.cat([a, b], 1)))
            d = F.relu(self.norms[1](torch.cat([a, b, c], 1)))
            e = self.norms[1](torch.cat([a, b, c * 2], 1))
            a = a * d[:, :16] + e[:, 16:32] + self.norms[0](torch.cat([a, d[:, :16]], 1))[:, 16:]
        elif self.variant == "some of the slices":
            a = torch.stack([a, b, a + b], 2).unbind(2)[1] * a
        elif self.variant == "product":
            a = a * b
        elif self.variant == "scale of all":
            a = (self.rows(rows) * self.number).permute(0, 3, 1, 2)
        elif self.variant == "scale of places":
            a = (self.rows(rows) * self.grid).permute(0, 3, 1, 2)
        elif self.variant == "hardtanh":
            a = F.hardtanh(a, -0.5, 0.5)
        elif self.variant == "sum of shapes":
            a = a + b.amax(1, keepdim=True)
        elif self.variant == "strided":
            a = F.gelu(a[:, :, ::2]) + b[:, :, ::2]
        return self.last(a.mean((2, 3)))


ODD = (
    "norm over three axes", "norm across memory", "masked attention", "scaled attention",
    "grouped heads", "product", "scale of all", "scale of places", "hardtanh", "sum of shapes",
    "strided", "attention with a mask of the images", "some of the slices", "concatenations that branch",
)  # fmt: skip
