"""PGD-3 on networks of ImageNet's size: fastadv's engine, bfloat16 autocast, and torch.compile of it.

    python bench/imagenet_nets_speed.py                             all networks of imagenet_nets.py; 8 images
    python bench/imagenet_nets_speed.py --only convnext_t --compile
    python bench/imagenet_nets_speed.py --threads 1 --cpu-time      on a busy machine: the best CPU time of each

The arrangements are those of `throughput.py`, with frozen weights, interleaved in one process. The ratio is the
arrangement's time by fastadv's. Results go to bench/results/imagenet_nets_speed.json.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import imagenet_nets
import torch
from arrangements import Run, Task, autocast_loop, compiled_autocast_loop, fastadv_pgd
from measure import Seconds, interleave, machine, machine_line, text_table, write_json

CPU = torch.device("cpu")
OURS = "fastadv"


def cpu_seconds(runs: dict[str, Run], rounds: int) -> dict[str, Seconds]:
    """The CPU time of this thread for each, interleaved."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.thread_time()
            run()
            times[name].append(time.thread_time() - start)
    return {name: Seconds.of(values) for name, values in times.items()}


def seconds_of(name: str, args: Any) -> dict[str, Seconds]:
    """Seconds of one attack by arrangement."""
    model = imagenet_nets.build(name).requires_grad_(False)
    x, y = torch.rand(args.batch, 3, 224, 224), torch.randint(0, 1000, (args.batch,))
    task = Task(model, x, y, args.steps)
    runs: dict[str, Run] = {OURS: fastadv_pgd(task), "autocast": autocast_loop(task)}
    if args.compile:
        runs["compiled autocast"] = compiled_autocast_loop(task)
    for run in runs.values():
        run()
    if args.cpu_time:
        return cpu_seconds(runs, args.rounds)
    return interleave(runs, args.rounds, CPU)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=imagenet_nets.NETWORKS, metavar="NETWORK")
    parser.add_argument("--batch", type=int, default=8, help="images")
    parser.add_argument("--steps", type=int, default=3, help="attack steps")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compile", action="store_true", help="torch.compile as well: minutes")
    parser.add_argument("--cpu-time", action="store_true", help="for one thread, on a busy machine")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    if args.cpu_time and args.threads != 1:
        parser.error("--cpu-time counts one thread: add --threads 1")
    torch.set_num_threads(args.threads)
    facts = machine(CPU)
    print(machine_line(facts), flush=True)
    counted = "smallest" if args.cpu_time else "median"
    found: dict[str, dict[str, float]] = {}
    spread: dict[str, dict[str, dict[str, float]]] = {}
    for name in args.only or imagenet_nets.NETWORKS:
        torch._dynamo.reset()
        times = seconds_of(name, args)
        spread[name] = {other: seconds.to_dict() for other, seconds in times.items()}
        found[name] = seconds = {other: own[counted] for other, own in spread[name].items()}
        ratios = ", ".join(
            f"{other} {value / seconds[OURS]:.2f}x" for other, value in seconds.items()
        )
        own = times[OURS]
        extent = f"({own.smallest:.3f} to {own.largest:.3f})"
        print(f"{name}: {seconds[OURS]:.3f} s {extent}; {ratios}", flush=True)
        options = {key: str(value) for key, value in vars(args).items() if key != "out"}
        content = {"machine": facts, "options": options, "seconds": found, "spread": spread}
        write_json(args.out / "imagenet_nets_speed.json", content)
    others = [key for key in next(iter(found.values())) if key != OURS]
    rows = [
        [name, f"{s[OURS]:.3f}", *(f"{s[key] / s[OURS]:.2f}x" for key in others)]
        for name, s in found.items()
    ]
    print(text_table(["PGD", "seconds", *others], rows))


if __name__ == "__main__":
    main()
