"""Tables on pictures in folders, which stand for ImageNet."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from fastadv.reproduction.workshop import Workshop

from fastadv.cli.program import main
from fastadv.reproduction.images import Source
from fastadv.reproduction.scales import find_scale
from fastadv.reproduction.specs import spec

pytestmark = pytest.mark.usefixtures("one_thread")


def test_pictures_in_a_folder_named_like_a_data_set_have_tables_of_their_own() -> None:
    names = [Source(data).name for data in ("cifar10", "folder:a/CIFAR10", "folder:b/ImageNet")]
    assert names == ["cifar10", "folder-cifar10", "imagenet"]
    files = [
        Source(data).file_name for data in ("cifar10", "folder:a/b", "folder:c/b", "folder:./a/b")
    ]
    assert files[0] == "cifar10" and files[1] == files[3] != files[2]
    assert all(re.fullmatch("b-[0-9a-f]{8}", name) for name in files[1:])


def test_a_path_from_another_working_directory_is_another_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = []
    for here, data in (("a", "folder:imgs"), ("b", "folder:imgs"), ("b", "folder:../a/imgs")):
        (tmp_path / here).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / here)
        shop = Workshop(tmp_path / "runs", find_scale("tiny"), Source(data))
        names.append(shop.resolve(spec("standard"), seed=0).name)
    assert names[0] == names[2] != names[1]


@pytest.mark.filterwarnings("ignore:the model is right on")
def test_pictures_in_folders_stand_for_imagenet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = pytest.importorskip("PIL.Image")
    numbers = np.random.default_rng(0)
    for split, count in (("train", 17), ("val", 2)):
        for label in "abc":
            (tmp_path / "ImageNet" / split / label).mkdir(parents=True)
            for number in range(count):
                pixels = numbers.integers(0, 255, (40, 44, 3)).astype(np.uint8)
                file = tmp_path / "ImageNet" / split / label / f"{number}.png"
                pictures.fromarray(pixels).save(file)
    for name, pixels in (("CROP", 32), ("RESIZE", 36)):  # small pictures, for a test
        monkeypatch.setattr(f"fastadv.reproduction.images.{name}", pixels)
    words = ["reproduce", "act/table4", "--data", f"folder:{tmp_path / 'ImageNet'}"]
    words += ["--out", str(tmp_path / "out"), "--scale", "tiny"]
    assert main([*words, "--plan", "true"]) == 0
    assert "for 2 trainings" in capsys.readouterr().out
    assert main([*words, "--quiet", "true"]) == 0
    files = {file.suffix: file for file in (tmp_path / "out" / "act" / "table4").iterdir()}
    assert re.fullmatch(r"tiny-imagenet-[0-9a-f]{8}-1seed\.md", files[".md"].name)
    made = json.loads(files[".json"].read_text())
    assert made["data"] == made["paper_data"] == "imagenet"
    figures = [[cell["paper"] for cell in row] for row in made["cells"]]
    assert figures == [[65.70, 42.36], [68.20, 44.29]]
    assert all(
        cell["n"] == [6] and cell["mean"] is not None for row in made["cells"] for cell in row
    )
    run = json.loads(next((tmp_path / "out" / "runs").glob("act-*/run.json")).read_text())
    assert run["recipe"]["weight"] == 0.5 and run["recipe"]["pad"] == 0
    assert main([*words, "--plan", "true"]) == 0
    assert "nothing is left" in capsys.readouterr().out
