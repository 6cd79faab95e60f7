"""Whether attacks in bfloat16 are as strong: robust accuracy by the engine and by attacks in plain float32.

    python bench/strength.py                              the 500 test images of digits, 3 seeds; a minute
    python bench/strength.py --data cifar10 --root DATA   500 test images of CIFAR-10; six minutes
    python bench/strength.py --run RUN                    a network of yours: a run directory or a checkpoint
    python bench/strength.py --quick                      one epoch, 60 images, one seed: does it run

Without --run a network is first trained by PGD-AT, with the recipe of `methods.py`. PGD-20 by the engine is
compared with the loop of papers in float32, from the same start points, so that nothing but the arithmetic of the
gradients differs. APGD-CE (100 steps) is compared with pyautoattack's, whose random start is another; so fastadv's
in float32 is compared as well, which shows the effect of start points and implementation alone.

An image counts as robust if the float32 network is right on it and on the attack's result, which must lie in
ball and bounds. The aim is that robust accuracies differ by at most 0.3 points. With n images one image is 100 / n
points, and other start points may change the reference itself by more than the aim: so its range over the seeds is
given. Two attacks may also break different images and still come to one number: so the table tells how many either
alone has broken, and the probability p that they would fall so unevenly if both were equally strong (the exact
McNemar test; with few such images p is never small, which proves nothing). Results go to bench/results.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measure import machine, machine_line, text_table, write_json
from method_list import ENTRIES, GROUNDS, Ground
from torch import Tensor, nn

import fastadv
from fastadv.data import Splits, load_dataset
from fastadv.evaluation import autoattack
from fastadv.evaluation.context import evaluation_mode
from fastadv.evaluation.verify import Audit, predict
from fastadv.ops import random_start
from fastadv.trainers import load_model, train

RESULTS = Path(__file__).parent / "results"
AIM = 0.3  # points
BATCH = 256
PGD_STEPS, APGD_STEPS = 20, 100
# From images, labels and start points to adversarial images.
Attack = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Pair:
    """One attack by the engine and by its reference, with one seed.

    Attributes:
        attack: name of the attack.
        seed: seed of the attack's random numbers.
        n: number of images.
        engine: number of images that are robust under the engine's attack.
        reference: number of images that are robust under the reference's attack.
        engine_alone: number of images that only the engine's attack breaks.
        reference_alone: number of images that only the reference's attack breaks.
        ran: the engine that the attack reports.
    """

    attack: str
    seed: int
    n: int
    engine: int
    reference: int
    engine_alone: int
    reference_alone: int
    ran: str

    @property
    def difference(self) -> float:
        """Robust accuracy by the engine minus the reference's, in points: positive if the engine is weaker."""
        return 100 * (self.engine - self.reference) / self.n

    @property
    def p(self) -> float:
        """p-value of the exact McNemar test on the images that only one of the two attacks breaks."""
        return split_probability(self.engine_alone, self.reference_alone)

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "difference_points": self.difference, "mcnemar_p": self.p}


def split_probability(a: int, b: int) -> float:
    """Two-sided probability that a + b tosses of a fair coin split at least as unevenly as a to b."""
    tail = sum(math.comb(a + b, i) for i in range(min(a, b) + 1))
    return min(1.0, 2 * tail / 2 ** (a + b))


def plain_pgd(
    model: nn.Module, x: Tensor, y: Tensor, start: Tensor, eps: float, alpha: float
) -> Tensor:
    """PGD in l-infinity as papers print it, in float32."""
    adv = start.clone()
    for _ in range(PGD_STEPS):
        adv.requires_grad_()
        loss = F.cross_entropy(model(adv), y, reduction="sum")
        (grad,) = torch.autograd.grad(loss, adv)
        moved = adv.detach() + alpha * grad.sign()
        adv = torch.clamp(torch.clamp(moved, x - eps, x + eps), 0, 1)
    return adv


def robust_under(
    attack: Attack, model: nn.Module, x: Tensor, y: Tensor, starts: Tensor, eps: float
) -> Tensor:
    """Which images the float32 network gets right, clean and attacked, [N] bool.

    Raises:
        RuntimeError: the attack left ball or bounds.
    """
    audit, found = Audit(eps, "linf", (0.0, 1.0)), []
    for images, labels, start in zip(
        x.split(BATCH), y.split(BATCH), starts.split(BATCH), strict=True
    ):
        adv = attack(images, labels, start)
        audit.check(images, adv)
        found.append((predict(model, images) == labels) & (predict(model, adv) == labels))
    if problems := audit.problems():
        raise RuntimeError(f"the attack returned {'; '.join(problems)}")
    return torch.cat(found)


def compare(
    model: nn.Module, x: Tensor, y: Tensor, eps: float, seed: int, precision: str
) -> list[Pair]:
    """Both attacks, by the engine and by their references, with one seed."""
    n, alpha = len(x), eps / 4
    starts = random_start(x, eps, seed=seed)
    pgd = fastadv.PGD(model, eps, alpha, PGD_STEPS, precision=precision)
    apgd = fastadv.APGD(model, eps, APGD_STEPS, seed=seed, precision=precision)
    wide = fastadv.APGD(model, eps, APGD_STEPS, seed=seed, precision="fp32")

    def robust(attack: Attack) -> Tensor:
        return robust_under(attack, model, x, y, starts, eps).cpu()

    by_pgd = robust(lambda x, y, start: pgd(x, y, start=start))
    by_loop = robust(lambda x, y, start: plain_pgd(model, x, y, start, eps, alpha))
    by_apgd = robust(lambda x, y, _: apgd(x, y))
    by_wide = robust(lambda x, y, _: wide(x, y))
    by_library = autoattack(
        model,
        (x, y),
        eps=eps,
        version=["apgd-ce"],
        batch_size=BATCH,
        seed=seed,
        engine="reference",
    ).robust
    pairs = []
    for name, attack, ours, theirs in (
        (f"PGD-{PGD_STEPS}", pgd, by_pgd, by_loop),
        ("APGD-CE", apgd, by_apgd, by_library),
        ("APGD-CE in float32", wide, by_wide, by_library),
    ):
        ran = f"{attack.last.engine} engine, {attack.last.precision}: {attack.last.reason}"
        counts = [int(c.sum()) for c in (ours, theirs, ~ours & theirs, ours & ~theirs)]
        pairs.append(Pair(name, seed, n, *counts, ran))
    return pairs


def trained_network(ground: Ground, data: Splits, epochs: int | None) -> nn.Module:
    """A network trained by PGD-AT with the recipe of `methods.py`; `epochs` replaces the recipe's number."""
    (entry,) = (entry for entry in ENTRIES if entry.label == "PGD-AT")
    recipe = entry.recipe(ground, seed=0)
    if epochs is not None:
        recipe = replace(recipe, epochs=epochs)
    with tempfile.TemporaryDirectory() as folder:
        result = train(
            entry.method, recipe, data=data, model=entry.model, run_dir=folder, progress=False
        )
    return result.model


def rows_of(pairs: list[Pair]) -> list[list[str]]:
    """The rows of the printed table, header first."""
    header = ["attack", "seed", "fastadv %", "reference %", "difference"]
    header += ["fastadv alone broke", "reference alone broke", "p"]
    rows = [header]
    order = list(dict.fromkeys(pair.attack for pair in pairs))
    for pair in sorted(pairs, key=lambda pair: order.index(pair.attack)):
        accuracies = [f"{100 * count / pair.n:.2f}" for count in (pair.engine, pair.reference)]
        alone = [str(pair.engine_alone), str(pair.reference_alone)]
        row = [pair.attack, str(pair.seed), *accuracies, f"{pair.difference:+.2f}"]
        rows.append([*row, *alone, f"{pair.p:.2f}"])
    return rows


def summary_of(pairs: list[Pair]) -> dict[str, dict[str, Any]]:
    """For each attack: mean and largest difference, and the range of the reference over its seeds, in points."""
    summary: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(pair.attack for pair in pairs):
        mine = [pair for pair in pairs if pair.attack == name]
        mean = statistics.mean(pair.difference for pair in mine)
        largest = max((pair.difference for pair in mine), key=abs)
        references = [100 * pair.reference / pair.n for pair in mine]
        summary[name] = {
            "mean_difference_points": mean,
            "largest_difference_points": largest,
            "reference_range_points": max(references) - min(references),
            "mean_within_aim": abs(mean) <= AIM,
            "every_seed_within_aim": abs(largest) <= AIM,
        }
    return summary


def print_summary(summary: dict[str, dict[str, Any]]) -> None:
    """Print one line for each attack: whether its differences lie within the aim."""
    met = ["missed", "met"]
    for name, found in summary.items():
        mean, largest = found["mean_difference_points"], found["largest_difference_points"]
        print(
            f"{name}: mean {mean:+.2f} (aim {met[found['mean_within_aim']]}), largest {largest:+.2f} "
            f"({met[found['every_seed_within_aim']]}); the reference's seeds differ by up to "
            f"{found['reference_range_points']:.2f}."
        )


def parsed_options() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", choices=GROUNDS, default="digits")
    parser.add_argument("--root", type=Path, help="folder of the data set's files")
    parser.add_argument("--run", type=Path, help="run directory or checkpoint of the network")
    parser.add_argument("--images", type=int, default=500, help="test images")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--precision", choices=("bf16", "fp16", "fp32"), default="bf16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument(
        "--out", type=Path, help="folder; by default bench/results, not with --quick"
    )
    return parser.parse_args()


def main() -> None:
    options = parsed_options()
    ground, began = GROUNDS[options.data], time.perf_counter()
    data = load_dataset(ground.data, options.root)
    if options.run is None:
        model = trained_network(ground, data, 1 if options.quick else None)
    else:
        model = load_model(options.run)
    count = 60 if options.quick else options.images
    pairs = []
    with evaluation_mode(model, options.device) as device:
        x = (data.test.images[:count].float() / 255).to(device)
        y = data.test.labels[:count].to(device)
        clean = 100 * float((predict(model, x) == y).float().mean())
        for seed in range(1 if options.quick else options.seeds):
            pairs += compare(model, x, y, ground.eps, seed, options.precision)
    facts, summary, rows = machine(device), summary_of(pairs), rows_of(pairs)
    source = "PGD-AT as in methods.py" if options.run is None else options.run.name
    network = f"{type(model).__name__} from {source}"
    print(
        f"{ground.data}, {network}, eps {ground.eps:.3g}, {len(x)} test images, clean {clean:.2f} %"
    )
    print(f"{machine_line(facts)}; {time.perf_counter() - began:.0f} s in all.\n")
    print(text_table(rows[0], rows[1:]))
    print(f"\nOne image is {100 / len(x):.2f} points; the aim is {AIM}.")
    print_summary(summary)
    out = options.out or (None if options.quick else RESULTS)
    if out is not None:
        content = {
            "machine": facts,
            "data": ground.data,
            "network": network,
            "eps": ground.eps,
            "images": len(x),
            "clean_accuracy_percent": clean,
            "points_per_image": 100 / len(x),
            "aim_points": AIM,
            "summary": summary,
            "results": [pair.to_dict() for pair in pairs],
        }
        write_json(out / f"strength_{ground.data}.json", content)


if __name__ == "__main__":
    main()
