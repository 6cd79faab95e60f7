"""A linear classifier, whose robust accuracy under linf perturbations is known in closed form."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LinearModel(nn.Module):
    """Logits W x + b of images [B, C, H, W], behind layers that know training from evaluation."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.flatten = nn.Flatten()
        self.dropout = nn.Dropout(0.5)
        self.linear = nn.Linear(weight.shape[1], weight.shape[0])
        with torch.no_grad():
            self.linear.weight.copy_(weight)
            self.linear.bias.copy_(-weight.sum(1) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.dropout(self.flatten(x)))

    def exactly_robust(self, x: Tensor, y: Tensor, eps: float) -> Tensor:
        """[B] bool: no image within eps (linf) and in [0, 1] is classified as another class than y.

        The difference of two logits is linear, so each pixel moves to the end of its range that is worst.
        """
        weight, bias = self.linear.weight.detach().double(), self.linear.bias.detach().double()
        flat = x.double().flatten(1)
        low, high = (flat - eps).clamp(min=0), (flat + eps).clamp(max=1)
        difference = weight[None] - weight[y][:, None]  # [B, classes, pixels]
        reach = torch.where(difference > 0, high[:, None], low[:, None])
        margin = (difference * reach).sum(2) + bias[None] - bias[y][:, None]
        margin.scatter_(1, y[:, None], -torch.inf)
        return margin.amax(1) < 0


def linear_problem(
    classes: int, n: int, seed: int = 0, wrong: int = 0
) -> tuple[LinearModel, Tensor, Tensor]:
    """A linear model, images [n, 1, 8, 8] in [0, 1], and its own labels, the first `wrong` changed."""
    generator = torch.Generator().manual_seed(seed)
    model = LinearModel(torch.randn(classes, 64, generator=generator)).eval()
    x = torch.rand(n, 1, 8, 8, generator=generator)
    y = model(x).argmax(1)
    y[:wrong] = (y[:wrong] + 1) % classes
    return model, x, y


class Staircase(nn.Module):
    """Rounds the images to so many levels before a model: its gradient in the images is zero."""

    def __init__(self, model: nn.Module, levels: int) -> None:
        super().__init__()
        self.model, self.levels = model, levels

    def forward(self, x: Tensor) -> Tensor:
        return self.model((x * self.levels).round() / self.levels)
