"""Layers of the random networks that torch does not have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Function(nn.Module):
    """A function of the features as a module.

    Args:
        name: what it does, to be shown.
        function: from features [B, ...] to features [B, ...].
    """

    def __init__(self, name: str, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.name, self.function = name, function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)

    def extra_repr(self) -> str:
        return self.name


class Residual(nn.Module):
    """A branch that is added, concatenated or multiplied to its input; the way may be changed later."""

    def __init__(self, branch: nn.Module, way: str, in_place: bool) -> None:
        super().__init__()
        self.branch, self.way, self.in_place = branch, way, in_place
        self.scale = 1.0
        self.skipped = False

    def forward(self, x: Tensor) -> Tensor:
        if self.skipped and self.way != "cat":
            return x
        out = self.branch(x)
        if self.way == "cat":
            return torch.cat((x, out * self.scale), 1)
        if self.way == "gate":
            return x * out.sigmoid() * self.scale
        if self.in_place and out is not x:
            out += x
            return out
        return x + self.scale * out

    def extra_repr(self) -> str:
        return f"{self.way}, in_place={self.in_place}"


class Attention(nn.Module):
    """Self-attention over the positions, written out or by torch's fused function."""

    def __init__(self, channels: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)
        self.heads, self.fused = heads, fused

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        batch, count, width = tokens.shape
        parts = self.qkv(tokens).view(batch, count, 3, self.heads, width // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            mixed = (q @ k.transpose(-2, -1) / (width // self.heads) ** 0.5).softmax(-1) @ v
        mixed = self.out(mixed.transpose(1, 2).reshape(batch, count, width))
        return x + mixed.transpose(1, 2).reshape(x.shape)


class Buffered(nn.Module):
    """Multiplies by a buffer and adds another, which is derived from the first in every pass."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("gain", torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        gain = self.gain.view(1, -1, *[1] * (x.dim() - 2))
        return x * gain + (gain - gain.mean())


class Quantized(torch.autograd.Function):
    """Rounds to levels, with the gradient passed straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, levels: int) -> Tensor:
        return (x * levels).round() / levels

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class Tempered(nn.Module):
    """Divides by a temperature in a buffer, which its code reads as a tensor or as a number."""

    def __init__(self, as_number: bool) -> None:
        super().__init__()
        self.as_number = as_number
        self.register_buffer("temperature", torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        return x / (float(self.temperature) if self.as_number else self.temperature)


class Normalize(nn.Module):
    """What stands in front of most published networks."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.rand(1, channels, 1, 1))
        self.register_buffer("std", torch.rand(1, channels, 1, 1) + 0.2)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std
