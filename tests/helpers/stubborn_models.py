"""Classifiers of 3x8x8 images that are hard to trace: a right copy may be made, else they run eagerly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from foreign_models import Pooled, conv
from torch import Tensor, nn


class NoisyBackward(torch.autograd.Function):
    """A gradient that differs at every pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad + 0.05 * grad.abs().mean() * torch.randn_like(grad)


class OwnWeights(nn.Module):
    """Functional layers on parameters of the model's own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv(3, 8), nn.BatchNorm2d(8)
        self.filters = nn.Parameter(torch.randn(8, 8, 3, 3) / 8)
        self.scale, self.bias = nn.Parameter(torch.rand(8)), nn.Parameter(torch.rand(8))
        self.classes = nn.Parameter(torch.randn(4, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x)))
        x = F.relu(F.group_norm(F.conv2d(x, self.filters, padding=1), 2, self.scale, self.bias))
        features = F.normalize(x.mean((2, 3)))
        return 10 * features @ F.normalize(self.classes).t()


class Options(nn.Module):
    """A forward pass with optional arguments, as in the code of several defences."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = conv(3, 8), nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, x: Tensor, return_features: bool = False, scale: float = 1.0) -> Any:
        features = F.relu(self.bn(self.conv(scale * x))).mean((2, 3))
        return (self.fc(features), features) if return_features else self.fc(features)


class ByKeyword(nn.Module):
    """Calls its layers by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = conv(3, 8), nn.BatchNorm2d(8), nn.Linear(8, 4)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        out = self.drop(input=F.relu(input=self.bn(input=self.conv(input=x))))
        return self.fc(input=out.mean((2, 3)))


class Patched(nn.Module):
    """A layer whose forward was replaced on the instance."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = conv(3, 8), nn.Linear(8, 4)
        self.conv.forward = lambda x: F.conv2d(x, self.conv.weight, stride=2) * 0.5  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.conv(x)).mean((2, 3)))


class BranchesOnData(nn.Module):
    """Looks at the images to decide what to do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Pooled(conv(3, 8), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x if x.mean() > 0.1 else 1 - x)


class BranchesOnBuffer(nn.Module):
    """Looks at a buffer, which may change, to decide what to do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Pooled(conv(3, 8), nn.ReLU())
        self.register_buffer("inverted", torch.tensor(False))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(1 - x if self.inverted else x)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(8 * x) / 8

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class StraightThrough(nn.Module):
    """Quantises its images, with a gradient of its own that tracing does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Pooled(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.net(_StraightThrough.apply(x))


class PartlyWithoutGradient(nn.Module):
    """Computes one of two branches without gradient, which tracing does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.other = Pooled(conv(3, 8), nn.ReLU()), Pooled(conv(3, 8), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            fixed = self.other(x)
        return self.net(x) * fixed


class InPlace(nn.Module):
    """In-place operations whose effect reaches other readers of the same memory."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.conv, self.second, self.fc = conv(3, 8), conv(8, 8), nn.Linear(8, 4)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.kind == "skip":  # the sum reads what the ReLU has rectified
            x = self.second(self.relu(x)) + x
        elif self.kind == "statement":  # the results of these are not used
            x.mul_(2)
            x += 0.3
            self.relu(x)
            x = self.second(x)
        elif self.kind == "view":
            x[:, :4].mul_(2)
            x[:, 2:].relu_()
        else:
            x = F.elu_(torch.neg_(x))
        return self.fc(x.mean((2, 3)))


COPIED_OR_EAGER: dict[str, Callable[[], nn.Module]] = {
    "own weights": OwnWeights,
    "optional arguments": Options,
    "layers called by keyword": ByKeyword,
    "forward set on an instance": Patched,
    "branch on a buffer": BranchesOnBuffer,
    "branch on the images": BranchesOnData,
    "gradient of its own": StraightThrough,
    "partly without gradient": PartlyWithoutGradient,
    "in place before a skip": lambda: InPlace("skip"),
    "in place as a statement": lambda: InPlace("statement"),
    "in place through a view": lambda: InPlace("view"),
    "in place by functions": lambda: InPlace("function"),
}
