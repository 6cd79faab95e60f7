"""Training images that are read while they are needed."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from run_helpers import Interruption
from torch import Tensor
from torch.utils.data import Dataset
from training_helpers import make_model, small_data, small_recipe, states_equal

from fastadv.data import Splits, StreamedData, StreamLoader
from fastadv.trainers import train

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


class Noisy(Dataset[Any]):
    """The small data with random numbers from everywhere added."""

    def __init__(self, kind: str = "uint8", count: int = 72) -> None:
        self.source = small_data(count).train
        self.kind = kind

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        drawn = int(torch.randint(10, ())) + random.randrange(10) + int(np.random.randint(10))
        image = (self.source.images[index] // 2 + drawn).to(torch.uint8)
        if self.kind == "float":
            return image.float() / 255, int(self.source.labels[index])
        if self.kind == "array":
            return image[0].numpy(), int(self.source.labels[index])
        return image, int(self.source.labels[index])


def streamed(workers: int = 0, **options: Any) -> StreamedData:
    return StreamedData(Noisy(**options), 4, "noisy", workers)


def all_batches(data: StreamedData, **options: Any) -> list[tuple[Tensor, ...]]:
    loader = StreamLoader(data, 16, seed=3, **options)
    return [tuple(batch) for batch in loader.epoch(1)]


def equal(a: list[tuple[Tensor, ...]], b: list[tuple[Tensor, ...]]) -> bool:
    return all(
        torch.equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)
    )


@pytest.mark.parametrize("kind", ["uint8", "float", "array"])
def test_batches_do_not_depend_on_who_reads(kind: str) -> None:
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    alone = all_batches(streamed(0, kind=kind))
    assert torch.equal(torch.get_rng_state(), state[0])
    assert random.getstate() == state[1] and np.random.get_state()[1].tolist() == state[2]
    assert equal(alone, all_batches(streamed(2, kind=kind)))
    assert len(alone) == 4
    x, y, ids = (torch.cat(parts) for parts in zip(*alone, strict=True))
    assert x.dtype == torch.float32 and x.shape == (64, 1, 8, 8)
    assert len(set(ids.tolist())) == 64
    source = small_data().train
    assert torch.equal(y, source.labels[ids])
    added = (x * 255).round() - source.images[ids] // 2
    constants = added.flatten(1)
    assert torch.equal(constants.amin(1), constants.amax(1))  # one number added to each image
    assert len(set(constants[:, 0].tolist())) > 10  # of its own
    again = list(StreamLoader(streamed(0, kind=kind), 16, seed=3).epoch(2))
    assert not equal(alone, [tuple(batch) for batch in again])


def test_ranks_read_their_parts_and_epochs_can_be_entered_anywhere() -> None:
    whole = all_batches(streamed())
    halves = [all_batches(streamed(), rank=rank, world_size=2) for rank in range(2)]
    joined = [tuple(torch.cat(p) for p in zip(*b, strict=True)) for b in zip(*halves, strict=True)]
    assert equal(whole, joined)
    rest = list(StreamLoader(streamed(), 16, seed=3).epoch(1, 2))
    assert equal(whole[2:], [tuple(batch) for batch in rest])


@pytest.mark.parametrize("method", ["standard", "pgd_at"])
def test_a_run_on_streamed_images_resumes_bit_for_bit(method: str, tmp_path: Path) -> None:
    data = Splits(streamed(1), small_data().test)

    def run(name: str, **options: Any) -> Any:
        return train(
            method,
            small_recipe(method, pad=0),
            data=data,
            model=make_model(0),
            run_dir=tmp_path / name,
            progress=False,
            device="cpu",
            **options,
        )

    def stop(progress: Any) -> None:
        if progress.step == 6:
            raise Interruption

    whole = run("whole")
    assert whole.progress.step == 8
    with pytest.raises(Interruption):
        run("parts", on_step=stop)
    resumed = run("parts", resume=True)
    assert states_equal(whole.model.state_dict(), resumed.model.state_dict())


def test_bad_data_are_named(tmp_path: Path) -> None:
    class Bad(Noisy):
        def __getitem__(self, index: int) -> tuple[Any, int]:
            image, label = super().__getitem__(index)
            if self.kind == "shape" and index == 5:
                return image[:, 1:], label
            if self.kind == "label" and index == 5:
                return image, 7
            return (image.float() if self.kind == "range" else image), label

    for kind, message in (
        ("shape", r"got \(1, 7, 8\) at index 5 and \(1, 8, 8\) at index 0"),
        ("label", r"labels must be in 0 \.\. 3, got 7 at index 5"),
        ("range", r"floating-point images must be in 0\.\.1"),
    ):
        with pytest.raises(ValueError, match=message):
            list(StreamLoader(StreamedData(Bad(kind, 16), 4, "bad", 0), 16).epoch(0))
    with pytest.raises(ValueError, match="dataset must have at least one item"):
        StreamedData(Noisy(count=0), 4, "none")
    with pytest.raises(ValueError, match="workers must be >= 0, got -1"):
        StreamedData(Noisy(), 4, "noisy", -1)
    data = Splits(streamed(), small_data().test)
    for name, value in (
        ("pad", 1),
        ("flip", True),
        ("holdout", 5),
        ("train_images", 5),
        ("extra_fraction", 0.5),
    ):
        recipe = small_recipe("standard", **({"pad": 0} | {name: value}))
        with pytest.raises(ValueError, match=f"{name} must be .* with StreamedData"):
            train("standard", recipe, data=data, model=make_model(0), run_dir=tmp_path / name)
    extra = small_data().train
    with pytest.raises(ValueError, match="extra must be None with StreamedData"):
        train(
            "standard",
            small_recipe("standard", pad=0, extra_fraction=0.5),
            data=data,
            model=make_model(0),
            run_dir=tmp_path / "extra",
            extra=extra,
        )
