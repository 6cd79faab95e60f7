"""AutoAttack by pyautoattack, by fastadv in float32 and by fastadv on its engine: seconds, and the finds of each.

    python bench/evaluation.py                              200 test images of digits
    python bench/evaluation.py --data cifar10 --root DATA   200 test images of CIFAR-10
    python bench/evaluation.py --run RUN RUN                networks of yours: run directories or checkpoints
    python bench/evaluation.py --weights FILE               a ResNet-18 of yours
    python bench/evaluation.py --seeds 0 1 2                three times; seeds of earlier runs stay in the file
    python bench/evaluation.py --attacks apgd-ce apgd-t     without the attacks that the reference runs for all
    python bench/evaluation.py --quick                      one epoch, 16 images, Auto-PGD alone: does it run

Without --run a network is first trained by PGD-AT, with the recipe of `methods.py`. All searches run in this
process. The images are split into parts. Each part is searched by all before the next is, each time in another
order. Parts should have several batches, as the pool of fastadv is not full at the end of each.

An image counts as robust if the plain float32 network is right on it and on the image that the search returned,
which must lie in ball and bounds. "alone" counts images that one of two searches breaks and the other leaves.
Results go to bench/results: a JSON file for each network, and one table in Markdown of the networks of a call.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from evaluation_found import REFERENCE, Found, Part, table
from evaluation_table import markdown
from measure import machine, machine_line, write_json
from method_list import GROUNDS, Ground
from strength import trained_network
from torch import Tensor, nn

from fastadv.commands.judged import model_of_file
from fastadv.data import Splits, load_dataset
from fastadv.evaluation import AutoAttackResult, autoattack
from fastadv.evaluation.context import evaluation_mode
from fastadv.evaluation.verify import Audit, predict
from fastadv.trainers import load_model

RESULTS = Path(__file__).parent / "results"
SEARCHES = {REFERENCE: "reference", "fastadv float32": "fp32", "fastadv engine": "auto"}


def search_all(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    parts: int,
    settings: dict[str, Any],
    names: list[str],
) -> list[Found]:
    """Every search on every part, with one seed."""
    results: dict[str, list[Part]] = {name: [] for name in names}
    for number, rows in enumerate(torch.arange(len(x)).chunk(parts)):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            begun = time.perf_counter()
            found = autoattack(model, (x[rows], y[rows]), engine=SEARCHES[name], **settings)
            results[name].append(Part(rows, time.perf_counter() - begun, found))
            check(model, x[rows], y[rows], found, settings)
            told = ", ".join(f"{s.name} {s.seconds:.1f} s, {s.correct} left" for s in found.stages)
            print(
                f"{name}, seed {settings['seed']}, part {number + 1} of {parts}: {told}", flush=True
            )
    return [Found.of(name, settings["seed"], found) for name, found in results.items()]


def check(
    model: nn.Module, x: Tensor, y: Tensor, found: AutoAttackResult, settings: dict[str, Any]
) -> None:
    """Hold the claims of a search against the plain network.

    Raises:
        RuntimeError: an image is outside ball or bounds, or is classified correctly.
    """
    if not len(found.fooled):
        return
    rows, adv = found.fooled.to(x.device), found.adversarial.to(x.device)
    audit = Audit(settings["eps"], settings["norm"], (0.0, 1.0))
    if not audit.check(x[rows], adv).all() or bool((predict(model, adv) == y[rows]).any()):
        raise RuntimeError(f"a search returned images that are not adversarial; {audit.problems()}")


def kept(path: Path, facts: dict[str, Any], rows: list[Found]) -> list[Found]:
    """The rows of a results file that new ones do not replace, and the new ones.

    Raises:
        SystemExit: the file is of another network, of other settings or of another machine.
    """
    earlier: list[Found] = []
    if path.exists():
        old = json.loads(path.read_text())
        for name, value in facts.items():
            before, now = (_compared(one, name) for one in (old[name], value))
            if before != now:
                raise SystemExit(f"{path} has another {name}; choose another --name: {before}")
        earlier = [Found.read(row) for row in old["results"]]
    new = {(row.search, row.seed) for row in rows}
    every = [row for row in earlier if (row.search, row.seed) not in new] + rows
    return sorted(every, key=lambda row: (list(SEARCHES).index(row.search), row.seed))


def _compared(value: Any, name: str) -> Any:
    """The part of a fact that all rows of a file must share: processor and versions, if it is the machine."""
    return {key: value[key] for key in ("cpu", "packages")} if name == "machine" else value


def parsed() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", choices=GROUNDS, default="digits")
    parser.add_argument("--root", type=Path, help="folder of the data set's files")
    parser.add_argument(
        "--run", type=Path, nargs="+", default=[], help="run directories or checkpoints of networks"
    )
    parser.add_argument(
        "--model", help="network of the runs, if it is a function of yours: package.module:function"
    )
    parser.add_argument("--weights", type=Path, help="a file with the weights of a ResNet-18")
    parser.add_argument("--images", type=int, default=200, help="test images")
    parser.add_argument("--parts", type=int, default=2, help="into which they are split")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--attacks", nargs="+", help="by default the standard version")
    parser.add_argument(
        "--searches",
        nargs="+",
        choices=SEARCHES,
        default=list(SEARCHES),
        help="which of the searches to compare; pyautoattack, where it runs, with the others",
    )
    parser.add_argument("--norm", choices=("linf", "l2", "l1"), default="linf")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--name", help="added to the name of the results' file")
    parser.add_argument("--eps", type=float, help="by default the radius of the data set")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--busy", action="store_true", help="say beside the seconds that the machine has other work"
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument(
        "--out", type=Path, help="folder; by default bench/results, not with --quick"
    )
    options = parser.parse_args()
    if len({run.name for run in options.run}) < len(options.run):
        raise SystemExit("--run needs folders of different names")
    return options


def main() -> None:
    options = parsed()
    ground = GROUNDS[options.data]
    data = load_dataset(ground.data, options.root)
    out = options.out or (None if options.quick else RESULTS)
    files = []
    for suffix, network, model in networks(options, ground, data):
        words = [f"evaluation_{ground.data}", options.name, suffix]
        path = None if out is None else out / ("_".join(filter(None, words)) + ".json")
        compare(options, data, ground.eps, model, network, path)
        files += [] if path is None else [path]
    if files:
        name = "_".join(filter(None, [f"evaluation_{ground.data}", options.name]))
        (files[0].parent / f"{name}.md").write_text(
            markdown([json.loads(f.read_text()) for f in files])
        )


def networks(
    options: argparse.Namespace, ground: Ground, data: Splits
) -> Iterator[tuple[str, str, nn.Module]]:
    """Each network after the suffix of its result file and its description."""
    if options.weights is not None:
        model = model_of_file("resnet18", str(options.weights), None, data.test).model
        yield "", f"{type(model).__name__} from {options.weights.name}", model
    elif not options.run:
        model = trained_network(ground, data, 1 if options.quick else None)
        yield "", f"{type(model).__name__} from PGD-AT as in methods.py", model
    for run in options.run:
        model = load_model(run, options.model)
        suffix = run.name if len(options.run) > 1 else ""
        yield suffix, f"{type(model).__name__} from {run.name}", model


def compare(
    options: argparse.Namespace,
    data: Splits,
    radius: float,
    model: nn.Module,
    network: str,
    path: Path | None,
) -> None:
    """All searches with all seeds on one network; results go to a file, if to any."""
    searches = [search for search in SEARCHES if search in options.searches]
    count = 16 if options.quick else options.images
    attacks = options.attacks or (["apgd-ce", "apgd-t"] if options.quick else "standard")
    settings = {
        "eps": radius if options.eps is None else options.eps,
        "norm": options.norm,
        "version": attacks,
        "batch_size": options.batch,
    }
    with evaluation_mode(model, options.device) as device:
        facts = {
            "machine": machine(device),
            "data": options.data,
            "network": network,
            "settings": settings,
            "images": count,
        }
        print(
            f"{options.data}, {network}, {options.norm} {settings['eps']:.3g}, {count} test images"
        )
        print(f"{machine_line(facts['machine'])}\n", flush=True)
        x = (data.test.images[:count].float() / 255).to(device)
        y = data.test.labels[:count].to(device)
        # So that no search pays for the first call of a process.
        for search in searches:
            engine = SEARCHES[search]
            autoattack(model, (x[:2], y[:2]), engine=engine, **{**settings, "version": ["apgd-ce"]})
        rows: list[Found] = []
        for seed in options.seeds:
            seeded = {**settings, "seed": seed}
            rows += search_all(model, x, y, options.parts, seeded, searches)
            every = rows
            if path is not None:
                every = kept(path, facts, rows)
                busy = {"busy": True} if options.busy else {}
                write_json(path, {**facts, **busy, "results": [row.to_dict() for row in every]})
    print(f"\n{table(every)}\n")


if __name__ == "__main__":
    main()
