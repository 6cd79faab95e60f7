"""Pseudo-labelled images in a pickle: what is read, what is refused, and a run of RST on them."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastadv.cli import main
from fastadv.data import DataFormatError, load_extra, load_npz, load_pseudo_labels
from fastadv.trainers.logs import read_records

pytestmark = pytest.mark.usefixtures("one_thread")
IMAGES = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), dtype=np.uint8)
LABELS = np.arange(40) % 10


def write(path: Path, content: Any, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(content, protocol))
    return path


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("labels", [LABELS, LABELS.astype(np.int32), LABELS.tolist()])
def test_the_published_form_is_read(protocol: int, labels: Any, tmp_path: Path) -> None:
    content = {"data": IMAGES, "extrapolated_targets": labels, "prediction_model": "wrn"}
    file = write(tmp_path / "ti.pickle", content, protocol)
    read = load_extra(file)
    assert torch.equal(read.images, torch.from_numpy(IMAGES).permute(0, 3, 1, 2))
    assert read.labels.tolist() == LABELS.tolist()
    assert read.num_classes == 10 and load_pseudo_labels(file, 12).num_classes == 12


def test_archives_are_read_as_before(tmp_path: Path) -> None:
    np.savez(tmp_path / "more.npz", image=IMAGES, label=LABELS)
    assert torch.equal(
        load_extra(tmp_path / "more.npz").images, load_npz(tmp_path / "more.npz").images
    )


class Harmful:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_nothing_in_a_file_is_run(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    content = {"data": IMAGES, "extrapolated_targets": LABELS, "more": Harmful(mark)}
    with pytest.raises(DataFormatError, match=r"bad\.pickle: not a pickle of plain arrays"):
        load_extra(write(tmp_path / "bad.pickle", content))
    assert not mark.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([IMAGES], "has no data"),
        ({"data": IMAGES}, "has no extrapolated_targets"),
        ({"data": 3, "extrapolated_targets": LABELS}, "has no data"),
        ({"data": IMAGES / 255, "extrapolated_targets": LABELS}, "data must be uint8"),
        ({"data": IMAGES[0], "extrapolated_targets": LABELS}, "data must be uint8"),
        ({"data": IMAGES, "extrapolated_targets": LABELS[:-1]}, "label"),
        ({"data": IMAGES, "extrapolated_targets": LABELS - 1}, "label"),
    ],
)
def test_other_contents_are_refused(content: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataFormatError, match=message):
        load_pseudo_labels(write(tmp_path / "x.pkl", content))


def test_a_file_that_ends_early_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "x.pickle", {"data": IMAGES, "extrapolated_targets": LABELS})
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DataFormatError, match="damaged"):
        load_extra(file)
    with pytest.raises(FileNotFoundError):
        load_extra(tmp_path / "nowhere.pickle")


def test_rst_trains_on_a_pickle_and_needs_one(tmp_path: Path, capfd: Any) -> None:
    file = write(tmp_path / "ti.pickle", {"data": IMAGES, "extrapolated_targets": LABELS})
    words = ["train", "rst", "--data", "digits", "--epochs", "1", "--train_images", "64"]
    words += [
        "--batch_size",
        "16",
        "--steps",
        "1",
        "--pad",
        "1",
        "--monitor_images",
        "16",
        "--quiet",
    ]
    assert main([*words, "--run", str(tmp_path / "run"), "--extra", str(file)]) == 0
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    assert records[-1]["step"] == 4
    assert main([*words, "--run", str(tmp_path / "none")]) != 0
    assert "extra_fraction must be 0 without extra images, got 0.5" in capfd.readouterr().err
