"""Seeded, class-balanced choices of samples: subsets and hold-out splits."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from fastadv.data.images import ImageData
from fastadv.fields import arguments_checked
from fastadv.ops.values import integer
from fastadv.seeding import derive_seed


@arguments_checked
def subset(data: ImageData, n: int, seed: int = 0) -> ImageData:
    """Choose n images, as evenly over the classes as the data allow.

    The choice depends on the labels in their order and on the seed alone. The subset of n images
    contains the subset of any smaller n.

    Args:
        data: the images to choose from.
        n: how many, 0 .. len(data).
        seed: seed of the choice.

    Returns:
        The chosen images in their original order.

    Raises:
        ValueError: if n is out of range.
    """
    chosen = balanced_choice(data.labels, n, seed)
    return data.select(chosen, f"{data.name} (subset of {n}, seed {seed})")


@arguments_checked
def split_validation(data: ImageData, n: int, seed: int = 0) -> tuple[ImageData, ImageData]:
    """Hold out n images, as evenly over the classes as the data allow.

    Args:
        data: the images to split, usually a training set.
        n: how many to hold out, 0 .. len(data).
        seed: seed of the choice.

    Returns:
        The remaining images and the held-out ones, both in their original order.

    Raises:
        ValueError: if n is out of range.
    """
    held_out = balanced_choice(data.labels, n, seed)
    remaining = torch.ones(len(data), dtype=torch.bool)
    remaining[held_out] = False
    rest = data.select(remaining.nonzero().flatten(), f"{data.name} (without {n} held out)")
    return rest, data.select(held_out, f"{data.name} ({n} held out)")


def balanced_choice(labels: Tensor, n: int, seed: int) -> Tensor:
    """Return n ascending indices into labels, int64 [n], evenly over the classes.

    Every class is put in a seeded order, and the classes take turns until n are chosen. The order
    comes from a hash of each index, so it is the same with every version of torch.
    """
    n, seed = integer("n", n), integer("seed", seed)
    if not 0 <= n <= len(labels):
        raise ValueError(f"n must be in 0 .. {len(labels)} (the size of the data), got {n}")
    order = _seeded_order(len(labels), seed)
    turns: list[tuple[int, int, int]] = []  # (turn, class, index)
    taken: dict[int, int] = {}
    classes: list[int] = labels.tolist()
    for index in order:
        turn = taken.get(classes[index], 0)
        taken[classes[index]] = turn + 1
        turns.append((turn, classes[index], index))
    return torch.tensor(sorted(index for _, _, index in sorted(turns)[:n]), dtype=torch.int64)


@lru_cache(maxsize=8)
def _seeded_order(n: int, seed: int) -> tuple[int, ...]:
    """Return the indices below n in the order of their hashes; cached, because every evaluation asks for it."""
    keys = [derive_seed(seed, "choice", index) for index in range(n)]
    return tuple(sorted(range(n), key=keys.__getitem__))


def evenly_spread(n: int, count: int) -> Tensor:
    """Return count indices below n, int64, ascending and at equal distances; all of them if there are fewer."""
    if count >= n:
        return torch.arange(n)
    return (2 * torch.arange(count) + 1) * n // (2 * count)
