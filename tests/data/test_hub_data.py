"""`hf:NAME`: data sets of Hugging Face, read by their package `datasets`; here by one that stands in for it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from attack_helpers import trained_small_cnn

from fastadv import evaluate
from fastadv.cli import main
from fastadv.data import HubImages, ImageData, load_dataset, load_hub
from fastadv.evaluation import load_results
from fastadv.evaluation.samples import as_samples

Image = pytest.importorskip("PIL.Image")
pytestmark = pytest.mark.usefixtures("one_thread")
N = 40


class Split:
    """A `datasets.Dataset`, as far as it is used."""

    def __init__(self, columns: dict[str, list[Any]], classes: int | None = None) -> None:
        self._columns = columns
        names = {"label": SimpleNamespace(num_classes=classes)} if classes else {}
        self.features = {name: names.get(name, object()) for name in columns}

    @property
    def column_names(self) -> list[str]:
        return list(self._columns)

    def __len__(self) -> int:
        return len(next(iter(self._columns.values())))

    def __getitem__(self, key: int | str) -> Any:
        if isinstance(key, str):
            return self._columns[key]
        return {name: values[key] for name, values in self._columns.items()}


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_dataset("digits").test.select(torch.arange(N))


def pictures(data: ImageData) -> list[Any]:
    return [Image.fromarray(image[0].numpy()) for image in data.images]


@pytest.fixture
def split(digits: ImageData) -> Split:
    return Split({"id": list(range(N)), "image": pictures(digits), "label": digits.labels.tolist()})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, split: Split) -> list[str]:
    """The stand-in for the package, which notes what it reads."""
    read: list[str] = []
    sets = {
        "user/digits": {"train": None, "validation": None, "test": split},
        "half": {"train": None, "validation": split},
        "single": {"everything": split},
        "raw": {"train": split, "extra": split},
    }

    def names(source: str) -> list[str]:
        if source not in sets:
            raise ConnectionError(f"no {source}")
        return list(sets[source])

    def load(source: str, split: str) -> Any:
        read.append(f"{source}:{split}")
        return sets[source][split]

    def from_disk(source: str) -> Any:
        read.append(source)
        whole = (Path(source) / "dataset_dict.json").exists()
        return {"test": split} if whole else split

    module = SimpleNamespace(
        get_dataset_split_names=names, load_dataset=load, load_from_disk=from_disk
    )
    monkeypatch.setitem(sys.modules, "datasets", module)
    return read


def correct(data: Any) -> list[int]:
    model = trained_small_cnn(half=False)
    report = evaluate(model, data, ("clean", "fgsm"), eps=0.1, progress=False)
    return [row.correct for row in report.rows]


@pytest.mark.parametrize(
    ("name", "split_read"),
    [
        ("user/digits", "user/digits:test"),
        ("user/digits:test", "user/digits:test"),
        ("half", "half:validation"),
        ("single", "single:everything"),
        ("raw:extra", "raw:extra"),
    ],
)
def test_a_split_is_chosen(hub: list[str], digits: ImageData, name: str, split_read: str) -> None:
    data = load_hub(name, workers=0)
    assert hub == [split_read]
    assert data.name == split_read.split("/")[-1].replace(":", " ")
    assert torch.equal(data.targets, digits.labels)
    assert data.in_channels == 1 and data.num_classes == int(digits.labels.max()) + 1


def test_a_split_is_judged_as_its_images_are(
    hub: list[str], digits: ImageData, split: Split
) -> None:
    expected = correct(digits)
    assert correct(load_hub("user/digits", workers=0)) == expected
    assert correct(split) == expected  # from Python, the split itself


def test_a_format_of_the_users_is_kept(split: Split, digits: ImageData) -> None:
    tensors = {"img": list(digits.images / 255), "label": digits.labels.tolist()}
    formatted: Any = Split(tensors)
    formatted.format = {"type": "torch"}
    assert correct(formatted) == correct(digits)


def test_the_command_line_judges_it(
    hub: list[str], digits: ImageData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(trained_small_cnn(half=False).state_dict(), tmp_path / "net.pt")
    words = ["eval", "--model", "small_cnn", "--weights", str(tmp_path / "net.pt"), "--quiet"]
    words += ["--attacks", "clean", "fgsm", "--eps", "0.1", "--device", "cpu", "--workers", "0"]
    assert main([*words, "--data", "hf:user/digits:test"]) == 0
    found = load_results(tmp_path / "net.pt.eval.json")
    assert [result.row.correct for result in found] == correct(digits)
    assert found[0].subject.data == "digits test"
    capsys.readouterr()
    assert main([*words, "--data", "hf:raw"]) == 2
    assert "data must name a split of raw, which has train, extra" in capsys.readouterr().err


def test_folders_that_were_saved(hub: list[str], tmp_path: Path) -> None:
    for kind in ("dataset_dict", "state"):
        folder = tmp_path / kind
        folder.mkdir()
        (folder / f"{kind}.json").touch()
        assert len(load_hub(str(folder), workers=0)) == N
    with pytest.raises(ValueError, match=r"must name a split of .*dataset_dict, which has test"):
        load_hub(f"{tmp_path / 'dataset_dict'}:train")


def test_what_is_not_there_is_named(hub: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="hf:no/such: datasets could not read it"):
        load_hub("no/such")
    with pytest.raises(ValueError, match=r"which has train, validation: .*got 'test'"):
        load_hub("half:test")
    with pytest.raises(ValueError, match="data must be hf:NAME"):
        load_hub("")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install datasets"):
        load_hub("half")


def test_columns_and_labels_are_checked(digits: ImageData) -> None:
    images, labels = pictures(digits), digits.labels.tolist()
    for columns in ({"img": images, "fine_label": labels}, {"image": images, "labels": labels}):
        assert len(HubImages(Split(columns), workers=0)) == N
    with pytest.raises(ValueError, match=r"column image or img .* got x, label"):
        HubImages(Split({"x": images, "label": labels}))
    with pytest.raises(ValueError, match="this split seems to have no labels"):
        HubImages(Split({"image": images, "label": [-1] * N}))
    with pytest.raises(TypeError, match="the label of item 1 of dataset must be an integer"):
        HubImages(Split({"image": images[:2], "label": [0, 0.9]}))
    with pytest.raises(ValueError, match="at least one item"):
        HubImages(Split({"image": [], "label": []}))
    with pytest.raises(TypeError, match="must hold PIL images, got list"):
        HubImages(Split({"image": [[0]] * N, "label": labels}))
    assert HubImages(Split({"image": images, "label": labels}, classes=17)).num_classes == 17


def test_pictures_are_made_alike_and_preprocessed() -> None:
    rng = np.random.default_rng(0)
    colour = [Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)) for _ in range(3)]
    mixed = [colour[0], colour[1].convert("L"), colour[2].convert("CMYK")]
    data = HubImages(Split({"image": mixed, "label": [0, 1, 2]}), resize=20, crop=16, workers=0)
    samples = as_samples(data, (0.0, 1.0))
    assert samples.image_shape == (3, 16, 16) and data.in_channels == 3
    mixed[1] = mixed[1].resize((50, 50))
    with pytest.raises(ValueError, match="give resize and crop"):
        as_samples(HubImages(Split({"image": mixed, "label": [0, 1, 2]}), workers=0), (0.0, 1.0))


def test_a_grey_picture_at_first_makes_no_data_set_grey(digits: ImageData) -> None:
    mixed = pictures(digits)
    mixed[1:] = [one.convert("RGB") for one in mixed[1:]]
    images = HubImages(Split({"image": mixed, "label": digits.labels.tolist()}))
    assert images.in_channels == 3
    assert images[0][0].shape == images[1][0].shape == (3, 8, 8)
    late = pictures(digits)
    late[0] = late[0].convert("RGB")
    images = HubImages(Split({"image": late, "label": digits.labels.tolist()}))
    assert images[1][0].shape == (1, 8, 8)
    with pytest.raises(ValueError, match="must be of one mode, got mode RGB at index 0"):
        images[0]
