"""What is taken for data, and what is refused: labels, axes, classes, and the arguments of loaders."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attack_helpers import digits_test, images, trained_small_cnn
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset
from training_helpers import small_data, small_recipe

import fastadv
from fastadv import losses
from fastadv.data import (
    DataFormatError,
    ImageData,
    Loader,
    Splits,
    StreamedData,
    StreamLoader,
    from_dataset,
    from_tensors,
    load_dataset,
    load_npz,
    subset,
)
from fastadv.models import small_cnn
from fastadv.trainers import (
    train,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def grey(count: int = 8) -> ImageData:
    return from_tensors(torch.rand(count, 1, 8, 8), torch.arange(count) % 4, 4)


LOADER_CASES: list[tuple[dict[str, Any], type[Exception]]] = [
    *[({name: "false"}, TypeError) for name in ("train", "flip", "channels_last", "drop_last")],
    *[({name: 1.5}, TypeError) for name in ("batch_size", "seed", "pad", "rank", "world_size")],
    *[({name: True}, TypeError) for name in ("batch_size", "seed", "pad", "rank", "world_size")],
    ({"extra_fraction": "0.5"}, TypeError),
    ({"mode": "zeros"}, ValueError),
]


@pytest.mark.parametrize(("change", "error"), LOADER_CASES)
def test_arguments_of_a_loader(change: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=f"{next(iter(change))} must be"):
        Loader(grey(), **{"batch_size": 4, "train": True, **change})


def test_arguments_of_other_sources_of_data() -> None:
    streamed = TensorDataset(torch.rand(8, 1, 8, 8), torch.arange(8) % 4)
    with pytest.raises(TypeError, match="channels_last must be True or False"):
        StreamLoader(StreamedData(streamed, 4, "s", 0), 4, channels_last="no")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="num_classes must be an integer"):
        StreamedData(streamed, 4.0, "s")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="workers must be an integer"):
        StreamedData(streamed, 4, "s", True)
    with pytest.raises(TypeError, match="num_classes must be an integer"):
        from_tensors(torch.rand(4, 1, 8, 8), torch.arange(4), 4.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="n must be an integer"):
        subset(grey(), 2.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="verify must be True or False"):
        load_dataset("cifar10", ".", verify="no")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="flip must be True or False"):
        fastadv.ops.crop_flip(grey().images, torch.arange(4), flip="no", seed=0)  # type: ignore[arg-type]


class Items(Dataset[Any]):
    """Images with any labels."""

    def __init__(self, labels: list[Any], image: Any = None) -> None:
        self._labels = labels
        self._image = torch.rand(1, 8, 8) if image is None else image

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self._image, self._labels[index]


WRONG_LABELS = [
    1.0,
    1.9,
    "1",
    None,
    True,
    torch.tensor(1.9),
    torch.tensor(True),
    np.float32(1),
    np.array(2.5),
]


@pytest.mark.parametrize("label", WRONG_LABELS)
def test_a_label_is_an_integer(label: object) -> None:
    with pytest.raises(TypeError, match="label of item 1 of dataset must be an integer"):
        from_dataset(Items([0, label]), 4)
    with pytest.raises(TypeError, match="label of item 0 of dataset must be an integer"):
        StreamedData(Items([label]), 4, "s")
    one = StreamedData(Items([0, label]), 4, "s", workers=0)
    with pytest.raises(TypeError, match="label of item 1 of dataset must be an integer"):
        list(StreamLoader(one, 2).epoch(0))


@pytest.mark.parametrize(
    "label", [torch.eye(4)[1], torch.eye(4, dtype=torch.int64)[1], np.eye(4)[1]]
)
def test_a_one_hot_label_is_refused(label: object) -> None:
    with pytest.raises(
        ValueError, match=r"label of item 0 .* one class index, got shape \(4,\).*argmax"
    ):
        from_dataset(Items([label]), 4)
    with pytest.raises(ValueError, match=r"labels must be class indices \[N\].*argmax"):
        from_tensors(torch.rand(4, 1, 8, 8), torch.eye(4, dtype=torch.int64))


def test_a_dataset_without_a_length_is_named() -> None:
    class Endless(Dataset[Any]):
        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            return torch.zeros(1, 8, 8), 0

    with pytest.raises(TypeError, match="data must have a length, got the Dataset Endless"):
        fastadv.evaluate(small_cnn(4, 1), Endless(), progress=False)


@pytest.mark.parametrize(
    "label",
    [3, np.int32(3), np.uint8(3), torch.tensor(3), torch.tensor([3]), np.array(3, dtype=np.uint16)],
)
def test_any_integer_is_a_label(label: object) -> None:
    assert from_dataset(Items([label]), 4).labels.tolist() == [3]


INTEGERS = [torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16]


@pytest.mark.parametrize("dtype", INTEGERS)
def test_labels_of_any_integer_dtype_are_understood(dtype: torch.dtype) -> None:
    net, (x, y) = trained_small_cnn(), digits_test(8)
    attack = fastadv.PGD(net, 0.1, steps=2, seed=1, precision="fp32")
    assert torch.equal(attack(x, y.to(dtype)), attack(x, y))
    a, b = torch.randn(8, 10), torch.randn(8, 10)
    assert torch.equal(losses.trades(a, b, y.to(dtype)), losses.trades(a, b, y))
    assert torch.equal(losses.dlr(a, y.to(dtype)), losses.dlr(a, y))
    radius = fastadv.minimum_perturbation(attack, x, y.to(dtype), max_eps=0.2, iterations=2)
    assert torch.equal(
        radius, fastadv.minimum_perturbation(attack, x, y, max_eps=0.2, iterations=2)
    )
    report = fastadv.evaluate(net, (x, y.to(dtype)), ("clean",), progress=False)
    assert (
        report["clean"].correct
        == fastadv.evaluate(net, (x, y), ("clean",), progress=False)["clean"].correct
    )
    for data in (
        from_tensors(x, y.to(dtype), 10),
        ImageData((x * 255).byte(), y.to(dtype), 10, "d"),
    ):
        assert data.labels.dtype == torch.int64 and data.labels.tolist() == y.tolist()


@pytest.mark.parametrize(
    "y", [torch.rand(8), torch.zeros(8, dtype=torch.bool), torch.zeros(8).half()]
)
def test_labels_that_are_no_integers_are_refused(y: Tensor) -> None:
    x, logits = images(8), torch.randn(8, 10)
    for call in (
        lambda: fastadv.pgd_fused(small_cnn(), x, y),
        lambda: losses.cross_entropy(logits, y),
        lambda: fastadv.evaluate(small_cnn(), (x, y), ("clean",), progress=False),
        lambda: from_tensors(x, y),
    ):
        with pytest.raises(TypeError, match=r"(y|labels) must be"):
            call()


def archive_of_texts(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("image.npy", b"no array")
        archive.writestr("label.npy", b"")


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (archive_of_texts, "its file 'image' is no array"),
        (lambda path: path.write_text("text"), "it is no zip archive"),
        (lambda path: path.write_bytes(b""), "it is no zip archive"),
        (lambda path: np.savez(path, images=[1], y=[2]), "no array 'image'; it has images, y"),
        (
            lambda path: np.savez(path, image=np.zeros((1, 2, 2, 3), np.uint8), label=["a"]),
            "labels must be integers, got <U1",
        ),
    ],
)
def test_what_an_archive_lacks_is_said(
    write: Callable[[Path], Any], words: str, tmp_path: Path
) -> None:
    write(tmp_path / "x.npz")
    with pytest.raises(DataFormatError, match=rf"x\.npz: .*{words}"):
        load_npz(tmp_path / "x.npz")


HWC = (32, 32, 3)


def test_images_with_channels_last_are_not_taken_for_many_channels(tmp_path: Path) -> None:
    batch, labels = torch.rand(4, *HWC), torch.arange(4)
    for wrong in (batch, (batch * 255).byte(), batch[..., :1], batch.numpy()):
        with pytest.raises(
            ValueError, match=r"images must have axes C, H, W, got \(32, 32, \d\).*permute"
        ):
            from_tensors(wrong, labels)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="images must have axes C, H, W"):
        from_dataset(Items([0, 1], torch.rand(*HWC)))
    with pytest.raises(ValueError, match="images of dataset must have axes C, H, W"):
        StreamedData(Items([0, 1], torch.rand(*HWC)), 2, "s")
    with pytest.raises(ValueError, match="a picture of dataset must have axes H, W, C"):
        from_dataset(Items([0, 1], np.zeros((3, 32, 32), np.uint8)))
    np.savez(tmp_path / "x.npz", image=np.zeros((4, 3, 32, 32), np.uint8), label=np.arange(4))
    with pytest.raises(
        DataFormatError, match=r"x\.npz: image must be \[N, H, W, C\].*looks like \[N, C, H, W\]"
    ):
        load_npz(tmp_path / "x.npz")


@pytest.mark.parametrize(
    "shape", [(3, 32, 32), (1, 8, 8), (3, 3, 3), (16, 1, 1), (2, 8, 3), (3, 8, 1)]
)
def test_other_shapes_of_images_are_taken(shape: tuple[int, ...]) -> None:
    assert from_tensors(torch.rand(4, *shape), torch.arange(4)).images.shape == (4, *shape)


def test_a_model_must_know_all_classes_of_the_data(tmp_path: Path) -> None:
    data = small_data()
    arguments: dict[str, Any] = {"data": data, "run_dir": tmp_path / "run", "progress": False}
    for method in ("standard", "pgd_at"):
        with pytest.raises(
            ValueError, match="model must have the 4 classes of 'squares train', got 3 logits"
        ):
            train(method, small_recipe(method), model=small_cnn(3, 1), **arguments)
    assert not (tmp_path / "run").exists()
    more = Splits(data.train, ImageData(data.test.images, data.test.labels, 6, "squares test"))
    with pytest.raises(
        ValueError, match="model must have the 6 classes of 'squares test', got 4 logits"
    ):
        train(
            "standard", small_recipe("standard"), model="small_cnn", **{**arguments, "data": more}
        )
    few = ImageData(data.test.images, data.test.labels.clamp(max=2), 4, "squares test")
    with pytest.raises(
        ValueError, match="model must have the 4 classes of 'squares test', got 3 logits"
    ):
        fastadv.evaluate(small_cnn(3, 1), few, ("clean",), progress=False)
    with pytest.raises(ValueError, match="model must return logits of shape"):
        train("standard", small_recipe("standard"), model=nn.Conv2d(1, 4, 3), **arguments)


def test_the_look_at_the_classes_leaves_no_trace(tmp_path: Path) -> None:
    class Restless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = small_cnn(4, 1)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            torch.rand(())
            return self.net(x)

    from fastadv.trainers.classes import check_classes

    model = Restless().train()
    state = torch.get_rng_state()
    check_classes(model, small_data(), torch.device("cpu"), None)
    assert torch.equal(torch.get_rng_state(), state) and model.calls == 0 and model.net.training


@pytest.mark.parametrize(
    ("pixels", "labels", "words"),
    [
        (torch.rand(6, 3, 8, 8), torch.arange(6) + 1, r"in 1 \.\. 6, counted from 1"),
        (torch.rand(6, 3, 8, 8).round().byte(), torch.arange(6), "which is black"),
        (torch.rand(6, 3, 8, 8) / 255, torch.arange(6), "not divided by 255 twice"),
    ],
)
def test_images_and_labels_in_other_units_are_told(
    pixels: Tensor, labels: Tensor, words: str
) -> None:
    with pytest.warns(UserWarning, match=words) as told:
        from_tensors(pixels, labels)
    assert told[0].filename == __file__


def test_images_and_labels_in_the_right_units_are_taken() -> None:
    pixels = images(6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        from_tensors(pixels, torch.arange(6))
        from_tensors(pixels, torch.arange(6) + 1, num_classes=7)
        from_tensors(pixels * 0, torch.arange(6) * 0 + 3)  # one class, without light


@pytest.mark.parametrize(
    "who", [from_tensors, lambda *data: fastadv.evaluate(small_cnn(4, 1), data)]
)
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda value: value.to_sparse(), "must be a dense tensor, got torch.sparse_coo"),
        (
            lambda value: value.to("meta"),
            "must be a tensor with values, got one on the device 'meta'",
        ),
    ],
)
def test_tensors_without_values_of_their_own_are_named(who: Any, make: Any, words: str) -> None:
    pixels, labels = torch.rand(4, 1, 8, 8), torch.arange(4)
    with pytest.raises(TypeError, match=f"images.* {words}"):
        who(make(pixels), labels)
    with pytest.raises(TypeError, match=f"labels.* {words}"):
        who(pixels, make(labels))


def test_images_that_require_a_gradient_are_judged_without_a_warning() -> None:
    pixels = torch.rand(4, 1, 8, 8, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastadv.evaluate(small_cnn(4, 1), (pixels, torch.arange(4)), ["clean"], progress=False)
        assert not from_tensors(pixels, torch.arange(4)).images.requires_grad
