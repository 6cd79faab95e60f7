"""Memory of an evaluation of more images than any memory holds: each is made from its index.

    python bench/many_images.py                        100,000 images of 3x224x224, 15 GB; about a minute
    python bench/many_images.py --count 1000000        150 GB

The model only looks at ten pixels, so that reading is all the work. The peak is the peak of this process, when
its buffers are full and at the end. Results go to bench/results/many_images.json.
"""

from __future__ import annotations

import argparse
import resource
import time
import warnings
from pathlib import Path

import torch
from measure import machine, machine_line, write_json
from throughput import RESULTS, say
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastadv import evaluate
from fastadv.data import item_reader


class GeneratedImages(Dataset[tuple[Tensor, int]]):
    """Images uint8 [3, 224, 224], whose labels are known without reading them."""

    def __init__(self, count: int) -> None:
        self.targets = torch.arange(count) % 10

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full((3, 224, 224), index % 256, dtype=torch.uint8), index % 10


def peak_mib() -> float:
    """The most that this process has held at any time, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def judge(count: int, workers: int) -> float:
    """Evaluate on so many images: the seconds that it takes."""
    loader = DataLoader(GeneratedImages(count), num_workers=workers)
    start = time.perf_counter()
    evaluate(lambda x: x.flatten(1)[:, :10], loader, ["clean"], progress=False)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=100_000, help="number of images")
    parser.add_argument("--workers", type=int, default=0, help="processes that read")
    parser.add_argument("--cache", type=int, default=512, help="MiB of images that are kept")
    parser.add_argument(
        "--few", type=int, default=12_000, help="images until all buffers are there"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="the model is right on")
    item_reader.CACHE_BYTES = options.cache * 2**20
    judge(options.few, options.workers)
    before = peak_mib()
    seconds = judge(options.count, options.workers)
    facts = machine(torch.device("cpu"))
    result = {
        "machine": facts,
        "images": options.count,
        "megabytes": options.count * 3 * 224 * 224 / 1e6,
        "workers": options.workers,
        "cache_mib": options.cache,
        "images_before": options.few,
        "peak_mib_before": before,
        "peak_mib": peak_mib(),
        "seconds": seconds,
    }
    write_json(options.out / "many_images.json", result)
    say(machine_line(facts))
    say(
        f"{options.count} images, {result['megabytes']:.0f} MB, in {seconds:.0f} s: peak {peak_mib():.0f} MiB, "
        f"after {options.few} images {before:.0f} MiB"
    )


if __name__ == "__main__":
    main()
