"""The base class of the loaders: the order of each epoch from a seed, cut into batches and slices per rank."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastadv.ops.values import check_bool, integer
from fastadv.seeding import derive_seed


class Batch(NamedTuple):
    """One step's samples.

    Attributes:
        x: images, float32 [B, C, H, W] in 0..1.
        y: labels, int64 [B].
        ids: the samples' indices in the data set, int64 [B].
    """

    x: Tensor
    y: Tensor
    ids: Tensor


class Batches(ABC):
    """A data set in batches, epoch by epoch.

    The order of an epoch depends on (seed, epoch) alone. Neither the number of ranks nor resumption changes it,
    and a checkpoint needs only epoch and step. With several ranks each global batch is cut into contiguous slices,
    one per rank. In evaluation the sizes of the slices may differ by one, and a rank skips a batch in which it has
    no sample.

    Args:
        name: the name of the data.
        count: number of samples.
        batch_size: size of the global batch, over all ranks.
        seed: governs the order.
        train: shuffle.
        drop_last: drop an incomplete last batch; None means the value of `train`.
        rank: this process's number, 0 .. world_size - 1.
        world_size: number of processes.

    Attributes:
        first_extra: index of the first extra sample, which is the number of the other samples.
        extra_count: number of extra samples.
        extra_per_batch: extra samples in a global batch.

    Raises:
        TypeError: if a number is no integer, or a flag neither True nor False.
        ValueError: if there is no sample, a number is out of range, or no full batch fits.
    """

    extra_count = 0
    extra_per_batch = 0

    def __init__(
        self,
        name: str,
        count: int,
        batch_size: int,
        *,
        seed: int,
        train: bool,
        drop_last: bool | None,
        rank: int,
        world_size: int,
    ) -> None:
        self.name = name
        self.first_extra = count
        self.batch_size = integer("batch_size", batch_size, at_least=1)
        self.seed = integer("seed", seed)
        self.train = check_bool("train", train)
        self.drop_last = self.train if drop_last is None else check_bool("drop_last", drop_last)
        self.rank = integer("rank", rank)
        self.world_size = integer("world_size", world_size, at_least=1)
        _check_sizes(name, count, self.batch_size, self.drop_last)
        _check_ranks(self.batch_size, self.rank, self.world_size, self.train)

    def __repr__(self) -> str:
        extra = f" and {self.extra_count} extra" if self.extra_count else ""
        return (
            f"{type(self).__name__}({self.name!r}, {self.first_extra} images{extra}, "
            f"batch_size={self.batch_size}, train={self.train})"
        )

    def __len__(self) -> int:
        """Steps in an epoch, over all ranks."""
        full, rest = divmod(self.first_extra, self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Yield the batches of one epoch.

        Args:
            epoch: number of the epoch, from 0.
            start_step: number of batches to skip; the others do not change.

        Raises:
            TypeError: if one of them is no integer.
            ValueError: if epoch is negative, or start_step is not in 0 .. len(self).
        """
        epoch, start_step = integer("epoch", epoch, at_least=0), integer("start_step", start_step)
        if not 0 <= start_step <= len(self):
            raise ValueError(f"start_step must be in 0 .. {len(self)}, got {start_step}")
        return self._load(self._ids(epoch, start_step), epoch)

    @abstractmethod
    def _load(self, ids: Iterable[Tensor], epoch: int) -> Iterator[Batch]:
        """Yield the batch of each step from its ids, which are never empty."""

    def _ids(self, epoch: int, start_step: int) -> Iterator[Tensor]:
        """This rank's samples in each of the epoch's steps."""
        order = self._order(epoch)
        for step in range(start_step, len(self)):
            ids = self.shard(order[step * self.batch_size : (step + 1) * self.batch_size])
            if len(ids):
                yield ids

    def _order(self, epoch: int) -> Tensor:
        """Indices of the samples in the order of the epoch."""
        if not self.train:
            return torch.arange(self.first_extra, device="cpu")
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "shuffle", epoch))
        return torch.randperm(self.first_extra, generator=generator, device="cpu")

    def shard(self, batch: Tensor) -> Tensor:
        """Return this rank's contiguous slice of a tensor of a global batch, [B, ...]."""
        begin = len(batch) * self.rank // self.world_size
        end = len(batch) * (self.rank + 1) // self.world_size
        return batch[begin:end]

    def weights_of(self, ids: Tensor, extra_weight: float) -> Tensor | None:
        """Return the weights of the images' losses. Their mean over a global batch is 1.

        Args:
            ids: indices of the images [B].
            extra_weight: weight of an extra image's loss; all other images have weight 1.

        Returns:
            float32 [B]; None if all weights are equal.
        """
        if extra_weight == 1 or not self.extra_per_batch:
            return None
        mean = 1 + (extra_weight - 1) * self.extra_per_batch / self.batch_size
        return torch.where(ids < self.first_extra, 1 / mean, extra_weight / mean)


def _check_sizes(name: str, count: int, batch_size: int, drop_last: bool) -> None:
    if count == 0:
        raise ValueError(f"data must have at least one image, got none in {name!r}")
    if drop_last and batch_size > count:
        raise ValueError(
            f"batch_size must be <= {count} (the images in {name!r}) when incomplete "
            f"batches are dropped, got {batch_size}"
        )


def _check_ranks(batch_size: int, rank: int, world_size: int, train: bool) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in 0 .. {world_size - 1}, got {rank}")
    if train and batch_size % world_size:
        raise ValueError(
            f"batch_size must be a multiple of world_size ({world_size}) in training, so that "
            f"every rank's mean weighs the same, got {batch_size}"
        )
