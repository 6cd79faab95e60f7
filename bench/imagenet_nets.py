"""Networks of ImageNet's size in plain torch, with random weights: speed can be measured without other packages.

Shapes, layers and order of operations are those of the published networks; `NETWORKS` names them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map [B, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.widen, self.narrow = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.scale = nn.Parameter(torch.full((dim,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.narrow(F.gelu(self.widen(y))) * self.scale
        return x + y.permute(0, 3, 1, 2)


def convnext_t() -> nn.Module:
    dims, depths = (96, 192, 384, 768), (3, 3, 9, 3)
    layers: list[nn.Module] = [nn.Conv2d(3, dims[0], 4, 4), ChannelNorm(dims[0], eps=1e-6)]
    for stage, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
        if stage:
            layers += [
                ChannelNorm(dims[stage - 1], eps=1e-6),
                nn.Conv2d(dims[stage - 1], dim, 2, 2),
            ]
        layers += [ConvNeXtBlock(dim) for _ in range(depth)]
    head = [nn.AdaptiveAvgPool2d(1), ChannelNorm(dims[-1], eps=1e-6), nn.Flatten()]
    return nn.Sequential(*layers, *head, nn.Linear(dims[-1], 1000))


def conv_norm(
    into: int, outof: int, kernel: int, stride: int = 1, groups: int = 1, act: type | None = None
) -> nn.Sequential:
    conv = nn.Conv2d(into, outof, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outof), *([act()] if act else []))


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int, hidden: int, act: type, gate: type) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.reduce, self.expand = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1)
        self.act, self.gate = act(), gate()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.expand(self.act(self.reduce(self.pool(x)))))


class InvertedResidual(nn.Module):
    def __init__(
        self, into: int, hidden: int, outof: int, kernel: int, stride: int, act: type,
        squeeze: nn.Module | None,
    ) -> None:  # fmt: skip
        super().__init__()
        layers: list[nn.Module] = [] if hidden == into else [conv_norm(into, hidden, 1, act=act)]
        layers.append(conv_norm(hidden, hidden, kernel, stride, hidden, act))
        layers += [] if squeeze is None else [squeeze]
        layers.append(conv_norm(hidden, outof, 1))
        self.layers, self.adds = nn.Sequential(*layers), stride == 1 and into == outof

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.adds else self.layers(x)


def mobilenet_v3_large() -> nn.Module:
    rows = [  # kernel, hidden, out, squeeze, activation, stride
        (3, 16, 16, False, nn.ReLU, 1), (3, 64, 24, False, nn.ReLU, 2),
        (3, 72, 24, False, nn.ReLU, 1), (5, 72, 40, True, nn.ReLU, 2),
        (5, 120, 40, True, nn.ReLU, 1), (5, 120, 40, True, nn.ReLU, 1),
        (3, 240, 80, False, nn.Hardswish, 2), (3, 200, 80, False, nn.Hardswish, 1),
        (3, 184, 80, False, nn.Hardswish, 1), (3, 184, 80, False, nn.Hardswish, 1),
        (3, 480, 112, True, nn.Hardswish, 1), (3, 672, 112, True, nn.Hardswish, 1),
        (5, 672, 160, True, nn.Hardswish, 2), (5, 960, 160, True, nn.Hardswish, 1),
        (5, 960, 160, True, nn.Hardswish, 1),
    ]  # fmt: skip
    layers: list[nn.Module] = [conv_norm(3, 16, 3, 2, act=nn.Hardswish)]
    into = 16
    for kernel, hidden, outof, squeezes, act, stride in rows:
        narrow = max(8, (hidden // 4 + 4) // 8 * 8)
        squeeze = SqueezeExcite(hidden, narrow, nn.ReLU, nn.Hardsigmoid) if squeezes else None
        layers.append(InvertedResidual(into, hidden, outof, kernel, stride, act, squeeze))
        into = outof
    layers += [conv_norm(into, 960, 1, act=nn.Hardswish), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(960, 1280), nn.Hardswish(), nn.Linear(1280, 1000))


def efficientnet_b0() -> nn.Module:
    rows = [  # expansion, kernel, stride, out, depth
        (1, 3, 1, 16, 1), (6, 3, 2, 24, 2), (6, 5, 2, 40, 2), (6, 3, 2, 80, 3), (6, 5, 1, 112, 3),
        (6, 5, 2, 192, 4), (6, 3, 1, 320, 1),
    ]  # fmt: skip
    layers: list[nn.Module] = [conv_norm(3, 32, 3, 2, act=nn.SiLU)]
    into = 32
    for expansion, kernel, stride, outof, depth in rows:
        for place in range(depth):
            hidden = into * expansion
            squeeze = SqueezeExcite(hidden, into // 4, nn.SiLU, nn.Sigmoid)
            step = stride if place == 0 else 1
            layers.append(InvertedResidual(into, hidden, outof, kernel, step, nn.SiLU, squeeze))
            into = outof
    layers += [conv_norm(into, 1280, 1, act=nn.SiLU), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(1280, 1000))


class DenseLayer(nn.Module):
    def __init__(self, into: int, growth: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.BatchNorm2d(into), nn.ReLU(), nn.Conv2d(into, 4 * growth, 1, bias=False),
            nn.BatchNorm2d(4 * growth), nn.ReLU(),
            nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False),
        )  # fmt: skip

    def forward(self, features: list[Tensor]) -> Tensor:
        return self.layers(torch.cat(features, 1))


class DenseBlock(nn.Module):
    def __init__(self, into: int, depth: int, growth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DenseLayer(into + i * growth, growth) for i in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(features))
        return torch.cat(features, 1)


def densenet121() -> nn.Module:
    layers: list[nn.Module] = [conv_norm(3, 64, 7, 2, act=nn.ReLU), nn.MaxPool2d(3, 2, 1)]
    channels = 64
    for stage, depth in enumerate((6, 12, 24, 16)):
        if stage:
            layers += [
                nn.BatchNorm2d(channels), nn.ReLU(),
                nn.Conv2d(channels, channels // 2, 1, bias=False), nn.AvgPool2d(2, 2),
            ]  # fmt: skip
            channels //= 2
        layers.append(DenseBlock(channels, depth, 32))
        channels += depth * 32
    layers += [nn.BatchNorm2d(channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(channels, 1000))


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(b, n, c))


class TransformerBlock(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(dim, eps=1e-6), Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    def __init__(self, image: int, patch: int, dim: int, depth: int, heads: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, dim, patch, patch)
        self.token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.places = nn.Parameter(torch.randn(1, (image // patch) ** 2 + 1, dim) * 0.02)
        self.blocks = nn.Sequential(*(TransformerBlock(dim, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.places
        return self.head(self.norm(self.blocks(x))[:, 0])


def vit_s() -> nn.Module:
    return ViT(224, 16, 384, 12, 6)


class WindowAttention(nn.Module):
    """Attention within windows of 7 x 7, moved by `shift`, with a bias per pair of places."""

    def __init__(self, dim: int, heads: int, size: int, shift: int) -> None:
        super().__init__()
        self.heads, self.shift = heads, shift
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.table = nn.Parameter(torch.randn(13 * 13, heads) * 0.02)
        places = torch.stack(torch.meshgrid(torch.arange(7), torch.arange(7), indexing="ij"))
        apart = (places.flatten(1)[:, :, None] - places.flatten(1)[:, None]) + 6
        self.register_buffer("pairs", apart[0] * 13 + apart[1])
        self.register_buffer("mask", self._mask(size) if shift else None)

    def _mask(self, size: int) -> Tensor:
        """[windows, 49, 49]: pairs of places that a shift has brought together from opposite borders."""
        along = torch.zeros(size)
        along[-7:] = 1
        along[-self.shift :] = 2
        region = (along[:, None] * 3 + along).view(size // 7, 7, size // 7, 7).transpose(1, 2)
        flat = region.reshape(-1, 49)
        return torch.where(flat[:, :, None] == flat[:, None], 0.0, -100.0)

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        if self.shift:
            x = torch.roll(x, (-self.shift, -self.shift), (1, 2))
        x = x.view(b, h // 7, 7, w // 7, 7, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 49, c)
        qkv = self.qkv(x).reshape(-1, 49, 3, self.heads, c // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.table[self.pairs.view(-1)].view(49, 49, -1).permute(2, 0, 1).unsqueeze(0)
        if self.mask is not None:
            mask = self.mask[None, :, None].expand(b, -1, self.heads, -1, -1)
            bias = bias + mask.reshape(-1, self.heads, 49, 49)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        x = self.proj(x.transpose(1, 2).reshape(-1, 49, c))
        x = x.view(b, h // 7, w // 7, 7, 7, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        return torch.roll(x, (self.shift, self.shift), (1, 2)) if self.shift else x


class SwinBlock(nn.Module):
    def __init__(self, dim: int, heads: int, size: int, shift: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = WindowAttention(dim, heads, size, shift)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchMerging(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.reduce = nn.LayerNorm(4 * dim), nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        x = x.reshape(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 4, 2, 5).flatten(3)
        return self.reduce(self.norm(x))


class ChannelsToTheEnd(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


class MeanOfPlaces(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((1, 2))


def swin_t() -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, 96, 4, 4), ChannelsToTheEnd(), nn.LayerNorm(96)]
    dim, size = 96, 56
    for stage, (depth, heads) in enumerate(zip((2, 2, 6, 2), (3, 6, 12, 24), strict=True)):
        if stage:
            layers.append(PatchMerging(dim))
            dim, size = 2 * dim, size // 2
        layers += [
            SwinBlock(dim, heads, size, 3 if place % 2 and size > 7 else 0)
            for place in range(depth)
        ]
    return nn.Sequential(*layers, nn.LayerNorm(dim), MeanOfPlaces(), nn.Linear(dim, 1000))


class Bottleneck(nn.Module):
    def __init__(self, into: int, width: int, stride: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            conv_norm(into, width, 1, act=nn.ReLU),
            conv_norm(width, width, 3, stride, act=nn.ReLU),
            conv_norm(width, 4 * width, 1),
        )
        self.short = nn.Identity()
        if stride > 1 or into != 4 * width:
            self.short = conv_norm(into, 4 * width, 1, stride)  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.layers(x) + self.short(x))


def resnet50() -> nn.Module:
    layers: list[nn.Module] = [conv_norm(3, 64, 7, 2, act=nn.ReLU), nn.MaxPool2d(3, 2, 1)]
    into = 64
    for stage, depth in enumerate((3, 4, 6, 3)):
        width = 64 << stage
        for place in range(depth):
            layers.append(Bottleneck(into, width, 2 if stage and place == 0 else 1))
            into = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(into, 1000))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "convnext_t": convnext_t,
    "mobilenet_v3_large": mobilenet_v3_large,
    "efficientnet_b0": efficientnet_b0,
    "densenet121": densenet121,
    "vit_s": vit_s,
    "swin_t": swin_t,
    "resnet50": resnet50,
}


def build(name: str) -> nn.Module:
    """A network in eval mode, with running statistics as a trained one has."""
    torch.manual_seed(0)
    model = NETWORKS[name]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()
