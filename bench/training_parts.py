"""Where the time of an ARREST step goes, each part as it is and as torch's autocast has it, interleaved.

    python bench/training_parts.py                        ResNet-18, 3x32x32, batch 64
    python bench/training_parts.py --model wrn_28_10 --batch 16
    python bench/training_parts.py --threads 1 --cpu-time  on a machine with other work, by the thread's own time

"best of N" of every part. The whole step "before" has all parts by torch, but for the attack.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from arrangements import Task, arrest_method
from measure import machine, machine_line, text_table
from throughput import make_task

from fastadv.engine.frozen import frozen
from fastadv.trainers.arrest import ArrestRecipe, Replayed
from fastadv.trainers.frozen_forward import FrozenForward
from fastadv.trainers.method import LossResult, TrainBatch


def parts_of(task: Task, lr: float = 0.01) -> dict[str, tuple[Callable[[], object], ...]]:
    """Each part, as torch has it and as fastadv has it; a part that is one has one entry."""
    method: Any = arrest_method(task, ArrestRecipe(steps=task.steps, phi=90.0))
    model = method.model
    optimizer = torch.optim.SGD(
        model.parameters(), lr, momentum=0.9, weight_decay=5e-4, fused=task.device.type == "cpu"
    )
    x = task.x.contiguous(memory_format=torch.channels_last)
    batch = TrainBatch(x, task.y, torch.arange(len(x), device=task.device), 0, 0, 0)
    convolutions, teacher = method._convolutions, method._teacher_pass
    features, _ = method._teacher_pass(x)

    def moved() -> None:
        with torch.no_grad():
            torch._foreach_mul_(list(model.parameters()), 1.0001)

    def plain_teacher() -> object:
        with torch.no_grad(), method.autocast():
            return method.teachers["teacher"].forward_features(x)

    def plain_drift() -> object:
        with frozen(model), torch.no_grad(), method.autocast():
            return model.forward_features(x)

    def drift() -> object:
        return method._drifting_features(x)

    def update(result: LossResult) -> bool:
        optimizer.zero_grad(set_to_none=True)
        result.loss.backward()
        optimizer.step()
        return True

    def training(fast: bool) -> None:
        method._convolutions = convolutions if fast else None
        method.train_mode()
        with method.autocast():
            result = method.training_loss(batch, Replayed(x, features))
        update(result)

    def step(fast: bool) -> None:
        method._convolutions = convolutions if fast else None
        method.__dict__.pop("_drifting_features", None)
        if not fast:
            method._drifting_features = lambda _: plain_drift()
            method._frozen = {key: _Plain(*key, method) for key in method._frozen}
        elif any(isinstance(found, _Plain) for found in method._frozen.values()):
            method._frozen = dict(kept)
        method.train_mode()
        method.step(batch, update)

    kept: dict[Any, FrozenForward] = dict(method._frozen)
    with method.pgd.unchanged():
        drift()

    def with_proof() -> None:
        moved()
        method.pgd.engine_for(x)

    return {
        "teacher": (plain_teacher, lambda: teacher(x)),
        "proof and refresh": (with_proof,),
        "drift, in fastadv with a proof of a model as before": (plain_drift, drift),
        "training pass and update": (lambda: training(False), lambda: training(True)),
        "whole step": (lambda: step(False), lambda: step(True)),
    }


class _Plain:
    """A frozen model as it is."""

    def __init__(self, name: str, output: Any, method: Any) -> None:
        self._run = lambda x: output(method.teachers[name], x)

    def __call__(self, x: torch.Tensor) -> Any:
        return self._run(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--cpu-time", action="store_true")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    clock = time.thread_time if args.cpu_time else time.perf_counter
    device = torch.device("cpu")
    parts = parts_of(make_task(args.model, args.batch, args.steps, device))
    best = {name: [float("inf")] * len(runs) for name, runs in parts.items()}
    for _ in range(args.rounds + 1):  # the first one warms up
        for name, runs in parts.items():
            for place, run in enumerate(runs):
                began = clock()
                run()
                best[name][place] = min(best[name][place], clock() - began)
    rows = []
    for name, times in best.items():
        shown = [f"{1e3 * seconds:.1f}" for seconds in times]
        ratio = f"{times[0] / times[1]:.2f}x" if len(times) > 1 else ""
        rows.append([name, *shown, ratio] if ratio else [name, "", *shown, ""])
    print(machine_line(machine(device)))
    print(text_table([f"ms, best of {args.rounds}", "torch", "fastadv", ""], rows))


if __name__ == "__main__":
    main()
