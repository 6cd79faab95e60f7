"""All training methods on a small network and few images: accuracy, robustness and speed, over several seeds.

    python bench/methods.py                    digits, 3 seeds, every method; under 20 minutes on 2 cores
    python bench/methods.py --quick            1 seed, every method for one epoch, no AutoAttack: does it run
    python bench/methods.py --only ARREST AFS  methods whose label contains one of these, and their teachers
    python bench/methods.py --data cifar10 --root DATA --seeds 1   on 5,000 images of CIFAR-10

Digits are the 8x8 scans that scikit-learn contains. Each network is trained by its method's own recipe with the
changes in `method_list.py`, which are not tuned, and attacked on the same test images: --images by PGD-20, the
first --autoattack-images by AutoAttack, which takes most time. So the table shows that the methods run, their
cost, and their accuracies on these images. It does not show which is better on others.

Runs are kept under --runs: a benchmark that was interrupted goes on from there. Results go to bench/results: a
JSON and the table. Each run has one thread, and --jobs of them run side by side: images/s are those of one thread.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from measure import machine, machine_line, text_table, write_json
from method_list import ENTRIES, GROUNDS, Entry, Ground
from torch import nn

from fastadv.data import Splits, load_dataset
from fastadv.evaluation import Report, cosine_similarity_to, evaluate, trade_off_sum
from fastadv.files import write_atomically
from fastadv.trainers import load_model, train
from fastadv.trainers.logs import read_records

RESULTS = Path(__file__).parent / "results"
ATTACKS = ("clean", "pgd-20", "autoattack")
_BY_LABEL = {entry.label: entry for entry in ENTRIES}


def chosen(parts: Sequence[str] | None) -> list[Entry]:
    """The entries to run, each after those it builds on."""
    wanted = [e for e in ENTRIES if not parts or any(part in e.label for part in parts)]
    if not wanted:
        raise SystemExit(
            f"--only must be part of {', '.join(_BY_LABEL)}; got {' '.join(parts or [])}"
        )
    needed = {teacher for entry in wanted for teacher in entry.teachers} | {"standard"}
    labels = {entry.label for entry in wanted} | needed
    return sorted((e for e in ENTRIES if e.label in labels), key=lambda e: bool(e.teachers))


def run_dir(runs: Path, entry: Entry, seed: int) -> Path:
    """Where a run is kept."""
    name = "".join(c if c.isalnum() else "_" for c in entry.label.lower())
    return runs / f"{name}-{seed}"


@dataclass(frozen=True)
class Job:
    """The common settings of the runs."""

    ground: Ground
    root: Path | None
    runs: Path
    images: int  # that PGD-20 attacks
    autoattack_images: int
    quick: bool


def run_one(entry: Entry, seed: int, job: Job) -> dict[str, Any]:
    """Train one network and judge it, as far as that has not been done before."""
    torch.set_num_threads(1)
    runs, quick = job.runs, job.quick
    folder, data = run_dir(runs, entry, seed), load_dataset(job.ground.data, job.root)
    recipe = entry.recipe(job.ground, seed)
    if quick:
        changes = {"epochs": 1, "tau_epochs": ()} if entry.method == "fat" else {"epochs": 1}
        recipe = replace(recipe, **changes)
    teachers = [run_dir(runs, _BY_LABEL[label], seed) for label in entry.teachers]
    began = time.perf_counter()
    model = train(
        entry.method,
        recipe,
        data=data,
        model=entry.model,
        run_dir=folder,
        teacher=teachers or None,
        resume=True,
        device="cpu",
        progress=False,
    ).model
    trained = time.perf_counter()
    brief = quick or entry.label.startswith(".")
    parts = {("clean", "pgd-20"): job.images}
    if not brief:
        parts[("autoattack",)] = job.autoattack_images
    rows = [
        row
        for attacks, count in parts.items()
        for row in _judged(model, data, attacks, count, job.ground.eps, folder).rows
    ]
    standard = load_model(run_dir(runs, _BY_LABEL["standard"], seed))
    alike = None
    if entry.model == "small_cnn":
        alike = cosine_similarity_to(model, standard, data.test, max_examples=500)
    return {
        "label": entry.label,
        "seed": seed,
        **{row.name: 100 * row.accuracy for row in rows},
        "statuses": {row.name: row.status for row in rows},
        "images": {row.name: row.n for row in rows},
        "images_per_second": _training_rate(folder, recipe.batch_size),
        "cosine_to_standard": alike,
        "seconds": {"train": trained - began, "judge": time.perf_counter() - trained},
    }


def _judged(
    model: nn.Module, data: Splits, attacks: tuple[str, ...], count: int, eps: float, folder: Path
) -> Report:
    """A report on the first `count` test images, from the run's folder if it is there."""
    file = folder / f"eval_{attacks[-1]}.json"
    if file.is_file():
        kept = Report.load(file)
        if kept.rows[0].n == count:
            return kept
    report = evaluate(model, data.test, attacks, eps=eps, max_examples=count, progress=False)
    report.save(file)
    return report


def _training_rate(folder: Path, batch_size: int) -> float:
    """Images per second of the training steps alone, over the whole run."""
    epochs = [r for r in read_records(folder / "metrics.jsonl") if r["kind"] == "epoch"]
    seconds = sum(v for r in epochs for name, v in r.items() if name.startswith("seconds_"))
    return epochs[-1]["step"] * batch_size / seconds


def run_all(entries: list[Entry], seeds: range, job: Job, workers: int) -> list[dict[str, Any]]:
    """Run every entry with every seed, those that others build on first."""
    found = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context) as pool:
        for stage in (False, True):
            tasks = [
                pool.submit(run_one, entry, seed, job)
                for entry in entries
                if bool(entry.teachers) == stage
                for seed in seeds
            ]
            for task in tasks:
                result = task.result()
                found.append(result)
                numbers = ", ".join(f"{n} {result[n]:.0f} %" for n in ATTACKS if n in result)
                print(f"{result['label']}, seed {result['seed']}: {numbers}", flush=True)
    return found


def rows_of(results: list[dict[str, Any]]) -> list[list[str]]:
    """The lines of the table, header first."""
    header = [
        "method",
        "clean %",
        "PGD-20 %",
        "AutoAttack %",
        "clean + PGD-20",
        "cosine",
        "images/s",
    ]
    rows = [header]
    for entry in ENTRIES:
        mine = [r for r in results if r["label"] == entry.label]
        if entry.label.startswith(".") or not mine:
            continue
        cells = [_spread([r.get(name) for r in mine]) for name in ATTACKS]
        # Of PGD-20: AutoAttack has other, fewer images than the clean accuracy.
        sums = [trade_off_sum(r["clean"], r["pgd-20"]) for r in mine]
        cosine = _spread([r["cosine_to_standard"] for r in mine], digits=3)
        rate = statistics.median(r["images_per_second"] for r in mine)
        rows.append([entry.label, *cells, _spread(sums), cosine, f"{rate:,.0f}"])
    return rows


def _spread(values: Sequence[float | None], digits: int = 1) -> str:
    """Mean and standard deviation, as far as there are values."""
    numbers = [value for value in values if value is not None]
    if not numbers:
        return "-"
    mean = f"{statistics.mean(numbers):.{digits}f}"
    return mean if len(numbers) == 1 else f"{mean} ± {statistics.stdev(numbers):.{digits}f}"


def _markdown(rows: list[list[str]], note: str) -> str:
    header, *rest = ("| " + " | ".join(row) + " |" for row in rows)
    rule = "|---|" + "---:|" * (len(rows[0]) - 1)
    return "\n".join([note, "", header, rule, *rest]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", choices=GROUNDS, default="digits")
    parser.add_argument("--root", type=Path, help="folder of the data set's files")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=500, help="test images for PGD-20, at most")
    parser.add_argument("--autoattack-images", type=int, default=50, help="the first so many")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    parser.add_argument("--runs", type=Path, default=Path("methods_runs"))
    parser.add_argument(
        "--out", type=Path, help="by default bench/results, and nowhere with --only"
    )
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    entries, ground = chosen(options.only), GROUNDS[options.data]
    began = time.perf_counter()
    seeds = range(1 if options.quick else options.seeds)
    runs = options.runs / (f"{ground.data}_quick" if options.quick else ground.data)
    found = len(load_dataset(ground.data, options.root).test)
    images = min(options.images, found)
    job = Job(
        ground, options.root, runs, images, min(options.autoattack_images, found), options.quick
    )
    results = run_all(entries, seeds, job, options.jobs)
    rows = rows_of(results)
    facts = machine(torch.device("cpu"))
    note = (
        f"{ground.data}, small CNN, eps {ground.eps:.3g}, {len(seeds)} seeds (mean ± standard deviation), "
        f"{images} test images, AutoAttack the first {job.autoattack_images} of them; "
        f"{machine_line(facts)}, a run on each; {time.perf_counter() - began:.0f} s in all."
    )
    print()
    print(note)
    print(text_table(rows[0], rows[1:]))
    out = options.out or (None if options.quick or options.only else RESULTS)
    if out is not None:
        name = f"methods_{ground.data}"
        write_json(out / f"{name}.json", {"machine": facts, "results": results})
        write_atomically(out / f"{name}.md", _markdown(rows, note))


if __name__ == "__main__":
    main()
