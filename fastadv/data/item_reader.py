"""Reading the images of a torch Dataset by index: in any order, by worker processes, with a limited cache."""

from __future__ import annotations

import zlib
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from fastadv.data.items import read_item
from fastadv.data.read_ahead import read_ahead

CACHE_BYTES = 2**29  # of images kept in memory; a small data set fits
CHUNK = 16  # images that a worker reads at a time
_TENSOR_BYTES = 1024  # of a tensor besides its values, roughly
_UNKNOWN = -1  # in place of a checksum or label that is not known yet


@dataclass
class _Chunk:
    """The items that a worker has read.

    Attributes:
        indices: the items' indices, up to the item that failed.
        images: the items' images; None where they are not kept.
        labels: the items' labels.
        checksums: CRC-32 of the images.
        error: the exception at the next item, if one was raised.
    """

    indices: list[int]
    images: list[Tensor] | Tensor | None
    labels: list[int]
    checksums: list[int]
    error: Exception | None


class _Items(Dataset[Any]):
    """A Dataset whose batches are `_Chunk`s. It reads in the process that calls it."""

    def __init__(self, dataset: Any, bounds: tuple[float, float], keeps_images: bool) -> None:
        self._dataset, self._bounds, self._keeps_images = dataset, bounds, keeps_images

    def __getitem__(self, index: int) -> _Chunk:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> _Chunk:
        images: list[Tensor] = []
        labels, checksums, error = [], [], None
        for index in indices:
            try:
                image, label = read_item(self._dataset, index, self._bounds)
            except Exception as problem:
                error = problem
                break
            labels.append(label)
            checksums.append(zlib.crc32(image.numpy().data))
            images.append(image)
        kept: list[Tensor] | Tensor | None = images if self._keeps_images else None
        alike = len({(image.shape, image.dtype) for image in images}) == 1
        if alike and kept is not None and get_worker_info() is not None:
            kept = torch.stack(images)  # one tensor is cheaper to hand over than many
        return _Chunk(indices[: len(labels)], kept, labels, checksums, error)


class ItemReader:
    """Images of a map-style Dataset, which are read when they are asked for.

    The images read last are kept, up to `CACHE_BYTES`. An image that is read again must have the checksum of the
    first time, so that random transforms raise an error.

    Args:
        dataset: a Dataset that `read_item` takes.
        bounds: smallest and largest value of a floating-point image.
        workers: processes that read; with 0 this process reads.
        cache_bytes: bytes of images to keep; None for `CACHE_BYTES`.
        options: further arguments of the DataLoader.

    Attributes:
        shape: the shape of one image.
        dtype: the dtype of the images, uint8 or float32.

    Raises:
        TypeError: if an item of the dataset is of another kind.
        ValueError: if the items differ in shape or dtype, change from one time to the next, or are no images and
            labels.
    """

    def __init__(
        self,
        dataset: Any,
        bounds: tuple[float, float],
        *,
        workers: int = 0,
        cache_bytes: int | None = None,
        **options: Any,
    ) -> None:
        self._dataset, self._bounds = dataset, bounds
        self._workers, self._options = workers, options
        self._items = _Items(dataset, bounds, keeps_images=True)
        self._cache = _Cache(CACHE_BYTES if cache_bytes is None else cache_bytes)
        length = len(cast(Sized, dataset))
        self._checksums = torch.full((length,), _UNKNOWN, dtype=torch.int64, device="cpu")
        self._labels = self._checksums.clone()
        self._plan = _Plan(self._cache)
        self._loader: DataLoader[Any] | None = None
        self._stream: Iterator[_Chunk] | None = None
        self.shape = torch.Size()
        self.dtype: torch.dtype | None = None
        self._first = 0  # the item that the others are compared with

    def probe(self, indices: Sequence[int]) -> Tensor:
        """Read items twice, which sets shape and dtype, and raises if the items change.

        Returns:
            Their labels [N] int64.
        """
        for _ in range(2):
            chunk = self._read_now(list(indices))
            self._check(chunk)
        return self._labels[torch.tensor(indices, device="cpu")]

    def trust(self, indices: Tensor, labels: Tensor) -> None:
        """Store the labels [N] of these items. An item that is read with another label raises."""
        self._labels[indices] = labels

    def read(self, indices: Sequence[int]) -> Tensor:
        """Images [B, ...] of these items."""
        got = {i: hit for i in dict.fromkeys(indices) if (hit := self._cache.get(i)) is not None}
        missing = {i: None for i in indices if i not in got}
        while missing:
            for index, image in self._some_of(missing):
                self._cache.put(index, image)
                if index in missing:
                    got[index] = image
                    del missing[index]
        return torch.stack([got[i] for i in indices])

    def expect(self, indices: Tensor) -> None:
        """Set the items that will be asked for next, in their order: the workers read them ahead."""
        self._plan.expect(indices)
        self._stream = None

    def labels(self, indices: Tensor) -> Tensor:
        """Labels [N] int64 of these items. The items are read, and their images are not kept."""
        items = _Items(self._dataset, self._bounds, keeps_images=False)
        chunks = [chunk.tolist() for chunk in indices.split(CHUNK)]
        read: Any = map(items.__getitems__, chunks)
        if self._workers:
            read = read_ahead(self._workers_for(items, chunks, persistent_workers=False))
        try:
            for chunk in read:
                self._check(chunk)
        finally:
            del read  # a traceback that keeps this frame would keep the workers alive
        return self._labels[indices]

    def close(self) -> None:
        """End the workers. Those that are needed later start anew."""
        self._stream = self._loader = None

    def _workers_for(
        self, items: _Items, chunks: Any, persistent_workers: bool = True
    ) -> DataLoader[Any]:
        return DataLoader(
            items,
            batch_sampler=chunks,
            num_workers=self._workers,
            persistent_workers=persistent_workers,
            collate_fn=_as_it_is,
            # Not drawn from the caller's generator, so that a seeded run does not depend on the workers.
            generator=torch.Generator().manual_seed(0),
            **self._options,
        )

    def _read_now(self, indices: list[int]) -> _Chunk:
        if self._workers == 0:
            return self._items.__getitems__(indices)
        self._start(dict.fromkeys(indices), chunk=len(indices))
        return self._next()

    def _some_of(self, wanted: dict[int, None]) -> Iterator[tuple[int, Tensor]]:
        """Some of the wanted items, at least one, and further items that are read on the way."""
        if self._workers == 0:
            chunk = self._items.__getitems__(list(wanted)[:CHUNK])
        else:
            if self._stream is None or self._plan.on_the_way.isdisjoint(wanted):
                self._start(wanted)
            chunk = self._next()
        self._check(chunk)
        if chunk.images is not None:
            for index, image in zip(chunk.indices, chunk.images, strict=True):
                # A view into a chunk, or into a tensor of the Dataset, would keep all of it in memory.
                is_part = image.untyped_storage().nbytes() > image.nbytes
                yield index, image.clone() if is_part else image

    def _start(self, wanted: dict[int, None], chunk: int = CHUNK) -> None:
        """Let the workers read these items now and go on with the expected ones."""
        self._plan.begin(wanted, chunk)
        if self._loader is None:
            self._loader = self._workers_for(self._items, self._plan)
        self._stream = read_ahead(self._loader)

    def _next(self) -> _Chunk:
        assert self._stream is not None
        chunk = next(self._stream)
        self._plan.received()
        return chunk

    def _check(self, chunk: _Chunk) -> None:
        """Raise the error that a chunk brings, or an error if it contradicts the items that were read before."""
        if chunk.images is not None:
            for index, image in zip(chunk.indices, chunk.images, strict=True):
                self._check_kind(index, image)
        for kind, store, found in (
            ("image", self._checksums, chunk.checksums),
            ("label", self._labels, chunk.labels),
        ):
            indices = torch.tensor(chunk.indices, dtype=torch.int64, device="cpu")
            self._compare(kind, store, indices, found)
        # The exception's traceback refers to the chunk: without this cycle, nothing keeps the workers alive.
        error, chunk.error = chunk.error, None
        if error is not None:
            self.close()
            try:
                raise error
            finally:
                del error

    def _compare(self, kind: str, store: Tensor, indices: Tensor, found: list[int]) -> None:
        """Compare checksums or labels with the earlier ones, and store them."""
        before, now = store[indices], torch.tensor(found, dtype=torch.int64, device="cpu")
        changed = ((before != _UNKNOWN) & (before != now)).nonzero().flatten().tolist()
        if changed:
            self.close()
            item, former, latter = (int(values[changed[0]]) for values in (indices, before, now))
            if kind == "image":
                raise ValueError(
                    f"data must give the same items every time, but the image of item {item} is another one than "
                    "before: take random transforms (flips, crops, noise) out of the Dataset"
                )
            raise ValueError(
                f"data must have one label for an item, but item {item} gives {latter} and gave, or is "
                f"listed as, {former}"
            )
        store[indices] = now

    def _check_kind(self, index: int, image: Tensor) -> None:
        if self.dtype is None:
            self.shape, self.dtype, self._first = image.shape, image.dtype, index
        if image.dtype != self.dtype or image.shape != self.shape:
            self.close()
            hint = getattr(self._dataset, "same_size_hint", "")
            raise ValueError(
                f"images of data must have one shape and dtype, got {list(image.shape)} {image.dtype} at index "
                f"{index} and {list(self.shape)} {self.dtype} at index {self._first}{hint}"
            )


class _Plan:
    """The batch sampler of the workers: first the items that are wanted now, then the expected ones."""

    def __init__(self, cache: _Cache) -> None:
        self._cache = cache
        self._expected = torch.empty(0, dtype=torch.int64, device="cpu")
        self._position = 0  # number of expected items whose chunks have come
        self._now: list[int] = []
        self._chunk = CHUNK
        self._sent: deque[tuple[list[int], int]] = deque()  # chunks, and the position after each
        self.on_the_way: set[int] = set()

    def expect(self, indices: Tensor) -> None:
        self._expected, self._position = indices, 0
        self._sent.clear()
        self.on_the_way.clear()

    def begin(self, wanted: dict[int, None], chunk: int) -> None:
        """Begin anew with these items, and continue with the expected items after the last of them."""
        self._now, self._chunk = list(wanted), chunk
        self._sent.clear()
        self.on_the_way.clear()
        places = (self._expected == self._now[-1]).nonzero()
        if len(places):
            self._position = max(self._position, int(places[-1]) + 1)

    def received(self) -> None:
        """Record that the next chunk has come."""
        indices, self._position = self._sent.popleft()
        self.on_the_way.difference_update(indices)

    def __iter__(self) -> Iterator[list[int]]:
        now, position = self._now, self._position
        for start in range(0, len(now), self._chunk):
            yield self._send(now[start : start + self._chunk], position)
        skipped = set(now)
        while position < len(self._expected):
            chunk: list[int] = []
            while position < len(self._expected) and len(chunk) < CHUNK:
                part = self._expected[position : position + CHUNK - len(chunk)].tolist()
                position += len(part)
                chunk += [i for i in part if i not in skipped and i not in self._cache]
            if chunk:
                yield self._send(chunk, position)

    def _send(self, chunk: list[int], position: int) -> list[int]:
        self._sent.append((chunk, position))
        self.on_the_way.update(chunk)
        return chunk


class _Cache:
    """The images read last, up to a number of bytes."""

    def __init__(self, limit: int) -> None:
        self._limit, self._bytes = limit, 0
        self._images: OrderedDict[int, Tensor] = OrderedDict()

    def __contains__(self, index: int) -> bool:
        return index in self._images

    def get(self, index: int) -> Tensor | None:
        image = self._images.get(index)
        if image is not None:
            self._images.move_to_end(index)
        return image

    def put(self, index: int, image: Tensor) -> None:
        if index in self._images:
            return
        self._images[index] = image
        self._bytes += image.nbytes + _TENSOR_BYTES
        while self._bytes > self._limit:
            self._bytes -= self._images.popitem(last=False)[1].nbytes + _TENSOR_BYTES


def _as_it_is(chunk: Any) -> Any:
    return chunk
