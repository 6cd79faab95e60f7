"""The loader for images in memory: batches of data that stay on the device, from seed, epoch and step alone."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from fastadv.data.batches import Batch, Batches
from fastadv.data.images import ImageData
from fastadv.fields import arguments_checked
from fastadv.ops import crop_flip
from fastadv.ops.values import check_bool, integer, number
from fastadv.seeding import derive_seed


class Loader(Batches):
    """Shuffled, augmented batches for training, or plain ordered ones for evaluation.

    The data are moved to the device once, as uint8. The augmentation of an image depends on (seed,
    epoch, its index) alone, as the order does on (seed, epoch).

    With extra images each training batch has a fixed number of extra images, and so many fewer images
    of the data. The extra images have a random order of their own in each epoch, are repeated as often
    as needed, and stand at random places in the batch. Their ids follow the ids of the data.

    Args:
        data: the images.
        batch_size: size of the global batch, over all ranks.
        seed: governs shuffling and augmentation.
        train: shuffle, augment and drop an incomplete last batch.
        pad: pixels of padding before the random crop; 0 means no crop. Training only.
        mode: padding, "constant" (zeros) or "reflect".
        flip: mirror images at random. Training only.
        device: device of data and batches; None for the device of the data.
        channels_last: memory format of the batches.
        drop_last: drop an incomplete last batch; None means the value of `train`.
        rank: this process's number, 0 .. world_size - 1.
        world_size: number of processes.
        extra: further images, such as synthetic ones. Training only.
        extra_fraction: part of each batch that is extra, rounded to whole images.

    Attributes:
        data: the images and then the extra ones, on the device.

    Raises:
        TypeError: if a number is of another type, or a flag neither True nor False.
        ValueError: if the data are empty, a number is out of range, or no full batch fits.
    """

    @arguments_checked
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
        extra: ImageData | None = None,
        extra_fraction: float = 0.0,
    ) -> None:
        super().__init__(
            data.name,
            len(data),
            batch_size,
            seed=seed,
            train=train,
            drop_last=drop_last,
            rank=rank,
            world_size=world_size,
        )
        pad = integer("pad", pad, at_least=0)
        extra_fraction = number("extra_fraction", extra_fraction)
        flip = check_bool("flip", flip)
        _check_padding(data, pad, mode)
        self.extra_per_batch = round(batch_size * extra_fraction)
        if extra is not None or extra_fraction:
            _check_extra(extra, extra_fraction, batch_size, train and self.drop_last)
        if extra is not None:
            self.extra_count = len(extra)
            data = data.joined(extra, "extra")
        self.data = data.to(device)
        self.pad = pad if train else 0
        self.mode = mode
        self.flip = flip and train
        self.channels_last = check_bool("channels_last", channels_last)

    def _order(self, epoch: int) -> Tensor:
        """Indices of the samples in the order of the epoch, on the device."""
        order = super()._order(epoch)
        if self.extra_per_batch:
            order = self._with_extra(order, derive_seed(self.seed, "extra", epoch))
        return order.to(self.data.labels.device)

    def _with_extra(self, order: Tensor, seed: int) -> Tensor:
        """Return the order of the epoch, with extra images in each batch, from the order of the data."""
        generator = torch.Generator().manual_seed(seed)
        steps, per_batch = len(self), self.extra_per_batch
        others = self.batch_size - per_batch
        rounds = range(math.ceil(steps * per_batch / self.extra_count))
        extra = [
            torch.randperm(self.extra_count, generator=generator, device="cpu") for _ in rounds
        ]
        batches = torch.cat(
            (
                order[: steps * others].view(steps, others),
                self.first_extra + torch.cat(extra)[: steps * per_batch].view(steps, per_batch),
            ),
            1,
        )
        # Mixed, so that the slice of each rank has about the same part of extra images.
        places = torch.rand(
            batches.shape, generator=generator, dtype=torch.float32, device="cpu"
        ).argsort(1)
        return batches.gather(1, places).flatten()

    def _load(self, ids: Iterable[Tensor], epoch: int) -> Iterator[Batch]:
        augment_seed = derive_seed(self.seed, "augment", epoch)
        for chosen in ids:
            x = crop_flip(
                self.data.images,
                chosen,
                pad=self.pad,
                mode=self.mode,
                flip=self.flip,
                seed=augment_seed,
                channels_last=self.channels_last,
            )
            yield Batch(x, self.data.labels[chosen], chosen)


def _check_padding(data: ImageData, pad: int, mode: str) -> None:
    if mode not in ("constant", "reflect"):
        raise ValueError(f"mode must be 'constant' or 'reflect', got {mode!r}")
    side = min(data.image_size)
    if pad < side:
        return
    if mode == "reflect":
        raise ValueError(f"pad must be < {side} (the images' side) with mode 'reflect', got {pad}")
    warnings.warn(
        f"pad is {pad}, and the images' side is {side}: some crops are padding alone, with nothing of an image",
        stacklevel=3,
    )


def _check_extra(
    extra: ImageData | None, extra_fraction: float, batch_size: int, whole_batches: bool
) -> None:
    if extra is None:
        raise ValueError(f"extra_fraction must be 0 without extra images, got {extra_fraction}")
    if len(extra) == 0:
        raise ValueError(f"extra must have at least one image, got none in {extra.name!r}")
    if not 0 <= extra_fraction <= 1 or round(batch_size * extra_fraction) < 1:
        raise ValueError(
            "extra_fraction must be in 0..1 and give at least one extra image in a batch of "
            f"{batch_size}, got {extra_fraction}"
        )
    if not whole_batches:
        raise ValueError(
            "extra must be None in evaluation and where incomplete batches are kept, got "
            f"{len(extra)} images of {extra.name!r}"
        )
