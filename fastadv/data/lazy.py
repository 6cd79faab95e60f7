"""Data that are read image by image: the facts about a torch Dataset or DataLoader known before reading it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    default_collate,
    default_convert,
)

from fastadv.data.hub import HubImages, is_plain_split
from fastadv.data.items import IMAGE_COLUMNS, LABEL_COLUMNS, column
from fastadv.data.streaming import StreamedData
from fastadv.ops.checks import INTEGER_DTYPES

MEMORY_LIMIT = 4 * 2**30  # bytes of images of a loader that can only be read once


@dataclass(frozen=True)
class LazyData:
    """A map-style Dataset and how it is to be read.

    Attributes:
        dataset: a Dataset with items that `fastadv.data.items.read_item` takes.
        name: the name in reports.
        num_classes: number of classes; None where the dataset does not state it.
        workers: processes that read.
        options: further arguments of the DataLoader that reads.
    """

    dataset: Any
    name: str
    num_classes: int | None
    workers: int = 0
    options: dict[str, Any] = field(default_factory=dict)


def as_lazy(data: Any) -> LazyData | None:
    """Wrap data that give their images one by one; return None for other data, such as tensors.

    Args:
        data: a map-style torch Dataset, a ``StreamedData``, or any other object with ``__len__`` and
            ``__getitem__`` that is neither a sequence, a mapping nor an array.
    """
    if isinstance(data, StreamedData):
        return LazyData(data.dataset, data.name, data.num_classes, data.workers)
    if is_plain_split(data):
        data = HubImages(data, workers=0)
    if not _has_items(data):
        return None
    workers = getattr(data, "workers", 0)
    name = getattr(data, "name", None)
    return LazyData(
        data,
        name if isinstance(name, str) else type(data).__name__,
        known_classes(data),
        workers if isinstance(workers, int) else 0,
    )


def of_loader(loader: DataLoader[Any]) -> LazyData | None:
    """The Dataset of a loader, where the loader does no more than batch and shuffle it; else None.

    The order of the loader is not kept: items come in the order of their indices. A last batch that the loader
    would drop is included.
    """
    dataset: Any = loader.dataset
    if isinstance(dataset, IterableDataset) or type(loader).__iter__ is not DataLoader.__iter__:
        return None  # a class with an order of its own may change the images, too
    batched = loader.batch_sampler is not None
    if loader.collate_fn is not (default_collate if batched else default_convert):
        return None
    if batched and type(loader.batch_sampler) is not BatchSampler:
        return None
    sampler = loader.sampler
    if type(sampler) is SubsetRandomSampler:
        dataset = Subset(dataset, sorted(int(index) for index in sampler.indices))
    elif type(sampler) is RandomSampler:
        if sampler.replacement or sampler.num_samples != len(cast(Sized, dataset)):
            return None
    elif type(sampler) is not SequentialSampler:
        return None
    found = as_lazy(dataset)
    if found is None:
        return None
    options: dict[str, Any] = {"worker_init_fn": loader.worker_init_fn}
    if loader.num_workers:
        options["multiprocessing_context"] = loader.multiprocessing_context
    return LazyData(found.dataset, found.name, found.num_classes, loader.num_workers, options)


def read_once(loader: DataLoader[Any], at_most: int | None) -> tuple[Tensor, Tensor]:
    """Read the batches of a loader into memory, in their order.

    Args:
        loader: gives batches (images [B, ...], labels [B]), or dicts with the keys of `fastadv.data.items`.
        at_most: the number of images to stop after; None reads all.

    Returns:
        Images [N, ...] and labels [N].

    Raises:
        TypeError: if a batch is of another kind.
        ValueError: if there are no batches, more than `MEMORY_LIMIT` bytes of images, or if the workers of an
            IterableDataset all give the same images.
    """
    images: list[Tensor] = []
    labels: list[Tensor] = []
    count = size = 0
    for number, batch in enumerate(loader):
        x, y = _batch(batch, number)
        if number == 1 and _repeats(loader, x, images[0], y, labels[0]):
            raise ValueError(
                f"data must give each image once, but the first two of its {loader.num_workers} worker processes "
                "gave the same images: let the IterableDataset give each worker its own part, by "
                "torch.utils.data.get_worker_info, or read it with num_workers=0"
            )
        images.append(x)
        labels.append(y)
        count, size = count + len(y), size + x.nbytes
        if at_most is not None and count >= at_most:
            break
        if size > MEMORY_LIMIT:
            raise ValueError(
                f"data must fit into {MEMORY_LIMIT / 2**30:.3g} GiB where it is a DataLoader of an "
                "IterableDataset or with its own collate_fn, sampler or batch_sampler, which is read once. "
                f"{count} images exceed this: give a map-style Dataset, which is read image by image, or "
                "max_examples"
            )
    if not images:
        raise ValueError("data must have at least one image, got a DataLoader without batches")
    kinds = {f"{x.dtype} {tuple(x.shape[1:])}" for x in images}
    if len(kinds) > 1:
        raise ValueError(
            "images of data must have one shape and dtype in all batches, got "
            f"{' and '.join(sorted(kinds)[:3])}"
        )
    return torch.cat(images)[:at_most], torch.cat(labels)[:at_most]


def _repeats(loader: DataLoader[Any], x: Tensor, first: Tensor, y: Tensor, labels: Tensor) -> bool:
    """Whether the second batch of an IterableDataset is its first one, because each worker gives all images."""
    several = isinstance(loader.dataset, IterableDataset) and loader.num_workers > 1
    return several and torch.equal(y, labels) and torch.equal(x, first)


def known_labels(dataset: Any) -> Tensor | None:
    """Labels [N] int64 that a dataset lists without reading its items; None if it does not."""
    if isinstance(dataset, Subset):
        inner = known_labels(dataset.dataset)
        return (
            None
            if inner is None
            else inner[torch.as_tensor(np.asarray(dataset.indices), device="cpu")]
        )
    if isinstance(dataset, ConcatDataset):
        parts = [known_labels(part) for part in dataset.datasets]
        known = [part for part in parts if part is not None]
        return torch.cat(known) if len(known) == len(parts) else None
    if getattr(dataset, "target_transform", None) is not None:
        return None
    for name in ("targets", "labels"):
        found = _class_indices(getattr(dataset, name, None), len(dataset))
        if found is not None:
            return found
    return None


def known_classes(dataset: Any) -> int | None:
    """The number of classes that a dataset states; None if it does not."""
    if isinstance(dataset, Subset):
        return known_classes(dataset.dataset)
    number = getattr(dataset, "num_classes", None)
    if isinstance(number, int) and not isinstance(number, bool):
        return number
    names = getattr(dataset, "classes", None)
    return len(names) if isinstance(names, list | tuple) and names else None


def _has_items(data: Any) -> bool:
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        if not hasattr(data, "__len__"):
            raise TypeError(
                f"data must have a length, got the Dataset {type(data).__name__} without __len__"
            )
        return True
    if isinstance(data, Dataset):
        return False
    plain = Tensor | np.ndarray | Mapping | Sequence
    return not isinstance(data, plain) and all(
        hasattr(type(data), name) for name in ("__len__", "__getitem__")
    )


def _class_indices(values: Any, length: int) -> Tensor | None:
    if not isinstance(values, Tensor | np.ndarray | list | tuple):
        return None
    try:
        found = torch.as_tensor(values, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        return None  # names, boxes and the like
    if found.shape != (length,) or found.dtype not in INTEGER_DTYPES:
        return None
    return found.detach().to("cpu", torch.int64, copy=True)


def _batch(batch: Any, number: int) -> tuple[Tensor, Tensor]:
    if isinstance(batch, Mapping):
        names = column(batch, IMAGE_COLUMNS), column(batch, LABEL_COLUMNS)
        batch = [batch[name] for name in names if name is not None]
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        kind = f"a {type(batch).__name__}"
        kind += f" of {len(batch)}" if isinstance(batch, Sized) else ""
        raise TypeError(f"batch {number} of data must be (images [B, ...], labels [B]), got {kind}")
    x, y = batch
    are_tensors = isinstance(x, Tensor) and isinstance(y, Tensor)
    if not are_tensors or y.dim() != 1 or x.shape[:1] != y.shape:
        shapes = [str(list(v.shape)) if isinstance(v, Tensor) else type(v).__name__ for v in batch]
        raise TypeError(
            f"batch {number} of data must be (images [B, ...], labels [B]), got {', '.join(shapes)}"
        )
    # Copies: a collate function may fill the same memory with each batch.
    return x.detach().to("cpu", copy=True), y.detach().to("cpu", copy=True)
