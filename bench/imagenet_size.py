"""Training with ImageNet's number of classes: is memory flat, and are batches the same on 1 and 2 processes?

Small synthetic pictures in 1,000 folders are made in a temporary folder, and a network of ImageNet's form is
trained for some steps. The memory of this process and its workers is printed as it goes.

    python bench/imagenet_size.py --out bench/results/imagenet_size.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from PIL import Image

from fastadv.data import Splits, StreamedData, StreamLoader, load_folders
from fastadv.files import write_atomically
from fastadv.trainers import AdversarialRecipe, Callback, Constant, Settings, train


def make_pictures(root: Path, classes: int, per_class: int, size: int) -> None:
    """JPEGs in train and PNGs in val, of several sizes, whose colour depends on the class."""
    numbers = np.random.default_rng(0)
    for split, count, suffix in (("train", per_class, "jpg"), ("val", 1, "png")):
        for label in range(classes):
            folder = root / split / f"n{label:08d}"
            folder.mkdir(parents=True)
            colour = numbers.integers(0, 156, 3)
            for number in range(count):
                height, width = numbers.integers(size, 2 * size, 2)
                pixels = colour + numbers.integers(0, 100, (height, width, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.{suffix}")


def resident(pid: str = "self") -> int:
    """Bytes of memory of a process and its children, of which shared ones are counted once."""
    total = 0
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            total += 1024 * int(line.split()[1])
    children = Path(f"/proc/{pid}/task/{_main_thread(pid)}/children").read_text().split()
    for child in children:
        try:
            total += resident(child)
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            continue
    return total


def _main_thread(pid: str) -> str:
    return Path(f"/proc/{pid}").resolve().name


class Memory(Callback):
    """Prints the memory with each record."""

    def __init__(self) -> None:
        self.records: list[dict[str, float]] = []
        self.began = time.monotonic()

    def on_step(self, metrics: Any) -> None:
        record = {
            "seconds": round(time.monotonic() - self.began, 1),
            "step": metrics["step"],
            "epoch": metrics["epoch"],
            "mib": round(resident() / 2**20, 1),
            "images_per_second": round(metrics["images_per_second"], 1),
        }
        self.records.append(record)
        print(" ".join(f"{name} {value}" for name, value in record.items()), flush=True)


def digest(data: StreamedData, batch_size: int, steps: int, processes: int) -> str:
    """SHA-256 of the first global batches, put together from those of each process."""
    loaders = [
        StreamLoader(data, batch_size, seed=0, rank=rank, world_size=processes).epoch(0)
        for rank in range(processes)
    ]
    found = hashlib.sha256()
    for _ in range(steps):
        parts = [next(loader) for loader in loaders]
        for values in zip(*parts, strict=True):  # images, labels, indices
            found.update(b"".join(value.numpy().tobytes() for value in values))
    return found.hexdigest()


def train_some(data: Splits, folder: Path, options: argparse.Namespace) -> Memory:
    """Train by PGD-1 for some epochs."""
    recipe = AdversarialRecipe(
        epochs=options.epochs,
        batch_size=options.batch_size,
        lr=0.01,
        schedule=Constant(),
        steps=1,
        eps=4 / 255,
        alpha=4 / 255,
        pad=0,
        monitor_images=16,
        monitor_steps=1,
    )
    memory, settings = Memory(), Settings(log_every=options.log_every)
    arguments: dict[str, Any] = {"settings": settings, "callbacks": [memory], "progress": False}
    train("pgd_at", recipe, data=data, model=options.model, run_dir=folder, **arguments)
    return memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--per_class", type=int, default=1, help="training pictures")
    parser.add_argument("--epochs", type=int, default=5, help="at least 3")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--size", type=int, default=32, help="pixels of the training images")
    parser.add_argument("--model", default="resnet18_imagenet")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--log_every", type=int, default=4)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        make_pictures(root, options.classes, options.per_class, options.size)
        sizes = {"resize": options.size + options.size // 8, "crop": options.size}
        data = load_folders(root, test_images=16, workers=options.workers, **sizes)
        assert isinstance(data.train, StreamedData)
        print(f"{len(data.train):,} pictures in {data.train.num_classes:,} folders")
        digests = [digest(data.train, options.batch_size, 4, n) for n in (1, 2)]
        print(f"batches on 1 and 2 processes: {'the same' if len(set(digests)) == 1 else 'differ'}")
        memory = train_some(data, root / "run", options)
    epochs = [
        mean([r["mib"] for r in memory.records if r["epoch"] == epoch])
        for epoch in range(1, options.epochs + 1)
    ]
    # The first epoch's workers were forked before there were gradients and the optimiser's momentum.
    grown = epochs[-1] / epochs[1] - 1
    print(f"MiB by epoch: {', '.join(f'{m:.0f}' for m in epochs)}; from the second on {grown:+.1%}")
    result = {
        "classes": options.classes,
        "pictures": options.per_class * options.classes,
        "same_batches": len(set(digests)) == 1,
        "growth": grown,
        "memory": memory.records,
    }
    if options.out is not None:
        write_atomically(options.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
