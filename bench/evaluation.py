"""AutoAttack by pyautoattack, by fastadv in float32 and by fastadv on its engine: seconds, and what each finds.

    python bench/evaluation.py                              200 test images of digits
    python bench/evaluation.py --data cifar10 --root DATA   200 test images of CIFAR-10
    python bench/evaluation.py --run RUN                    a network of yours: a run directory or a checkpoint
    python bench/evaluation.py --weights FILE               a ResNet-18 of yours
    python bench/evaluation.py --attacks apgd-ce apgd-t     without the attacks that the reference runs for all
    python bench/evaluation.py --quick                      one epoch, 16 images, Auto-PGD alone: does it run

Without --run a network is first trained by PGD-AT, with the recipe of `methods.py`. All searches run in this
process. The images are split into parts. Each part is searched by all before the next is, each time in another
order. Parts should have several batches, as the pool of fastadv is not full at the end of each.

An image counts as robust if the plain float32 network is right on it and on what the search returned, which must
lie in ball and bounds. Results go to bench/results.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from measure import machine, machine_line, text_table, write_json
from method_list import GROUNDS
from strength import trained_network
from torch import Tensor, nn

from fastadv.commands.judged import model_of_file
from fastadv.data import load_dataset
from fastadv.evaluation import AutoAttackResult, autoattack
from fastadv.evaluation.context import evaluation_mode
from fastadv.evaluation.verify import Audit, predict
from fastadv.trainers import load_model

RESULTS = Path(__file__).parent / "results"
SEARCHES = {"pyautoattack": "reference", "fastadv float32": "fp32", "fastadv engine": "auto"}


@dataclass(frozen=True)
class Found:
    """What one search found on n images.

    Attributes:
        search: its name.
        ran: what the search says that it ran in.
        seconds: of all parts.
        parts: seconds of each part.
        stages: for each attack, seconds and images left.
        refined: images found by float32 steps after a narrower search, and the seconds of these steps.
        robust: images left.
        alone: images that no other search has broken.
    """

    search: str
    ran: str
    n: int
    seconds: float
    parts: list[float]
    stages: dict[str, dict[str, float]]
    refined: int
    refinement_seconds: float
    robust: int
    alone: int


def search_all(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    parts: int,
    settings: dict[str, Any],
    names: list[str],
) -> dict[str, list[tuple[float, AutoAttackResult]]]:
    """Seconds and result of every search on every part."""
    results: dict[str, list[tuple[float, AutoAttackResult]]] = {name: [] for name in names}
    for number, rows in enumerate(torch.arange(len(x)).chunk(parts)):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            begun = time.perf_counter()
            found = autoattack(model, (x[rows], y[rows]), engine=SEARCHES[name], **settings)
            results[name].append((time.perf_counter() - begun, found))
            check(model, x[rows], y[rows], found, settings)
    return results


def check(
    model: nn.Module, x: Tensor, y: Tensor, found: AutoAttackResult, settings: dict[str, Any]
) -> None:
    """Hold what a search claims against the plain network.

    Raises:
        RuntimeError: an image is outside ball or bounds, or is classified correctly.
    """
    if not len(found.fooled):
        return
    rows, adv = found.fooled.to(x.device), found.adversarial.to(x.device)
    audit = Audit(settings["eps"], settings["norm"], (0.0, 1.0))
    if not audit.check(x[rows], adv).all() or bool((predict(model, adv) == y[rows]).any()):
        raise RuntimeError(f"a search returned images that are not adversarial; {audit.problems()}")


def summary_of(results: dict[str, list[tuple[float, AutoAttackResult]]]) -> list[Found]:
    """The searches side by side."""
    robust = {
        name: torch.cat([found.robust for _, found in parts]) for name, parts in results.items()
    }
    rows = []
    for name, parts in results.items():
        others = torch.stack([flags for other, flags in robust.items() if other != name])
        stages: dict[str, dict[str, float]] = {}
        for _, found in parts:
            for stage in found.stages:
                entry = stages.setdefault(stage.name, {"seconds": 0.0, "left": 0})
                entry["seconds"] += stage.seconds
                entry["left"] += stage.correct
        every = [stage for _, found in parts for stage in found.stages]
        seconds = [seconds for seconds, _ in parts]
        rows.append(
            Found(
                name,
                parts[0][1].search,
                len(robust[name]),
                sum(seconds),
                seconds,
                stages,
                sum(stage.refined for stage in every),
                sum(stage.refinement_seconds for stage in every),
                int(robust[name].sum()),
                int((~robust[name] & others.all(0)).sum()),
            )
        )
    return rows


def table_of(rows: list[Found]) -> str:
    """As text."""
    header = ["search", "ran in", "seconds", "times as fast", "robust %", "found alone"]
    lines = []
    for row in rows:
        speed = f"{rows[0].seconds / row.seconds:.2f}"
        accuracy = f"{100 * row.robust / row.n:.2f}"
        lines.append([row.search, row.ran, f"{row.seconds:.1f}", speed, accuracy, str(row.alone)])
    text = text_table(header, lines)
    for row in rows:
        stages = (
            f"{name} {entry['seconds']:.1f} s, {entry['left']} left"
            for name, entry in row.stages.items()
        )
        text += f"\n{row.search}: {'; '.join(stages)}"
        if row.refinement_seconds:
            text += f"; float32 steps found {row.refined} in {row.refinement_seconds:.1f} s"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", choices=GROUNDS, default="digits")
    parser.add_argument("--root", type=Path, help="folder of the data set's files")
    parser.add_argument("--run", type=Path, help="run directory or checkpoint of the network")
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
        help="what is compared, the first with the others",
    )
    parser.add_argument("--norm", choices=("linf", "l2", "l1"), default="linf")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", help="added to the name of the results' file")
    parser.add_argument("--eps", type=float, help="by default the radius of the data set")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument(
        "--out", type=Path, help="folder; by default bench/results, not with --quick"
    )
    options = parser.parse_args()
    ground = GROUNDS[options.data]
    data = load_dataset(ground.data, options.root)
    if options.weights is not None:
        model = model_of_file("resnet18", str(options.weights), None, data.test).model
    elif options.run is None:
        model = trained_network(ground, data, 1 if options.quick else None)
    else:
        model = load_model(options.run)
    count = 16 if options.quick else options.images
    attacks = options.attacks or (["apgd-ce", "apgd-t"] if options.quick else "standard")
    settings = {
        "eps": ground.eps if options.eps is None else options.eps,
        "norm": options.norm,
        "version": attacks,
        "batch_size": options.batch,
        "seed": options.seed,
    }
    with evaluation_mode(model, options.device) as device:
        x = (data.test.images[:count].float() / 255).to(device)
        y = data.test.labels[:count].to(device)
        # So that no search pays for what a process does once.
        for engine in (SEARCHES[name] for name in options.searches):
            autoattack(model, (x[:2], y[:2]), engine=engine, **{**settings, "version": ["apgd-ce"]})
        rows = summary_of(search_all(model, x, y, options.parts, settings, options.searches))
    facts = machine(device)
    given = options.weights or options.run
    source = "PGD-AT as in methods.py" if given is None else given.name
    network = f"{type(model).__name__} from {source}"
    print(f"{ground.data}, {network}, {options.norm} {settings['eps']:.3g}, {len(x)} test images")
    print(f"{machine_line(facts)}\n")
    print(table_of(rows))
    out = options.out or (None if options.quick else RESULTS)
    if out is not None:
        content = {
            "machine": facts,
            "data": ground.data,
            "network": network,
            "settings": settings,
            "results": [asdict(row) for row in rows],
        }
        name = f"evaluation_{ground.data}" + (f"_{options.name}" if options.name else "")
        write_json(out / f"{name}.json", content)


if __name__ == "__main__":
    main()
