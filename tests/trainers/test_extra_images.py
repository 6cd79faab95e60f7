"""Extra images: each batch's part of them, their weights, and the archives that they come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from run_helpers import Interruption, assert_same_end, stop_at
from test_pair_methods import PAIRS, TEACHER_OF, images_of
from test_trainers import run
from torch import Tensor
from training_helpers import (
    make_batch,
    make_method,
    make_model,
    small_data,
)

from fastadv.cli import main
from fastadv.data import DataFormatError, ImageData, Loader, from_tensors, load_npz
from fastadv.trainers import (
    Attacked,
    Settings,
    Standard,
    TrainBatch,
)
from fastadv.trainers.arrest import Replayed

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
DOUBLE = torch.float64
STEPS = 4  # of an epoch of `small_data`


def extra_data(count: int = 10) -> ImageData:
    """Images unlike `small_data`: black but for one pixel that numbers them."""
    images = torch.zeros(count, 1, 8, 8, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.arange(1, count + 1, dtype=torch.uint8)
    return from_tensors(images, torch.arange(count) % 4, 4, "extra")


def mixed_loader(fraction: float = 0.25, count: int = 10, **options: Any) -> Loader:
    settings: dict[str, Any] = {"seed": 5, "train": True, "pad": 0, "flip": False} | options
    return Loader(
        small_data().train, 16, extra=extra_data(count), extra_fraction=fraction, **settings
    )


@pytest.mark.parametrize("fraction", [0.25, 0.5, 1.0])
def test_each_batch_has_its_part_of_extra_images(fraction: float) -> None:
    data, loader = small_data().train, mixed_loader(fraction)
    assert len(loader) == STEPS
    seen: list[int] = []
    for x, y, ids in loader.epoch(1):
        extra = ids >= 72
        assert int(extra.sum()) == loader.extra_per_batch == 16 * fraction
        assert torch.equal(x[extra][:, 0, 0, 0] * 255, (ids[extra] - 71).float())
        assert torch.equal(y[extra], (ids[extra] - 72) % 4)
        assert torch.equal(x[~extra], data.images[ids[~extra]].float() / 255)
        assert torch.equal(y[~extra], data.labels[ids[~extra]])
        seen += ids.tolist()
    drawn = [i for i in seen if i >= 72]
    times = [drawn.count(i) for i in range(72, 82)]
    assert max(times) - min(times) <= 1  # all of them before any a second time
    others = [i for i in seen if i < 72]
    assert len(set(others)) == len(others) == STEPS * (16 - loader.extra_per_batch)


def test_mixed_batches_depend_on_seed_and_epoch_alone() -> None:
    ids = lambda loader, *place: [batch.ids.tolist() for batch in loader.epoch(*place)]  # noqa: E731
    loader = mixed_loader()
    epoch = ids(loader, 3)
    torch.manual_seed(0)
    assert ids(mixed_loader(), 3) == epoch
    assert ids(loader, 3, 2) == epoch[2:]
    assert ids(loader, 4) != epoch and ids(mixed_loader(seed=6), 3) != epoch
    shards = [ids(mixed_loader(rank=rank, world_size=2), 3) for rank in (0, 1)]
    assert [a + b for a, b in zip(*shards, strict=True)] == epoch


def test_weights_are_one_in_the_mean() -> None:
    loader = mixed_loader(0.25)
    batch = next(loader.epoch(0))
    weights = loader.weights_of(batch.ids, 3.0)
    assert weights is not None
    assert weights.double().mean().item() == pytest.approx(1, abs=1e-6)
    extra = batch.ids >= 72
    ratio = weights[extra][:, None] / weights[~extra]
    assert torch.allclose(ratio, torch.full_like(ratio, 3.0))
    assert loader.weights_of(batch.ids, 1.0) is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fraction": 0.0}, "extra_fraction must be in 0..1 and give at least one"),
        ({"fraction": 0.01}, "at least one extra image in a batch of 16, got 0.01"),
        ({"count": 0}, "extra must have at least one image"),
        ({"drop_last": False}, "extra must be None in evaluation"),
    ],
)
def test_mixtures_that_cannot_be_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        mixed_loader(**options)


def test_extra_images_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    large = from_tensors(torch.zeros(4, 3, 9, 9, dtype=torch.uint8), torch.arange(4))
    with pytest.raises(ValueError, match=r"extra must have images \[1, 8, 8\] .*\[3, 9, 9\]"):
        run("standard", tmp_path, extra=large, changes={"extra_fraction": 0.5})
    foreign = from_tensors(torch.zeros(1, 1, 8, 8, dtype=torch.uint8), torch.tensor([7]))
    with pytest.raises(ValueError, match=r"extra must have labels in 0 \.\. 3 .*got 7"):
        run("standard", tmp_path, extra=foreign, changes={"extra_fraction": 0.5})


SINGLES: list[tuple[str, dict[str, Any]]] = [
    ("standard", {}),
    ("pgd_at", {}),
    ("fast", {}),
    ("arrest", {}),
    ("arrest", {"distill": False}),
]


@pytest.mark.parametrize(("name", "numbers"), [*SINGLES, *PAIRS])
def test_every_method_weighs_its_images(name: str, numbers: dict[str, Any]) -> None:
    base, teacher = make_batch(5, DOUBLE), make_model(1, DOUBLE).eval()
    adv_x = (base.x + 0.05 * torch.sin(50 * base.x)).clamp(0, 1)
    needed = name in TEACHER_OF | {"arrest"} or numbers.get("fixed", False)
    method = make_method(name, make_model(0, DOUBLE), teacher if needed else None, **numbers)
    for model in method.trainable().values():
        model.eval()  # so that an image's loss does not depend on the batch around it

    def loss(rows: slice, weights: Tensor | None = None) -> Tensor:
        x = base.x[rows]
        batch = TrainBatch(x, base.y[rows], base.ids[rows], 0, 0, 5, weights)
        if name == "arrest":
            taught: Any = teacher.forward_features(x)  # type: ignore[operator]
            adv: Attacked = Replayed(adv_x[rows], taught.detach())
        else:
            adv = images_of(method, x, adv_x[rows])
        return method.training_loss(batch, adv).loss.detach()

    alone = torch.stack([loss(slice(row, row + 1)) for row in range(5)])
    weights = torch.tensor([3.0, 0.5, 1.0, 2.0, 0.0], dtype=DOUBLE)
    everyone = slice(None)
    assert torch.allclose(loss(everyone), alone.mean(), rtol=1e-10)
    assert torch.allclose(loss(everyone, weights), (weights * alone).mean(), rtol=1e-10)


def test_training_with_extra_images_follows_their_weights(tmp_path: Path) -> None:
    seen: list[TrainBatch] = []

    class Watching(Standard):
        def attack(self, batch: TrainBatch) -> Attacked:
            seen.append(batch)
            return Attacked(batch.x)

    changes = {"extra_fraction": 0.25, "extra_weight": 3.0}
    run(Watching, tmp_path / "a", extra=extra_data(), changes=changes)
    assert len(seen) == 2 * STEPS
    for batch in seen:
        assert batch.weights is not None and batch.weights.shape == batch.y.shape
        assert torch.equal(batch.weights > 1, batch.ids >= 72)
    description = Path(tmp_path / "a" / "run.json").read_text()
    assert '"extra": {' in description


def test_a_run_with_extra_images_is_resumed_bit_for_bit(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "extra": extra_data(),
        "changes": {"extra_fraction": 0.5, "extra_weight": 0.5},
        "settings": Settings(checkpoint_every=3),
    }
    run("trades", tmp_path / "whole", **options)
    with pytest.raises(Interruption):
        run("trades", tmp_path / "cut", on_step=stop_at(6), **options)
    with pytest.raises(ValueError, match=r"data\.extra"):
        run("trades", tmp_path / "cut", resume=True, **(options | {"extra": extra_data(9)}))
    run("trades", tmp_path / "cut", resume=True, **options)
    assert_same_end(tmp_path / "whole", tmp_path / "cut")


def test_extra_images_come_from_a_numpy_archive(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), dtype=np.uint8)
    labels = np.arange(40) % 10
    np.savez(tmp_path / "more.npz", image=pixels, label=labels)
    read = load_npz(tmp_path / "more.npz")
    assert read.images.shape == (40, 1, 8, 8) and read.num_classes == 10
    assert np.array_equal(read.images.numpy()[:, 0], pixels[..., 0])
    assert read.labels.tolist() == labels.tolist()
    words = ["train", "standard", "--data", "digits", "--run", str(tmp_path / "run")]
    words += ["--extra", str(tmp_path / "more.npz"), "--extra-fraction", "1/4", "--quiet"]
    words += ["--epochs", "1", "--device", "cpu", "--precision", "fp32", "--extra-weight", "0.5"]
    assert main(words) == 0
    assert '"more.npz"' in (tmp_path / "run" / "run.json").read_text()


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"images": np.zeros(1)}, "image"),
        ({"image": np.zeros((2, 8, 8), np.uint8), "label": np.zeros(2, int)}, "N, H, W, C"),
        ({"image": np.zeros((2, 8, 8, 1)), "label": np.zeros(2, int)}, "must be uint8"),
        ({"image": np.zeros((2, 8, 8, 1), np.uint8), "label": np.zeros(3, int)}, "labels must be"),
        ({"image": np.array([object()]), "label": np.zeros(1, int)}, "not a .npz archive"),
    ],
)
def test_archives_of_another_kind_are_named(
    arrays: dict[str, Any], words: str, tmp_path: Path
) -> None:
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(DataFormatError, match=words):
        load_npz(tmp_path / "bad.npz")


def test_a_file_that_is_no_archive_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.npz").write_text("no archive")
    with pytest.raises(DataFormatError, match=r"bad\.npz: not a \.npz archive"):
        load_npz(tmp_path / "bad.npz")
    with pytest.raises(FileNotFoundError):
        load_npz(tmp_path / "nowhere.npz")
