"""A small network whose result hangs on whatever the forward pass of somebody's model may read."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fastadv

VARIABLE = (
    "FASTADV_FUZZ_SUBJECT"  # of the environment; a subject inverts its images where it is set
)
OUTSIDE = {"rolled": False}  # a global variable that subjects read
CLASSES = 5
_LARGEST_BATCH = 32


class Transform:
    """A function with a value in its closure, which may change later."""

    def __init__(self, shift: int = 0) -> None:
        self.shift = shift

    def made(self) -> Callable[[Tensor], Tensor]:
        """The function."""
        held = [self.shift]

        def transform(x: Tensor) -> Tensor:
            return x.roll(held[0], 3) if held[0] else x

        return transform


class Fuse:
    """Lets a model fail in one of its next calls."""

    def __init__(self, calls: int, error: BaseException) -> None:
        self._calls, self._error = calls, error

    def burn(self) -> None:
        """Note one call of the model.

        Raises:
            BaseException: the error, in the call in which the fuse has burnt down.
        """
        self._calls -= 1
        if self._calls == 0:
            raise self._error


class Subject(nn.Module):
    """A classifier of images [B, 3, H, W] of any size from 6 pixels on.

    Args:
        rng: decides the structure. Torch's generator decides the weights.
        products: a network of matrix products in the place of one of convolutions.

    Attributes:
        sharpness: a number that the forward pass reads.
        flags: decisions in a dictionary.
        order: the order of the channels, a list.
        gains: a factor per channel, in numpy's memory.
        transform: a function with a closure.
        file: a file whose content decides, or None.
        looks: whether the code reads a value that depends on the images.
        noise: size of random numbers that are added to the images.
        edits: whether the code writes into its images.
        adapts: whether the forward pass adapts weights that require grad to the images.
        writes: whether the forward pass writes into a parameter.
        purifies: whether the images are attacked within the forward pass.
        reuses: whether logits without a gradient are handed out in memory that the next call writes again.
        fuse: lets a call fail, or None.
        calls: number of calls; None where they are not counted.
    """

    def __init__(self, rng: random.Random, products: bool) -> None:
        super().__init__()
        width = 16 if products else rng.choice((8, 16))
        if products:
            self.stem: nn.Module = nn.Conv2d(3, width, 3, stride=3)
            self.norm: nn.Module = nn.Identity()
            self.body: nn.ModuleList = nn.ModuleList([nn.Linear(width, width) for _ in range(10)])
        else:
            self.stem = nn.Conv2d(3, width, 3, padding=1, bias=rng.random() < 0.5)
            self.norm = nn.BatchNorm2d(width)
            self.body = nn.ModuleList([nn.Conv2d(width, width, 3, padding=1) for _ in range(2)])
        self.drop = nn.Dropout(0.2)
        self.act: nn.Module = rng.choice((nn.ReLU(), nn.SiLU(), nn.GELU()))
        self.head: nn.Module = nn.Linear(width, CLASSES)
        self.scale = nn.Parameter(torch.ones(width))
        self.register_buffer("offset", 0.3 * torch.randn(width))
        self.sharpness, self.flags, self.order = 1.0, {"mirror": False}, [0, 1, 2]
        self.gains = np.array([1.0, 1.0, 1.0], dtype=np.float32)
        self.transform: Callable[[Tensor], Tensor] | None = None
        self.file: Path | None = None
        self.looks = self.edits = self.purifies = self.reuses = self.adapts = self.writes = False
        self.noise = 0.0
        self.fuse: Fuse | None = None
        self.calls: int | None = None
        self._memory = torch.zeros(_LARGEST_BATCH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, classes]."""
        if self.calls is not None:
            self.calls += 1
        if self.fuse is not None:
            self.fuse.burn()
        if self.writes:
            with torch.no_grad():
                self.scale.clamp_(0.5, 0.9)
        if self.purifies:
            x = self._purified(x)
        h = self._features(self._prepared(x))
        logits = self.head(h)
        if self.adapts and h.shape[1] == self.scale.numel() and self.scale.requires_grad:
            logits = self.head(h * self._adapted(h))
        if self.reuses and not torch.is_grad_enabled():
            memory = self._memory[: len(logits)]
            memory.copy_(logits)
            return memory
        return logits

    def _adapted(self, h: Tensor) -> Tensor:
        """Factors per feature after a step towards certain predictions."""
        with torch.enable_grad():
            logits = self.head(h.detach() * self.scale)
            loss = (logits.softmax(1) * logits.log_softmax(1)).sum()
        (grad,) = torch.autograd.grad(loss, self.scale)
        return self.scale.detach() + 30 * grad

    def _prepared(self, x: Tensor) -> Tensor:
        if self.edits:
            x[:, :, 0] = 0.5
        if self.flags["mirror"]:
            x = x.flip(3)
        if OUTSIDE["rolled"]:
            x = x.roll(2, 2)
        if os.environ.get(VARIABLE):
            x = 1 - x
        if self.file is not None and self.file.read_text() == "transposed":
            x = x.transpose(2, 3)
        if self.order != [0, 1, 2]:
            x = x[:, self.order]
        if self.transform is not None:
            x = self.transform(x)
        if self.looks and float(x.detach().mean()) > 9:
            x = -x
        if self.noise:
            x = x + self.noise * torch.randn_like(x)
        return x * torch.from_numpy(self.gains).to(x).view(1, -1, 1, 1)

    def _features(self, x: Tensor) -> Tensor:
        h = self.norm(self.stem(x)) * self.sharpness
        h = h * self.scale.view(1, -1, 1, 1) + self.offset.to(h).view(1, -1, 1, 1)
        if isinstance(self.body[0], nn.Linear):
            h = h.flatten(2).transpose(1, 2)
            for layer in self.body:
                h = h + self.act(layer(h))
            return self.drop(h).mean(1)
        for layer in self.body:
            h = h + self.drop(self.act(layer(h)))
        half = h.shape[2] // 2
        return h[:, :, :half].mean((2, 3)) - 0.5 * h[:, :, half:].mean((2, 3))

    def _purified(self, x: Tensor) -> Tensor:
        """The images after a step towards the likeliest class, by an attack within the forward pass."""
        with torch.no_grad():
            y = self.head(self._features(self._prepared(x.detach().clone()))).argmax(1)
        attack = fastadv.FGSM(_Inner(self), eps=0.02, targeted=True)
        moved = attack(x.detach().clamp(0, 1), y)
        return x + (moved - x).detach()


class _Inner:
    """What a subject does with images that are not purified, as a plain callable."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject

    def __call__(self, x: Tensor) -> Tensor:
        subject: Any = self._subject
        return subject.head(subject._features(subject._prepared(x)))


def settle_statistics(subject: Subject) -> None:
    """Give the BatchNorm layer statistics of its own images, and weights that are no identity."""
    norm = subject.norm
    if isinstance(norm, nn.BatchNorm2d):
        with torch.no_grad():
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.uniform_(-0.3, 0.3)
            norm.momentum = 1.0
            subject.train()(torch.rand(16, 3, 9, 9))
            norm.momentum = 0.1
