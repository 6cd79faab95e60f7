"""Evaluation on Datasets and DataLoaders, whose images are read when they are attacked."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from attack_helpers import trained_small_cnn
from processes import Started, ran
from torch import Tensor
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import fastadv.data.lazy as lazy_module
from fastadv import evaluate
from fastadv.data import ImageData, StreamedData, load_dataset
from fastadv.data.item_reader import ItemReader
from fastadv.evaluation import autoattack, masking_checks
from fastadv.evaluation.samples import as_samples

pytestmark = pytest.mark.usefixtures("one_thread")
N = 60
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_dataset("digits").test.select(torch.arange(N))


class Items(Dataset[Any]):
    """Items of a data set, counted as they are read; with `listed`, the labels are known beforehand."""

    def __init__(self, data: ImageData, listed: bool = True) -> None:
        self.data = data
        self.read: list[int] = []
        if listed:
            self.targets = data.labels.tolist()

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.read.append(index)
        return self.data.images[index], int(self.data.labels[index])


class Changed(Items):
    """Items of which some are replaced."""

    def __init__(self, data: ImageData, **changes: Any) -> None:
        super().__init__(data)
        self.changes = {int(key[1:]): value for key, value in changes.items()}

    def __getitem__(self, index: int) -> Any:
        item = super().__getitem__(index)
        change = self.changes.get(index)
        return item if change is None else change(*item)


def correct(data: Any, attacks: tuple[str, ...] = ("clean", "fgsm", "pgd-3"), **more: Any) -> Any:
    options: dict[str, Any] = dict(eps=0.1, progress=False, batch_size=16)
    report = evaluate(trained_small_cnn(), data, attacks, **options | more)
    return [row.correct for row in report.rows]


def images_of(data: Any, **more: Any) -> Tensor:
    samples = as_samples(data, (0.0, 1.0), **more)
    return torch.cat([samples.take(part, CPU)[0] for part in samples.batches(16)])


# What may be given


@pytest.mark.slow
def test_every_form_of_data_is_judged_alike(digits: ImageData) -> None:
    expected = correct(digits)
    assert expected[0] > expected[1] > 0
    floats = digits.images / 255
    pair = TensorDataset(floats, digits.labels)
    arrays = [(image.numpy(), label) for image, label in zip(floats, digits.labels, strict=True)]
    forms: dict[str, Any] = {
        "listed": Items(digits),
        "unlisted": Items(digits, listed=False),
        "tensor dataset": pair,
        "loader of tensors": DataLoader(pair, batch_size=7, shuffle=True),
        "shuffling loader": DataLoader(Items(digits), batch_size=7, shuffle=True, drop_last=True),
        "loader without batches": DataLoader(Items(digits), batch_size=None),
        "parts": ConcatDataset([Subset(Items(digits), part) for part in (range(20), range(20, N))]),
        "streamed": StreamedData(Items(digits), 10, "digits", workers=0),
        "own collate function": DataLoader(Items(digits), 8, collate_fn=_collate),
        "arrays": Plain(arrays),
        "dicts": Plain([{"img": x, "label": y, "id": 0} for x, y in arrays]),
    }
    for name, data in forms.items():
        assert correct(data) == expected, name


def _collate(items: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    return torch.stack([x for x, _ in items]), torch.tensor([y for _, y in items])


class Plain:
    """No torch Dataset, but like one."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


class Stream(IterableDataset[Any]):
    def __init__(self, data: ImageData) -> None:
        self.data = data
        self.given = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for image, label in zip(self.data.images, self.data.labels, strict=True):
            self.given += 1
            yield image, label


def test_a_stream_is_read_once_and_kept(digits: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream(digits)
    assert correct(DataLoader(stream, 16)) == correct(digits)
    assert stream.given == N
    assert len(as_samples(DataLoader(stream, 16), (0.0, 1.0), 20)) == 20
    assert stream.given <= N + 32  # a batch more than asked for at most
    with pytest.raises(TypeError, match="put it into a DataLoader"):
        as_samples(stream, (0.0, 1.0))
    monkeypatch.setattr(lazy_module, "MEMORY_LIMIT", 1000)
    with pytest.raises(
        ValueError, match=r"must fit into .* GiB where it is a DataLoader of an Iter"
    ):
        as_samples(DataLoader(stream, 16), (0.0, 1.0))


@pytest.mark.processes
def test_workers_that_all_give_all_images_are_refused(digits: ImageData) -> None:
    with pytest.raises(ValueError, match="the first two of its 2 worker processes gave the same"):
        as_samples(DataLoader(Stream(digits), 16, num_workers=2), (0.0, 1.0))
    assert len(as_samples(DataLoader(Stream(digits), 16, num_workers=1), (0.0, 1.0))) == N


def test_batches_in_the_same_memory_are_kept_apart(digits: ImageData) -> None:
    memory = torch.empty(16, *digits.images.shape[1:], dtype=torch.uint8)

    def fill(items: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
        images = memory[: len(items)].copy_(torch.stack([x for x, _ in items]))
        return images, torch.tensor([y for _, y in items])

    samples = as_samples(DataLoader(Items(digits), 16, collate_fn=fill), (0.0, 1.0))
    assert torch.equal(samples.source.read(torch.arange(N)), digits.images)


def test_a_loader_of_a_part_judges_this_part(digits: ImageData) -> None:
    chosen = torch.tensor([9, 3, 40])
    loader = DataLoader(Items(digits), 2, sampler=SubsetRandomSampler(chosen.tolist()))
    assert torch.equal(as_samples(loader, (0.0, 1.0)).labels, digits.labels[[3, 9, 40]])
    weighted = WeightedRandomSampler([1.0] + [0.0] * (N - 1), 5)
    samples = as_samples(DataLoader(Items(digits), 2, sampler=weighted), (0.0, 1.0))
    assert samples.labels.tolist() == [int(digits.labels[0])] * 5
    batches = DataLoader(Items(digits), batch_sampler=_Batches([[5, 6], [7]]))
    assert torch.equal(as_samples(batches, (0.0, 1.0)).labels, digits.labels[5:8])


class _Batches(list[list[int]]):
    """A batch sampler of the user's."""


def test_a_batch_of_another_kind_is_named(digits: ImageData) -> None:
    loader = DataLoader(Items(digits), 4, collate_fn=lambda items: [x for x, _ in items])
    with pytest.raises(TypeError, match=r"batch 0 of data must be \(images \[B, ...\], labels"):
        as_samples(loader, (0.0, 1.0))
    loader = DataLoader(Items(digits), 4, collate_fn=lambda items: ([x for x, _ in items], 0))
    with pytest.raises(TypeError, match=r"batch 0 of data must be .* got list, int"):
        as_samples(loader, (0.0, 1.0))


def test_autoattack_and_masking_checks_take_a_dataset(digits: ImageData, tmp_path: Path) -> None:
    few = Subset(Items(digits), range(8))
    pair = digits.images[:8], digits.labels[:8]
    options: dict[str, Any] = dict(eps=0.1, version=["apgd-ce"], batch_size=5, engine="fp32")
    model = trained_small_cnn()
    found = autoattack(model, few, state_dir=tmp_path, **options)
    expected = autoattack(model, pair, **options)
    assert torch.equal(found.robust, expected.robust)
    assert not found.robust.all()
    again = autoattack(model, Subset(Items(digits), range(8)), state_dir=tmp_path, **options)
    assert torch.equal(again.adversarial, found.adversarial)
    with pytest.raises(ValueError, match="belongs to another run"):
        autoattack(model, Subset(Items(digits), range(1, 9)), state_dir=tmp_path, **options)
    checks: dict[str, Any] = dict(eps=0.1, eps_factors=(1.0,), steps=(1, 2), progress=False)
    assert masking_checks(model, few, **checks) == masking_checks(model, pair, **checks)


# How it is read


def test_nothing_is_read_that_is_not_asked_for(digits: ImageData) -> None:
    data = Items(digits)
    samples = as_samples(data, (0.0, 1.0), 20)
    assert len(samples) == 20 and torch.equal(samples.labels, digits.labels[:20])
    data.read.clear()
    x, y = samples.take(torch.tensor([19, 3, 19]), CPU)
    assert sorted(data.read) == [3, 19]
    assert torch.equal(x, digits.images[[19, 3, 19]] / 255)
    assert torch.equal(y, digits.labels[[19, 3, 19]])
    samples.take(torch.tensor([3]), CPU)
    assert sorted(data.read) == [3, 19]  # it was kept
    unlisted = Items(digits, listed=False)
    assert torch.equal(as_samples(unlisted, (0.0, 1.0), 20).labels, digits.labels[:20])
    assert set(unlisted.read) == set(range(20))


def test_items_in_the_order_of_their_classes_are_chosen_evenly(digits: ImageData) -> None:
    order = digits.labels.argsort(stable=True)
    data = Items(digits.select(order))
    samples = as_samples(data, (0.0, 1.0), 30)
    assert torch.equal(samples.labels, data.data.labels[1::2])
    tensors = as_samples(data.data, (0.0, 1.0), 30)
    assert torch.equal(tensors.labels, samples.labels)


def test_a_part_is_a_part(digits: ImageData) -> None:
    samples = as_samples(Items(digits), (0.0, 1.0))
    part = samples.part(torch.tensor([50, 4, 7])).part(torch.tensor([2, 0]))
    x, y = part.take(torch.tensor([1, 0]), CPU)
    assert torch.equal(x, digits.images[[50, 7]] / 255)
    assert torch.equal(y, digits.labels[[50, 7]])
    assert samples.image_shape == digits.images.shape[1:]


def test_what_is_kept_is_limited(digits: ImageData) -> None:
    data = Items(digits)
    reader = ItemReader(data, (0.0, 1.0), cache_bytes=10 * (digits.images[0].nbytes + 1024))
    everything = list(range(N))
    for expected in (everything, everything[:-10]):  # the last ten are kept
        data.read.clear()
        assert torch.equal(reader.read(everything), digits.images)
        assert data.read == expected


@pytest.mark.processes
@pytest.mark.parametrize("listed", [True, False])
def test_worker_processes_read_the_same(digits: ImageData, listed: bool) -> None:
    data = Items(digits, listed)
    loader = DataLoader(data, 16, num_workers=2)
    assert correct(loader) == correct(digits)
    assert data.read == []  # by this process
    samples = as_samples(loader, (0.0, 1.0))
    samples.batches(16)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    for indices in (torch.tensor([40]), torch.arange(16), order[:30], torch.arange(16, 48), order):
        x, y = samples.take(indices, CPU)
        assert torch.equal(x, digits.images[indices] / 255)
        assert torch.equal(y, digits.labels[indices])


@pytest.mark.processes
def test_what_comes_next_is_read_ahead(digits: ImageData) -> None:
    samples = as_samples(DataLoader(Items(digits), num_workers=1), (0.0, 1.0))
    source: Any = samples.source
    started = []
    start = source.reader._start
    source.reader._start = lambda *arguments: (started.append(1), start(*arguments))
    for indices in samples.batches(8, torch.arange(N - 1, -1, -1)):
        x, _ = samples.take(indices, CPU)
        assert torch.equal(x, digits.images[indices] / 255)
    assert len(started) == 1  # the workers were told once, and went through all


@pytest.mark.processes
def test_a_seeded_script_draws_the_same_with_workers(digits: ImageData) -> None:
    torch.manual_seed(3)
    as_samples(DataLoader(Items(digits), num_workers=1), (0.0, 1.0))
    drawn = torch.rand(2)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(2), drawn)


# What is refused


@pytest.mark.processes
def test_the_fingerprint_tells_data_apart(digits: ImageData) -> None:
    def fingerprint(data: Any, **more: Any) -> str:
        return as_samples(data, (0.0, 1.0), **more).fingerprint()

    first = fingerprint(Items(digits))
    assert fingerprint(Items(digits, listed=False)) == first
    assert fingerprint(DataLoader(Items(digits), num_workers=1)) == first
    others = [
        fingerprint(Items(digits), max_examples=N - 1),
        fingerprint(Changed(digits, **{f"i{N - 1}": lambda x, y: (x // 2, y)})),
        fingerprint(Items(digits.select(torch.arange(N - 1, -1, -1)))),
    ]
    relabelled = Changed(digits, i30=lambda x, y: (x, 9 - y))
    relabelled.targets[30] = 9 - relabelled.targets[30]
    assert len({first, *others, fingerprint(relabelled)}) == 5


# At scale


@pytest.mark.slow
@pytest.mark.processes
def test_memory_stays_flat(tmp_path: Path) -> None:
    """Six hundred megabytes of images fill no more than a few batches and what is kept of the last ones."""
    script = Path(__file__).parents[2] / "bench" / "many_images.py"
    words = ["--count", "4000", "--few", "1000", "--cache", "32", "--out", str(tmp_path)]
    done = ran([str(script), *words])
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "many_images.json").read_text())
    growth = found["peak_mib"] - found["peak_mib_before"]
    assert growth < 120 < found["megabytes"] / 4


_WAITING = """
import sys, time
import torch
from torch.utils.data import DataLoader, Dataset
from fastadv.evaluation.samples import as_samples

# How often a worker looks for its parent; torch's own interval is five seconds.
torch.utils.data._utils.worker.MP_STATUS_CHECK_INTERVAL = 0.5

class Slow(Dataset):
    def __len__(self):
        return 10_000
    def __getitem__(self, index):
        return torch.zeros(1, 8, 8, dtype=torch.uint8), 0

samples = as_samples(DataLoader(Slow(), num_workers=2), (0.0, 1.0), 50)
import torch.multiprocessing, multiprocessing
print(*[child.pid for child in multiprocessing.active_children()], flush=True)
time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.skipif(sys.platform != "linux", reason="looks processes up in /proc")
def test_workers_end_with_the_process_that_is_killed() -> None:
    process = Started(["-c", _WAITING])
    children = [int(word) for word in process.first_line().split()]
    assert len(children) >= 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    until = time.monotonic() + 30
    while any(os.path.exists(f"/proc/{child}/cmdline") and _lives(child) for child in children):
        assert time.monotonic() < until, "workers go on without their parent"
        time.sleep(0.2)


def _lives(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
