"""Mixup: batches in which each image and its label are mixed with another image and its label."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastadv.engine.frozen import frozen
from fastadv.ops.philox import philox
from fastadv.ranks import Ranks
from fastadv.seeding import derive_seed
from fastadv.trainers.method import TrainBatch


def mixed(batch: TrainBatch, alpha: float, num_classes: int, ranks: Ranks) -> TrainBatch:
    """Return a batch with images ``share x_i + (1 - share) x_j`` and soft labels with the same shares.

    The share is one number per step from the Beta(alpha, alpha) distribution. The partner j of each image is
    another image of the global batch: the next in an order that random numbers of the images' ids give. So the
    mixtures depend on the seed, the epoch, the step and the images, and not on the number of processes.

    Source: Zhang et al. 2018; one share per batch, as in their code and in robust_overfitting.

    Args:
        batch: images and labels [B] of this process.
        alpha: parameter of the distribution, > 0.
        num_classes: number of classes.
        ranks: the processes, each with its part of the batch.

    Returns:
        The batch with images [B, C, H, W] and labels [B, num_classes] float32.
    """
    share = share_of(batch, alpha)
    ids, x, y = (ranks.gather(part) for part in (batch.ids, batch.x, batch.y))
    own = slice(ranks.rank * len(batch.y), (ranks.rank + 1) * len(batch.y))
    partners = partners_of(ids, batch.seed("mixup"))[own]
    labels = F.one_hot(y, num_classes).float()
    images = torch.empty_like(batch.x).copy_(torch.lerp(x[partners], batch.x, share))
    return replace(batch, x=images, y=torch.lerp(labels[partners], labels[own], share))


def share_of(batch: TrainBatch, alpha: float) -> float:
    """Return the share of the first image of each pair, 0..1."""
    seed = derive_seed(batch.run_seed, "mixup share", batch.epoch, batch.step)
    return float(np.random.Generator(np.random.Philox(seed)).beta(alpha, alpha))


def partners_of(ids: Tensor, seed: int) -> Tensor:
    """Return the index of each image's partner, [B] int64: the next image in a random cyclic order."""
    first, second = philox(seed, ids, 1)[:, :2].unbind(1)
    # 63 bits of two 32-bit words give all ids different places; images with the same id keep their order.
    order = (first << 31 | second >> 1).argsort(stable=True)
    return torch.empty_like(order).scatter_(0, order, order.roll(-1))


def classes_of(model: nn.Module, x: Tensor) -> int:
    """Return the number of a model's logits, by a pass over the first image of [B, C, H, W]."""
    with frozen(model), torch.no_grad():
        return int(model(x[:1]).shape[1])
