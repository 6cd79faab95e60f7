"""`folder:PATH`: pictures in one folder per class, decoded when they are attacked."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attack_helpers import trained_small_cnn
from torch import Tensor, nn

from fastadv import evaluate
from fastadv.cli import main
from fastadv.data import DataFormatError, FolderImages, ImageData, load_dataset
from fastadv.data.preprocessing import Preprocessing
from fastadv.evaluation import load_results
from fastadv.evaluation.samples import as_samples

Image = pytest.importorskip("PIL.Image")
pytestmark = pytest.mark.usefixtures("one_thread")
N = 60


@pytest.fixture(scope="module")
def digits() -> ImageData:
    data = load_dataset("digits").test.select(torch.arange(N))
    return data.select(data.labels.argsort(stable=True))


@pytest.fixture(scope="module")
def root(digits: ImageData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits as grey pictures."""
    folder = tmp_path_factory.mktemp("folder") / "digits8"
    for number, (image, label) in enumerate(zip(digits.images, digits.labels, strict=True)):
        path = folder / f"class_{int(label)}" / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).save(path)
    return folder


class Grey(nn.Module):
    """The small CNN, of pictures in RGB."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = trained_small_cnn()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.mean(1, keepdim=True))


def grey() -> nn.Module:
    """A trained model for `--model test_folder_data:grey`."""
    return Grey().eval()


def correct(data: Any, **more: Any) -> list[int]:
    report = evaluate(Grey(), data, ("clean", "fgsm"), eps=0.1, progress=False, **more)
    return [row.correct for row in report.rows]


def picture(path: Path, width: int, height: int, kind: str = "RGB") -> Path:
    """A picture with a colour gradient."""
    path.parent.mkdir(parents=True, exist_ok=True)
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    pixels = np.stack([x, y, 255 - x], 2).astype(np.uint8)
    Image.fromarray(pixels).convert(kind).save(path)
    return path


@pytest.mark.processes
def test_a_folder_is_judged_as_its_images_are(root: Path, digits: ImageData) -> None:
    data = FolderImages(root, workers=0)
    assert len(data) == N and data.num_classes == 10 and data.name == "digits8"
    assert data.classes[3] == "class_3" and data.class_to_idx["class_3"] == 3
    assert torch.equal(data.targets, digits.labels)
    colour = ImageData(digits.images.repeat(1, 3, 1, 1), digits.labels, 10, "colour")
    assert correct(data) == correct(colour) == correct(FolderImages(root, workers=2))
    assert correct(data, max_examples=20) == correct(colour.select(torch.arange(1, N, 3)))


@pytest.mark.processes
def test_the_command_line_judges_a_folder(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    words = ["eval", "--model", "test_folder_data:grey", "--data", f"folder:{root}", "--quiet"]
    words += ["--attacks", "clean", "fgsm", "--eps", "0.1", "--device", "cpu"]
    assert main([*words, "--workers", "0"]) == 0
    first = load_results(tmp_path / "eval.json")
    assert [result.row.correct for result in first] == correct(FolderImages(root, workers=0))
    assert first[0].subject.data == "digits8" and first[0].row.n == N
    assert main([*words, "--workers", "2", "--max_examples", "60"]) == 0
    again = load_results(tmp_path / "eval.json")
    assert [r.subject.images for r in again] == [r.subject.images for r in first]
    assert main([*words, "--resize", "12", "--crop", "8", "--interpolation", "bicubic"]) == 0
    assert len(load_results(tmp_path / "eval.json")) == 4
    capsys.readouterr()
    assert main([*words, "--root", str(root)]) == 2
    assert f"root must be left out with folder:{root}" in capsys.readouterr().err
    other = words.copy()
    other[4] = "digits"
    assert main([*other, "--resize", "8"]) == 2
    assert "resize must be left out with digits, got 8" in capsys.readouterr().err
    other[4] = f"folder:{tmp_path / 'nowhere'}"
    assert main(other) == 2
    assert "nowhere: no such folder; expected there one folder per class" in capsys.readouterr().err
    other[4] = str(root)
    assert main(other) == 2
    assert f"got '{root}'; did you mean 'folder:{root}'?" in capsys.readouterr().err


def test_files_are_found_and_sorted(tmp_path: Path) -> None:
    for name in ("b/2.JPG", "b/1.png", "a/x/3.webp", "a/4.bmp", ".hidden/5.png", "b/.6.png"):
        picture(tmp_path / name, 8, 8)
    (tmp_path / "b" / "notes.txt").write_text("no picture")
    (tmp_path / "c").mkdir()
    (tmp_path / "list.csv").write_text("no folder")
    data = FolderImages(tmp_path, workers=0)
    assert data.classes == ["a", "b", "c"] and data.num_classes == 3
    found = [data.path(i).relative_to(tmp_path).as_posix() for i in range(len(data))]
    assert found == ["a/4.bmp", "a/x/3.webp", "b/1.png", "b/2.JPG"]
    assert data.targets.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("kind", ["L", "P", "RGBA", "1", "CMYK"])
def test_any_kind_of_picture_becomes_rgb(tmp_path: Path, kind: str) -> None:
    path = picture(tmp_path / "a" / ("x.tif" if kind == "CMYK" else "x.png"), 9, 7, kind)
    image, label = FolderImages(tmp_path, workers=0)[0]
    expected = np.array(Image.open(path).convert("RGB"))
    assert image.dtype == torch.uint8 and image.shape == (3, 7, 9) and label == 0
    assert torch.equal(image, torch.from_numpy(expected).permute(2, 0, 1))


@pytest.mark.parametrize(
    ("size", "resize", "crop", "expected"),
    [
        ((500, 375), 256, 224, (224, 224)),
        ((375, 500), 256, None, (341, 256)),
        ((500, 375), 256, None, (256, 341)),
        ((30, 21), None, 16, (16, 16)),
        ((5, 5), 10, 10, (10, 10)),
    ],
)
def test_resize_and_crop(
    size: tuple[int, int], resize: int | None, crop: int | None, expected: tuple[int, int]
) -> None:
    """Against the definitions of torchvision's Resize and CenterCrop, written with PIL's operations."""
    rng = np.random.default_rng(0)
    original = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    found = np.array(Preprocessing(resize, crop, "bicubic")(original))
    assert found.shape[:2] == expected
    width, height = size
    if resize is not None:
        scale = resize / min(size)
        width, height = (int(side * scale + 1e-9) for side in size)
        original = original.resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.array(original)
    if crop is not None:
        top, left = round((height - crop) / 2), round((width - crop) / 2)
        pixels = pixels[top : top + crop, left : left + crop]
    assert np.array_equal(found, pixels)


def test_the_interpolation_counts() -> None:
    original = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20), dtype=np.uint8))
    bilinear = np.array(Preprocessing(9)(original))
    assert not np.array_equal(bilinear, np.array(Preprocessing(9, None, "bicubic")(original)))
    assert bilinear.std() < np.array(original).std() / 1.5  # antialiased, not picked


@pytest.mark.processes
def test_sizes_that_differ_are_refused_in_words(tmp_path: Path) -> None:
    for number, size in enumerate([(40, 30), (30, 40), (40, 40)]):
        picture(tmp_path / "a" / f"{number}.png", *size)
    with pytest.raises(ValueError, match=r"one shape.*\[3, 40, 30\].*index 1.*resize and crop"):
        as_samples(FolderImages(tmp_path, workers=0), (0.0, 1.0))
    with pytest.raises(ValueError, match=r"one shape.*give resize and crop"):
        as_samples(FolderImages(tmp_path, resize=20, workers=1), (0.0, 1.0))
    samples = as_samples(FolderImages(tmp_path, resize=20, crop=16, workers=0), (0.0, 1.0))
    assert samples.image_shape == (3, 16, 16)
    with pytest.raises(ValueError, match=r"0.png: crop must be at most the size of each image"):
        FolderImages(tmp_path, crop=32, workers=0)[0]


def test_a_damaged_picture_is_named(root: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    path = sorted((copy / "class_9").iterdir())[-1]
    path.write_bytes(path.read_bytes()[:40])
    for workers in (0, 1):
        with pytest.raises(DataFormatError, match=f"{path.name}: not a picture that can be read"):
            correct(FolderImages(copy, workers=workers))
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(path)
    with pytest.raises(DataFormatError, match="more than 8 bits per channel"):
        FolderImages(copy, workers=0)[N - 1]


def test_what_is_no_folder_of_classes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        FolderImages(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="holds no folder; expected one folder per class"):
        FolderImages(tmp_path)
    file = picture(tmp_path / "x.png", 4, 4)
    with pytest.raises(NotADirectoryError, match="is a file"):
        FolderImages(file)
    (tmp_path / "train").mkdir()
    with pytest.raises(FileNotFoundError, match="none of its 1 folders holds a picture"):
        FolderImages(tmp_path)
    picture(tmp_path / "val" / "cat" / "x.png", 4, 4)
    with pytest.raises(ValueError, match="look like splits and not like classes; name one of"):
        FolderImages(tmp_path)
    assert FolderImages(tmp_path / "val").classes == ["cat"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"resize": 0}, ValueError, "resize must be >= 1"),
        ({"crop": 1.5}, TypeError, "crop must be an integer"),
        ({"resize": 4, "crop": 5}, ValueError, "crop must be at most resize, which is 4, got 5"),
        ({"interpolation": "nearest"}, ValueError, "interpolation must be one of"),
        ({"workers": -1}, ValueError, "workers must be >= 0"),
    ],
)
def test_wrong_options_are_named(
    root: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        FolderImages(root, **options)


def test_without_pillow_the_message_says_what_to_install(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"pip install 'fastadv.images.'"):
        FolderImages(root)


def test_the_fingerprint_follows_the_files(root: Path, tmp_path: Path) -> None:
    def fingerprint(folder: Path, count: int | None = None, **options: Any) -> str:
        data = FolderImages(folder, workers=0, **options)
        return as_samples(data, (0.0, 1.0), count).fingerprint()

    first = fingerprint(root)
    copy = tmp_path / "elsewhere"
    shutil.copytree(root, copy)
    assert fingerprint(copy) == first
    others = {first, fingerprint(root, 30), fingerprint(root, resize=8), fingerprint(root, crop=8)}
    path = sorted((copy / "class_4").iterdir())[0]
    content = bytearray(path.read_bytes())
    content[-20] ^= 1  # a checksum at the end: the size and the decoded image stay
    path.write_bytes(content)
    others.add(fingerprint(copy))
    shutil.copytree(root, copy, dirs_exist_ok=True)
    path.rename(path.with_name("other.png"))
    others.add(fingerprint(copy))
    assert len(others) == 6


def test_pictures_in_memory_shared_by_processes_take_few_bytes(root: Path) -> None:
    data = FolderImages(root, workers=0)
    assert isinstance(data._paths, np.ndarray) and data._paths.dtype.kind == "S"
    name = root / "class_0" / "größe \N{CAT}.png"
    shutil.copy(data.path(0), name)
    try:
        assert name in [FolderImages(root).path(i) for i in range(N + 1)]
    finally:
        name.unlink()


def test_a_link_that_leads_back_is_refused_and_not_followed_for_ever(tmp_path: Path) -> None:
    picture(tmp_path / "cat" / "a.png", 8, 8)
    picture(tmp_path / "cat" / "more" / "b.png", 8, 8)
    picture(tmp_path / "dog" / "c.png", 8, 8)
    elsewhere = picture(tmp_path.parent / f"{tmp_path.name} elsewhere" / "d.png", 8, 8).parent
    (tmp_path / "dog" / "linked").symlink_to(elsewhere)
    (tmp_path / "cat" / "linked").symlink_to(elsewhere)  # twice, and not in itself
    assert len(FolderImages(tmp_path)) == 5
    for loop, target in (("cat/more/loop", ".."), ("loop", "."), ("cat/loop", "..")):
        link = tmp_path / loop
        link.symlink_to(target)
        with pytest.raises(ValueError, match="in which it lies itself"):
            FolderImages(tmp_path)
        link.unlink()
    (tmp_path / "kitten").symlink_to("cat")
    with pytest.raises(ValueError, match="its folders cat and kitten are the same folder"):
        FolderImages(tmp_path)


def test_a_class_that_cannot_be_read_is_not_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("cat", "dog/more", "owl"):
        picture(tmp_path / name / "a.png", 8, 8)
    (tmp_path / "cow").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"cow: a link to .*nowhere, which is not there"):
        FolderImages(tmp_path)
    (tmp_path / "cow").unlink()
    scan = os.scandir

    def locked(path: Any) -> Any:
        if Path(path).name == "more":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", locked)
    with pytest.raises(PermissionError, match="more"):
        FolderImages(tmp_path)
