"""Whether fastadv's default attack is ever slower than a user's own eager loop in the same precision.

    python bench/architecture_speed.py                        about 40 networks; 10 to 15 minutes on 2 quiet cores
    python bench/architecture_speed.py --only 'vit|convnext'  names in which the regular expression is found
    python bench/architecture_speed.py --estimate             the names and an estimate of the time, and no run

A row is the time of one PGD call (--steps 3, --images 8) of `fastadv.PGD` as it comes, and of the same steps
written by hand around the network, its weights frozen: under autocast to bfloat16, channels-last, where the
processor multiplies bfloat16 fast. Elsewhere they run in float32, channels-last and contiguous, and the faster of
these two counts. All run by turns in one process, and the ratio is the ratio of the medians: above 1 fastadv is
faster. Every call of fastadv includes its
proof that the copy is right. Weights are random, which no time depends on. Weights that a network starts at 0 are
drawn too, because a network without gradients is attacked by nobody.

Each network has a process of its own, with limits of time and memory. Its row is written at once to
architectures_speed_DEVICE.json in --out, where the loops run in float32 to architectures_speed_DEVICE_fp32.json.
Finished networks are not run again unless --again is given. The table is written to the .md beside it. Nothing
else may run meanwhile. Packages: timm, torchvision.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from architecture_list import SPEED, build
from architectures import RESULTS, Stopped, apart, machine_facts
from measure import interleave, machine_line, text_table, time_once, write_json
from torch import Tensor, nn

from fastadv.engine.precision import fast_bf16
from fastadv.files import write_atomically

EPS, ALPHA = 8 / 255, 2 / 255
LEAST = 0.97  # of the ratio
HEADER = ["network", "ratio", "fastadv ms", "plain ms", "engine", "precision", "first call s"]
_SECONDS_OF_ONE = 17  # of two cores of an Intel Xeon with AMX, with the start of its process
Row = dict[str, Any]


def drawn(model: nn.Module) -> nn.Module:
    """Draw the weights that a network starts at 0, such as those of some classifiers."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and not parameter.any():
                parameter.normal_(std=0.02)
    return model


def plain_loop(
    name: str, x: Tensor, y: Tensor, steps: int, layout: torch.memory_format, narrow: bool
) -> Callable[[], Tensor]:
    """The attack as a plain loop on a network of its own, in one memory layout, under autocast if `narrow`."""
    from arrangements import attack_loop

    own = drawn(build(name).model.eval()).requires_grad_(False).to(memory_format=layout)
    laid_out = x.contiguous(memory_format=layout)

    def forward(batch: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            return own(batch)

    return lambda: attack_loop(forward, laid_out, y, steps)


def timed(
    name: str, images: int, steps: int, rounds: int, threads: int, tell: Callable[[str], None]
) -> Row:
    """One network's row."""
    import fastadv

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    cpu = torch.device("cpu")
    tell("building")
    built = build(name)
    model = drawn(built.model.eval())
    x = torch.rand(images, 3, built.size, built.size)
    y = torch.arange(images) % 2
    tell("the plain loop")
    narrow = fast_bf16(cpu)
    loops = {"channels-last": plain_loop(name, x, y, steps, torch.channels_last, narrow)}
    if not narrow:
        loops["contiguous"] = plain_loop(name, x, y, steps, torch.contiguous_format, narrow)
    for loop in loops.values():
        loop()
    tell("the attack")
    attack = fastadv.PGD(model, EPS, ALPHA, steps)
    first = time_once(lambda: attack(x, y), cpu)
    attack(x, y)  # its memory is new in the first
    tell("rounds")
    times = interleave({**loops, "fastadv": lambda: attack(x, y)}, rounds, cpu)
    layout = min(loops, key=lambda one: times[one].median)
    report = attack.last
    return {
        "size": built.size,
        "images": images,
        "steps": steps,
        "ratio": times[layout].median / times["fastadv"].median,
        "fastadv": times["fastadv"].to_dict(),
        "plain": times[layout].to_dict(),
        "plain_precision": "bf16" if narrow else "fp32",
        "plain_layout": layout,
        "engine": report.engine,
        "precision": report.precision,
        "reason": report.reason,
        "first_call_seconds": first,
    }


def row_of(name: str, options: argparse.Namespace) -> Row:
    """A row, whatever happens to its process."""
    work = partial(timed, name, options.images, options.steps, options.rounds, options.threads)
    try:
        return apart(work, options.seconds, int(options.memory * 2**30))
    except Stopped as stopped:
        return {"note": f"{stopped}, at: {stopped.stage}"}


def cells_of(name: str, row: Row) -> list[str]:
    """A row's cells, as under `HEADER`."""
    if "ratio" not in row:
        return [name, "not run", "-", "-", "-", "-", "-"]
    return [
        name,
        f"{row['ratio']:.2f}",
        f"{1e3 * row['fastadv']['median']:.0f}",
        f"{1e3 * row['plain']['median']:.0f}",
        row["engine"],
        row["precision"],
        f"{row['first_call_seconds']:.1f}",
    ]


def summary(rows: Mapping[str, Row]) -> str:
    """One sentence: the number of networks, and the names of those that are slower than they may be."""
    ratios = {name: row["ratio"] for name, row in rows.items() if "ratio" in row}
    if not ratios:
        return "no network was timed"
    slow = [
        f"{name} {ratio:.2f}"
        for name, ratio in sorted(ratios.items(), key=lambda pair: pair[1])
        if ratio < LEAST
    ]
    middle = median(ratios.values())
    text = f"{len(ratios)} networks, ratio {min(ratios.values()):.2f} to {max(ratios.values()):.2f}"
    return (
        f"{text}, median {middle:.2f}; below {LEAST}: {', '.join(slow) if slow else 'no network'}"
    )


def markdown(rows: Mapping[str, Row], facts: Mapping[str, Any]) -> str:
    """The table, the slowest ratio first."""
    plain = "under eager bfloat16 autocast, channels-last"
    if not fast_bf16(torch.device("cpu")):
        plain = "in eager float32, in the faster of the layouts channels-last and contiguous"
    lines = [
        f"A PGD call of fastadv against the same steps {plain}, frozen weights. Ratio "
        f"above 1: fastadv is faster. {machine_line(facts)}. {summary(rows)}.",
        "",
        f"| {' | '.join([*HEADER, 'images x steps', 'why this engine'])} |",
        f"|---|{'---:|' * 3}---|---|{'---:|' * 2}---|",
    ]
    for name, row in sorted(rows.items(), key=lambda pair: pair[1].get("ratio", 0.0)):
        size = f"{row['images']} x {row['steps']}" if "ratio" in row else "-"
        remark = row.get("reason", row.get("note", "")).replace("|", "\\|")
        remark = " ".join(remark.split())
        lines.append(f"| {' | '.join([*cells_of(name, row), size, remark])} |")
    return "\n".join(lines) + "\n"


def run(options: argparse.Namespace) -> dict[str, Row]:
    """Run the chosen networks that are not there yet; all rows, old and new."""
    facts = machine_facts(options)
    narrow = "" if fast_bf16(torch.device("cpu")) else "_fp32"
    path = options.out / f"architectures_speed_{facts['device']}{narrow}.json"
    rows: dict[str, Row] = json.loads(path.read_text())["rows"] if path.exists() else {}
    names = [name for name in SPEED if re.search(options.only, name)]
    due = [name for name in names if options.again or "ratio" not in rows.get(name, {})]
    minutes = len(due) * _SECONDS_OF_ONE * (options.images * options.steps / 24) ** 0.5 / 60
    print(
        f"{len(names)} networks, {len(due)} of them to be run, about {minutes:.0f} minutes; {machine_line(facts)}"
    )
    if options.estimate:
        print("\n".join(due))
        return {}
    for number, name in enumerate(due, 1):
        began = time.perf_counter()
        rows[name] = row_of(name, options) | {"date": facts["date"], "threads": options.threads}
        write_json(path, {"machine": facts, "rows": rows})
        note = rows[name].get("note", "")
        spent = time.perf_counter() - began
        print(
            f"{number}/{len(due)}  {'  '.join(cells_of(name, rows[name]))}  {spent:.0f} s  {note}",
            flush=True,
        )
    if rows:
        write_atomically(path.with_suffix(".md"), markdown(rows, facts))
    return {name: rows[name] for name in names if name in rows}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="PATTERN", default="", help="names in which it is found")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3, help="counted calls of each")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=240, help="for one network")
    parser.add_argument("--memory", type=float, default=16, help="GiB for one network")
    parser.add_argument("--again", action="store_true", help="run also networks that have been run")
    parser.add_argument(
        "--estimate", action="store_true", help="list the networks that would be run"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.set_defaults(device="cpu")
    options = parser.parse_args()
    rows = run(options)
    if rows:
        print(text_table(HEADER, [cells_of(name, row) for name, row in rows.items()]))
        print(summary(rows))


if __name__ == "__main__":
    main()
