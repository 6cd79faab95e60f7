"""Training images that are read when they are needed, from a torch Dataset of any size, and their loader."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from fastadv.data.batches import Batch, Batches
from fastadv.data.errors import DataFormatError
from fastadv.data.images import check_channels_first, item_image, item_label
from fastadv.data.read_ahead import read_ahead
from fastadv.ops.values import check_bool, check_device, integer, shown
from fastadv.seeding import derive_seed

_NUMPY_SEEDS = 2**32


@dataclass(frozen=True, eq=False)
class StreamedData:
    """Labelled training images that do not fit into memory, such as ImageNet.

    Attributes:
        dataset: a map-style Dataset of items (image, label); an image is a uint8 tensor [C, H, W] or picture
            [H, W] or [H, W, C], or a floating-point tensor [C, H, W] in 0..1. All have one size. Random crops and
            other transforms are up to the dataset. They take random numbers from torch, numpy or the module
            random, which are seeded for each item by (seed of the run, epoch, index).
        num_classes: number of classes; labels are in 0 .. num_classes - 1.
        name: the name for messages and logs.
        workers: processes that read ahead; with 0 images are read between the iterations.
        supports: fields of a recipe that the dataset itself applies, such as "flip". Augmentations that are not
            named here must be off in the recipe, because no other part applies them.
        image_shape: [C, H, W] of the first image.

    Raises:
        TypeError: if the first item is of another kind.
        ValueError: if there is no item, or a number is out of range.
    """

    dataset: Dataset[Any]
    num_classes: int
    name: str
    workers: int = 2
    supports: frozenset[str] = frozenset()
    image_shape: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        if not (hasattr(self.dataset, "__len__") and hasattr(self.dataset, "__getitem__")):
            raise TypeError(
                "dataset must be a map-style Dataset, with a length and items by their index, got "
                f"{shown(self.dataset)}"
            )
        if len(self) == 0:
            raise ValueError("dataset must have at least one item, got none")
        for name, least in (("num_classes", 1), ("workers", 0)):
            object.__setattr__(self, name, integer(name, getattr(self, name), at_least=least))
        with _seeded(0):
            image, label = self.dataset[0]
        shape = tuple(item_image(image).shape)
        check_channels_first("images of dataset", shape)
        item_label(label, 0)
        object.__setattr__(self, "image_shape", shape)

    def __len__(self) -> int:
        return len(cast(Sized, self.dataset))

    @property
    def in_channels(self) -> int:
        """Number of channels C."""
        return self.image_shape[0]


class StreamLoader(Batches):
    """Shuffled training batches of a Dataset. They do not depend on the number of processes that read it.

    Args:
        data: the images.
        batch_size: size of the global batch, over all ranks.
        seed: governs the order and the random numbers of each item.
        device: where batches are put.
        channels_last: memory format of the batches.
        rank: this process's number, 0 .. world_size - 1.
        world_size: number of processes that train.

    Raises:
        ValueError: if a number is out of range, or no full batch fits.
    """

    def __init__(
        self,
        data: StreamedData,
        batch_size: int,
        *,
        seed: int = 0,
        device: torch.device | str | None = None,
        channels_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(
            data.name,
            len(data),
            batch_size,
            seed=seed,
            train=True,
            drop_last=None,
            rank=rank,
            world_size=world_size,
        )
        self.data = data
        self._device = check_device(device or "cpu")
        last = check_bool("channels_last", channels_last)
        self._layout = torch.channels_last if last else torch.contiguous_format

    def _load(self, ids: Iterable[Tensor], epoch: int) -> Iterator[Batch]:
        """Read ahead in other processes; to a GPU, copy while it computes."""
        steps = [chosen.tolist() for chosen in ids]
        on_cuda = self._device.type == "cuda"
        reader = DataLoader(
            _SeededItems(self.data, derive_seed(self.seed, "augment", epoch)),
            batch_sampler=steps,
            num_workers=min(self.data.workers, len(steps)),
            collate_fn=_collated,
            pin_memory=on_cuda,
            # Not drawn from the caller's generator, which a step may have seeded for dropout.
            generator=torch.Generator().manual_seed(0),
        )
        for found in read_ahead(reader):
            if isinstance(found, Exception):
                raise found
            images, labels, chosen = found
            x, y, taken = (
                t.to(self._device, non_blocking=on_cuda) for t in (images, labels, chosen)
            )
            x = x.to(torch.float32).div_(255) if x.dtype == torch.uint8 else x.to(torch.float32)
            yield Batch(x.contiguous(memory_format=self._layout), y, taken)


class _SeededItems(Dataset[Any]):
    """The items of a data set, each with random numbers of its own: (image, label, index)."""

    def __init__(self, data: StreamedData, seed: int) -> None:
        self._data = data
        self._seed = seed

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, int, int]] | Exception:
        """Read a batch. A worker returns an error, in whose place torch would raise one with a long traceback."""
        try:
            return [self[index] for index in indices]
        except (TypeError, ValueError, RuntimeError) as error:
            if get_worker_info() is None:
                raise
            return error

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        data = self._data
        with _seeded(derive_seed(self._seed, "item", index)):
            try:
                image, label = data.dataset[index]
            except DataFormatError:
                raise
            except Exception as error:
                raise RuntimeError(
                    f"item {index} of {data.name} cannot be read: {type(error).__name__}: {error}"
                ) from error
        image, label = item_image(image), item_label(label, index)
        if tuple(image.shape) != data.image_shape:
            raise ValueError(
                f"images of dataset must have one shape, got {tuple(image.shape)} at index {index} "
                f"and {data.image_shape} at index 0"
            )
        if not 0 <= label < data.num_classes:
            raise ValueError(
                f"labels must be in 0 .. {data.num_classes - 1}, got {label} at index {index}"
            )
        if image.dtype != torch.uint8 and not bool(((image >= 0) & (image <= 1)).all()):
            raise ValueError(f"floating-point images must be in 0..1, got others at index {index}")
        return image, label, index


def _collated(items: list[Any] | Exception) -> Any:
    return items if isinstance(items, Exception) else default_collate(items)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the CPU generators that transforms draw from, and put them back."""
    state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % _NUMPY_SEEDS)
        try:
            yield
        finally:
            random.setstate(state)
            np.random.set_state(numpy_state)
