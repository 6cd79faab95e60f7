"""Batches from data that live on the device, as a pure function of seed, epoch and step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastadv.data.images import ImageData
from fastadv.ops import crop_flip
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


class Loader:
    """Shuffled, augmented batches for training, or plain ordered ones for evaluation.

    The data are moved to the device once, as uint8. The order of an epoch depends on (seed, epoch)
    alone and the augmentation of an image on (seed, epoch, its index), so nothing changes with the
    number of ranks or with resumption, and there is no state to save but epoch and step.

    With several ranks each global batch is cut into contiguous slices, one a rank. In
    evaluation their sizes may differ by one, and a rank skips a batch that has no sample for it.

    Args:
        data: the images.
        batch_size: size of the global batch, over all ranks.
        seed: governs shuffling and augmentation.
        train: shuffle, augment and drop an incomplete last batch; otherwise none of these.
        pad: random crop after padding by so many pixels; 0 for none. Training only.
        mode: what to pad with, "constant" (zeros) or "reflect".
        flip: mirror images at random. Training only.
        device: where data and batches live; None for where the data are.
        channels_last: memory format of the batches.
        drop_last: drop an incomplete last batch; None for as `train`.
        rank: this process's number, 0 .. world_size - 1.
        world_size: number of processes.

    Raises:
        ValueError: if the data are empty, a number is out of range, or no full batch fits.
    """

    def __init__(
        self,
        data: ImageData,
        batch_size: int,
        *,
        seed: int = 0,
        train: bool,
        pad: int = 4,
        mode: str = "constant",
        flip: bool = True,
        device: torch.device | str | None = None,
        channels_last: bool = False,
        drop_last: bool | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.drop_last = train if drop_last is None else drop_last
        _check_sizes(data, batch_size, self.drop_last, pad, mode)
        _check_ranks(batch_size, rank, world_size, train)
        self.data = data.to(device)
        self.batch_size = batch_size
        self.seed = seed
        self.train = train
        self.pad = pad if train else 0
        self.mode = mode
        self.flip = flip and train
        self.channels_last = channels_last
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        """Steps in an epoch, over all ranks."""
        full, rest = divmod(len(self.data), self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Yield the batches of one epoch.

        Args:
            epoch: number of the epoch, from 0.
            start_step: skip so many batches; the rest are what they would have been anyway.

        Raises:
            ValueError: if epoch is negative, or start_step is not in 0 .. len(self).
        """
        if epoch < 0:
            raise ValueError(f"epoch must be >= 0, got {epoch}")
        if not 0 <= start_step <= len(self):
            raise ValueError(f"start_step must be in 0 .. {len(self)}, got {start_step}")
        return self._batches(epoch, start_step)

    def _batches(self, epoch: int, start_step: int) -> Iterator[Batch]:
        order = self._order(epoch)
        augment_seed = derive_seed(self.seed, "augment", epoch)
        for step in range(start_step, len(self)):
            batch = order[step * self.batch_size : (step + 1) * self.batch_size]
            ids = self._shard(batch)
            if len(ids):
                yield self._load(ids, augment_seed)

    def _order(self, epoch: int) -> Tensor:
        """Indices into the data in the order of the epoch, on the device."""
        if not self.train:
            return torch.arange(len(self.data), device=self.data.labels.device)
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "shuffle", epoch))
        order = torch.randperm(len(self.data), generator=generator)
        return order.to(self.data.labels.device)

    def _shard(self, batch: Tensor) -> Tensor:
        """This rank's contiguous slice of a global batch."""
        begin = len(batch) * self.rank // self.world_size
        end = len(batch) * (self.rank + 1) // self.world_size
        return batch[begin:end]

    def _load(self, ids: Tensor, augment_seed: int) -> Batch:
        x = crop_flip(
            self.data.images,
            ids,
            pad=self.pad,
            mode=self.mode,
            flip=self.flip,
            seed=augment_seed,
            channels_last=self.channels_last,
        )
        return Batch(x, self.data.labels[ids], ids)


def _check_sizes(data: ImageData, batch_size: int, drop_last: bool, pad: int, mode: str) -> None:
    if len(data) == 0:
        raise ValueError(f"data must have at least one image, got none in {data.name!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be >= 1, got {batch_size}")
    if drop_last and batch_size > len(data):
        raise ValueError(
            f"batch_size must be <= {len(data)} (the images in {data.name!r}) when incomplete "
            f"batches are dropped, got {batch_size}"
        )
    if pad < 0:
        raise ValueError(f"pad must be >= 0, got {pad}")
    if mode not in ("constant", "reflect"):
        raise ValueError(f"mode must be 'constant' or 'reflect', got {mode!r}")
    if mode == "reflect" and pad >= min(data.image_size):
        raise ValueError(
            f"pad must be < {min(data.image_size)} (the images' side) with mode 'reflect', "
            f"got {pad}"
        )


def _check_ranks(batch_size: int, rank: int, world_size: int, train: bool) -> None:
    if world_size < 1:
        raise ValueError(f"world_size must be >= 1, got {world_size}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in 0 .. {world_size - 1}, got {rank}")
    if train and batch_size % world_size:
        raise ValueError(
            f"batch_size must be a multiple of world_size ({world_size}) in training, so that "
            f"every rank's mean weighs the same, got {batch_size}"
        )
