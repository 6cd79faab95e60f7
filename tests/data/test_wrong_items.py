"""Data read item by item that changes between readings, or is of the wrong kind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_lazy_data import Changed, Items, N, correct
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Subset,
)

from fastadv.data import ImageData, load_dataset
from fastadv.data.item_reader import ItemReader
from fastadv.evaluation.samples import as_samples

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_dataset("digits").test.select(torch.arange(N))


class Flipped(Items):
    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = super().__getitem__(index)
        return (image.flip(-1) if torch.rand(()) < 0.5 else image), label


class Drifting(Items):
    """One image, not among the first, is another one each time."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = super().__getitem__(index)
        return (image.clamp(max=250) + self.read.count(44) if index == 44 else image), label


@pytest.mark.parametrize("workers", [0, 1])
def test_random_transforms_are_noticed(digits: ImageData, workers: int) -> None:
    with pytest.raises(ValueError, match=r"the same items every time.*take random transforms"):
        as_samples(DataLoader(Flipped(digits), num_workers=workers), (0.0, 1.0))


def test_so_is_a_later_change(digits: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastadv.evaluation.sources.ItemReader", _forgetful)
    with pytest.raises(ValueError, match="the image of item 44 is another one than before"):
        correct(Drifting(digits))


def _forgetful(*arguments: Any, **options: Any) -> ItemReader:
    return ItemReader(*arguments, cache_bytes=0, **options)


def test_labels_that_are_listed_wrongly_are_not_believed(digits: ImageData) -> None:
    data = Items(digits)
    data.targets = [0] * N
    assert torch.equal(as_samples(data, (0.0, 1.0)).labels, digits.labels)
    mapped: Any = Items(digits)
    mapped.target_transform = int
    mapped.targets = [9 - label for label in mapped.targets]
    assert torch.equal(as_samples(mapped, (0.0, 1.0)).labels, digits.labels)
    late = Items(digits)
    late.targets[50] += 1
    with pytest.raises(ValueError, match=r"item 50 gives .* listed as"):
        correct(late)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x, y: (x.permute(1, 2, 0).repeat(1, 1, 3), y), ValueError, "item 2 .*H, W, C"),
        (lambda x, y: (x / 100, y), ValueError, r"item 2 of data: .*bounds \(0.0, 1.0\)"),
        (lambda x, y: (x / float("nan"), y), ValueError, "item 2 of data: .*bounds"),
        (lambda x, y: (x.int(), y), TypeError, "item 2 of data: .*uint8 or floating"),
        (lambda x, y: (x[:, :5], y), ValueError, r"got \[1, 5, 8\] torch.uint8 at index 2 and"),
        (lambda x, y: (x / 255, y), ValueError, "torch.float32 at index 2 and"),
        (lambda x, y: (x, -1), ValueError, "item 2 of data: .*>= 0, got -1"),
        (lambda x, y: (x, 1.5), TypeError, "item 2 of data: .*must be an integer"),
        (lambda x, y: (x, torch.eye(10)[y]), ValueError, "item 2 of data: .*one-hot"),
        (lambda x, y: x, TypeError, r"item 2 of data must be a pair \(image, label\)"),
        (lambda x, y: {"x": x}, TypeError, "item 2 of data must be .*got a dict with x"),
        (lambda x, y: 1 // 0, RuntimeError, "item 2 of data cannot be read: ZeroDivision"),
        (lambda x, y: ("a.png", y), TypeError, "item 2 of data: .*got str"),
    ],
)
def test_a_wrong_item_is_named(
    digits: ImageData, workers: int, change: Any, error: type[Exception], message: str
) -> None:
    data = Changed(digits, i2=change)
    with pytest.raises(error, match=message) as raised:
        as_samples(DataLoader(data, num_workers=workers), (0.0, 1.0))
    assert "Traceback" not in str(raised.value)


def test_what_is_no_data_is_refused(digits: ImageData) -> None:
    for wrong in (None, [1, 2, 3], {"image": 1}, "digits", digits.images):
        with pytest.raises(TypeError, match="data must be an ImageData, a pair of tensors"):
            as_samples(wrong, (0.0, 1.0))
    with pytest.raises(ValueError, match="an empty Dataset"):
        as_samples(Subset(Items(digits), []), (0.0, 1.0))
    samples = as_samples((digits.images / 255, digits.labels), (0.0, 1.0))
    with pytest.raises(ValueError, match="bounds must be the bounds of the samples"):
        as_samples(samples, (-1.0, 1.0))
