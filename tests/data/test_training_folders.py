"""Training on pictures in folders: what is read, by whom, and the whole way on the command line."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import Started, rank_environments
from torch import Tensor
from training_helpers import small_recipe

from fastadv import pgd_fused
from fastadv.cli import main
from fastadv.data import Splits, StreamedData, StreamLoader, load_folders
from fastadv.data.training_folders import random_box
from fastadv.models import create_model, load_published_state_dict
from fastadv.trainers import ActRecipe, FastRecipe, FreeRecipe, Interpolated, load_model, train
from fastadv.trainers.run_directory import RunDirectory
from fastadv.trainers.sealed import read_sealed, sealed_json

Image = pytest.importorskip("PIL.Image")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
CLASSES, PER_CLASS = 20, 4
SIZES = ("--resize", "40", "--crop", "32", "--workers", "1")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 classes of JPEGs and PNGs of several sizes; each picture a ramp in a colour of its own."""
    root = tmp_path_factory.mktemp("pictures") / "small"
    numbers = np.random.default_rng(0)
    for split, count in (("train", PER_CLASS), ("val", 2)):
        for label in range(CLASSES):
            folder = root / split / f"class{label:02d}"
            folder.mkdir(parents=True)
            for number in range(count):
                height, width = numbers.integers(36, 70, 2)
                ramp = np.linspace(0, 150, width)[None, :, None] + numbers.integers(0, 100, 3)
                pixels = np.broadcast_to(ramp, (height, width, 3)).astype(np.uint8)
                suffix = "jpg" if number % 2 else "png"
                Image.fromarray(pixels).save(folder / f"{number}.{suffix}")
    return root


def loaded(root: Path, workers: int = 0, **options: Any) -> tuple[StreamedData, Splits]:
    splits = load_folders(root, resize=40, crop=32, workers=workers, **options)
    assert isinstance(splits.train, StreamedData)
    return splits.train, splits


def batches(data: StreamedData, epoch: int = 0, **options: Any) -> list[tuple[Tensor, ...]]:
    return [tuple(batch) for batch in StreamLoader(data, 16, seed=3, **options).epoch(epoch)]


@pytest.mark.processes
def test_batches_do_not_depend_on_workers_or_processes(root: Path) -> None:
    data, _ = loaded(root)
    alone = batches(data)
    assert len(alone) == 5 and alone[0][0].shape == (16, 3, 32, 32)
    in_workers = batches(loaded(root, workers=2)[0])
    ranks = [batches(data, rank=rank, world_size=2) for rank in range(2)]
    for step, whole in enumerate(alone):
        halves = [torch.cat(parts) for parts in zip(ranks[0][step], ranks[1][step], strict=True)]
        for a, b, c in zip(whole, in_workers[step], halves, strict=True):
            assert torch.equal(a, b) and torch.equal(a, c)
    ids, labels = (torch.cat([batch[i] for batch in alone]) for i in (2, 1))
    assert sorted(ids.tolist()) == list(range(80)) and torch.equal(labels, ids // PER_CLASS)


def test_each_epoch_cuts_and_mirrors_anew(root: Path) -> None:
    data, _ = loaded(root)
    by_id = [
        {int(i): x for b in batches(data, epoch) for x, i in zip(b[0], b[2], strict=True)}
        for epoch in (0, 1)
    ]
    assert all(not torch.equal(by_id[0][i], by_id[1][i]) for i in range(80))
    # The ramp rises to the right, unless the picture is mirrored.
    rises = [bool(x[0, 16, -1] > x[0, 16, 0]) for images in by_id for x in images.values()]
    assert 50 < sum(rises) < 110
    upright, _ = loaded(root, flip=False)
    assert all(bool((x[0, :, -1] > x[0, :, 0]).all()) for b in batches(upright) for x in b[0])


def test_parts_have_the_areas_and_shapes_of_the_recipe() -> None:
    generator = torch.Generator().manual_seed(0)
    width, height = 400, 300
    boxes = [
        random_box(width, height, torch.rand(10, 4, generator=generator).tolist())
        for _ in range(4000)
    ]
    sizes = np.array([(r - x, b - y) for x, y, r, b in boxes], dtype=float)
    assert all(0 <= x < r <= width and 0 <= y < b <= height for x, y, r, b in boxes)
    areas, ratios = sizes.prod(1) / (width * height), sizes[:, 0] / sizes[:, 1]
    assert 0.078 < areas.min() < 0.09 and areas.max() > 0.95
    assert 0.74 < ratios.min() < 0.77 and 1.3 < ratios.max() < 1.35
    small = (
        areas < 0.4
    )  # parts that fit at the first try: even in area, and in the logarithm of the ratio
    assert areas[small].mean() == pytest.approx(0.24, abs=0.01)
    assert np.log(ratios[small]).mean() == pytest.approx(0, abs=0.02)
    assert np.log(ratios[small]).std() == pytest.approx(
        2 * math.log(4 / 3) / math.sqrt(12), abs=0.01
    )
    places = np.array([(x / max(width - r + x, 1)) for x, _, r, _ in boxes])
    assert places.mean() == pytest.approx(0.5, abs=0.02)
    # Nothing but a square of half the area would fit into so long a picture.
    assert random_box(1000, 10, [[0.5] * 4] * 10) == (493, 0, 506, 10)
    assert random_box(1, 1, [[0.0] * 4] * 10) == (0, 0, 1, 1)


def test_a_part_is_what_pillow_makes_of_it(root: Path) -> None:
    data, _ = loaded(root, flip=False)
    torch.manual_seed(5)
    pixels, label = data.dataset[9]
    torch.manual_seed(5)
    numbers = torch.rand(11, 4, dtype=torch.float64).tolist()
    with Image.open(root / "train" / "class02" / "1.jpg") as picture:
        part = picture.convert("RGB").crop(random_box(*picture.size, numbers[:10]))
    expected = np.array(part.resize((32, 32), Image.Resampling.BILINEAR))
    assert label == 2 and np.array_equal(pixels.permute(1, 2, 0).numpy(), expected)


def test_test_images_are_the_middles_and_as_many_as_asked(root: Path) -> None:
    _, splits = loaded(root, test_images=20)
    assert splits.test.labels.tolist() == list(range(20)) and len(loaded(root)[1].test) == 40
    assert splits.test.images.shape == (20, 3, 32, 32) and splits.source is not None
    assert splits.source["dataset"] == f"folder:{root.resolve()}"


def test_folders_that_do_not_fit_are_named(root: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="must hold the folders train and val"):
        load_folders(tmp_path)
    for split, names in (("train", "ab"), ("val", "ac")):
        for name in names:
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (40, 40)).save(tmp_path / split / name / "1.png")
    with pytest.raises(
        ValueError, match=r"must have the 2 classes of .*in one of the two alone: b, c"
    ):
        load_folders(tmp_path)
    for name, value in (("crop", 0), ("workers", -1), ("test_images", 0)):
        with pytest.raises(ValueError, match=f"{name} must be >= "):
            load_folders(root, **{name: value})  # type: ignore[arg-type]


def words_for(root: Path, run: Path) -> list[str]:
    return [
        *("train", "pgd_at", "--data", f"folder:{root}", "--run", str(run), "--model", "small_cnn"),
        *("--epochs", "1", "--batch_size", "32", "--steps", "1", "--monitor_images", "20"),
        *("--monitor_steps", "1", "--device", "cpu", "--precision", "fp32", "--quiet"),
        *("--attack_precision", "fp32", *SIZES),
    ]


def test_the_whole_way_on_the_command_line(
    root: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = tmp_path / "r"
    monkeypatch.chdir(root.parent)
    assert main(words_for(Path(root.name), run)) == 0
    assert f"data: folder:{root}\n" in (run / "config.yaml").read_text()
    monkeypatch.chdir(tmp_path)
    recorded = json.loads((run / "run.json").read_text())
    reading = {"resize": 40, "crop": 32, "interpolation": "bilinear"}
    assert recorded["source"]["reading"] == reading == RunDirectory(run).reading()
    assert recorded["data"]["size"] == [3, 32, 32] and recorded["model"]["num_classes"] == CLASSES
    assert (recorded["recipe"]["pad"], recorded["recipe"]["flip"]) == (0, True)
    more = ["--resume", "--allow-changes", "--epochs", "2", "--quiet"]
    assert main(["train", "pgd_at", "--run", str(run), *more]) == 0
    assert main(["eval", str(run), "--attacks", "fgsm", "--device", "cpu", "--quiet"]) == 0
    results = json.loads((run / "eval.json").read_text())
    assert "40" in json.dumps(results) and load_model(run).training is False
    capfd.readouterr()
    for extra, said in (
        (["--pad", "4"], "pad must be 0 with StreamedData"),
        (["--holdout", "4"], "holdout must be 0 with StreamedData"),
        (["--root", "x"], "root must be left out with folder:"),
    ):
        assert main([*words_for(root, tmp_path / "no"), *extra]) == 2
        assert said in capfd.readouterr().err
    digits = ["train", "standard", "--data", "digits", "--run", str(tmp_path / "no")]
    assert main([*digits, "--crop", "32"]) == 2
    assert "crop must be left out with digits, got 32" in capfd.readouterr().err


def test_a_cut_run_goes_on_bit_for_bit(root: Path, tmp_path: Path) -> None:
    def weights(folder: Path, **options: Any) -> str:
        recipe = small_recipe("pgd_at", flip=True, pad=0, batch_size=32, monitor_images=8)
        fixed: dict[str, Any] = {"device": "cpu", "progress": False, "model": "small_cnn"}
        result = train("pgd_at", recipe, data=loaded(root)[1], run_dir=folder, **fixed, **options)
        values = result.model.state_dict().values()
        return hashlib.sha256(b"".join(v.numpy().tobytes() for v in values)).hexdigest()

    def stop(progress: Any) -> None:
        if progress.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        weights(tmp_path / "cut", on_step=stop)
    classes = root / "train" / "class00", root / "train" / "class01"
    moved = classes[0] / "3.jpg", classes[1] / "4.jpg"
    moved[0].rename(moved[1])
    try:
        with pytest.raises(ValueError, match=r"holds another run .*data\.files: "):
            weights(tmp_path / "cut", resume=True)
    finally:
        moved[1].rename(moved[0])
    assert weights(tmp_path / "cut", resume=True) == weights(tmp_path / "whole")
    file = tmp_path / "whole" / "run.json"
    content = read_sealed(file)
    del content["data"]["files"]  # as before they were recorded
    file.write_text(sealed_json(content))
    weights(tmp_path / "whole", resume=True)


@pytest.mark.processes
def test_two_processes_train_on_it(root: Path, tmp_path: Path) -> None:
    words = ["-m", "fastadv", *words_for(root, tmp_path / "r2"), "--flip", "false"]
    processes = [Started(words, variables) for variables in rank_environments(2)]
    told = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    assert "r2/checkpoints/step_000002" in told[0][0]


# Networks


def torchvision_names(bottleneck: bool, blocks: tuple[int, ...]) -> set[str]:
    """The names of torchvision's and timm's state dicts, spelt out."""
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    names = {"conv1.weight", "fc.weight", "fc.bias", *(f"bn1.{part}" for part in norm)}
    for stage, count in enumerate(blocks, 1):
        for block in range(count):
            place = f"layer{stage}.{block}"
            for number in range(1, 4 if bottleneck else 3):
                names |= {f"{place}.conv{number}.weight"}
                names |= {f"{place}.bn{number}.{part}" for part in norm}
            if block == 0 and (bottleneck or stage > 1):
                names |= {f"{place}.downsample.0.weight"}
                names |= {f"{place}.downsample.1.{part}" for part in norm}
    return names


@pytest.mark.parametrize(
    ("name", "bottleneck", "blocks", "parameters"),
    [
        ("resnet50", True, (3, 4, 6, 3), 25_557_032),
        ("resnet18_imagenet", False, (2, 2, 2, 2), 11_689_512),
    ],
)
def test_published_state_dicts_load(
    name: str, bottleneck: bool, blocks: tuple[int, ...], parameters: int
) -> None:
    with torch.device("meta"):
        shapes = create_model(name, 1000)
    assert sum(p.numel() for p in shapes.parameters()) == parameters
    assert set(shapes.state_dict()) == torchvision_names(bottleneck, blocks)
    model, source = create_model(name, 7), create_model(name, 7)
    state = {f"module.{key}": value for key, value in source.state_dict().items()}
    report = load_published_state_dict(model, {"state_dict": state})
    assert report.complete and report.prefix == "module."
    x = torch.rand(2, 3, 64, 64)
    model.eval(), source.eval()
    with torch.no_grad():
        features = model.forward_features(x)  # type: ignore[operator]
        assert features.shape == (2, 2048 if bottleneck else 512, 2, 2)
        assert torch.equal(model(x), source(x))


def test_the_attack_takes_the_network_of_imagenet() -> None:
    model = create_model("resnet18_imagenet", 5).eval()
    x, y = torch.rand(2, 3, 64, 64), torch.tensor([1, 3])
    attacked = [
        pgd_fused(
            model, x, y, eps=4 / 255, alpha=2 / 255, steps=2, seed=1, precision="fp32", engine=e
        )
        for e in ("auto", "eager")
    ]
    assert float((attacked[0] != x).float().mean()) > 0.9
    agree = (attacked[0] - attacked[1]).abs() < 1e-6
    assert float(agree.float().mean()) > 0.99


def test_presets_have_the_numbers_of_the_scripts() -> None:
    act, free, fast = (kind.preset("imagenet") for kind in (ActRecipe, FreeRecipe, FastRecipe))
    assert isinstance(act, ActRecipe)
    assert (act.weight, act.weight_decay, act.temperature, act.eps * 255) == (0.5, 1e-5, 4, 2)
    assert [act.lr_at(e) for e in (0, 29, 30, 60, 90)] == pytest.approx(
        [0.1, 0.1, 0.01, 1e-3, 1e-4]
    )
    assert (free.steps, free.epochs, free.weight_decay, free.batch_size) == (4, 23, 1e-4, 256)
    assert [free.lr_at(e) for e in (7.9, 8, 15.9, 16, 22)] == pytest.approx(
        [0.1, 0.01, 0.01, 1e-3, 1e-3]
    )
    assert (fast.eps * 255, fast.alpha * 255, fast.epochs) == pytest.approx((4, 5, 15))
    rates = [fast.lr_at(e) for e in (0, 0.5, 1, 3.5, 6, 9, 12, 13.5, 15)]
    assert rates == pytest.approx([0, 0.2, 0.4, 0.22, 0.04, 0.022, 0.004, 0.0022, 0.0004])
    assert {act.pad, free.pad, fast.pad} == {0}


def test_lines_that_do_not_fit_are_refused() -> None:
    assert Interpolated((0, 2), (1.0, 0.5)).factor(9, 20) == 0.5
    with pytest.raises(ValueError, match="epochs must begin with 0"):
        Interpolated((1, 2), (1.0, 0.5))
    with pytest.raises(ValueError, match="one number for each of the 2 epochs, got 1"):
        Interpolated((0, 2), (1.0,))
