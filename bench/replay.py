"""The savings of noisy replay: an ARREST training step by the share p of the images that are attacked.

    python bench/replay.py                     ResNet-18, 3x32x32, batch 64, K = 10; about a minute on 2 cores

Images whose features have drifted get noise instead of the attack, so a step should cost (2Kp + 5) F, F one
forward pass over the batch: 2K F for the attack of all, 1 F each for the teacher and the drift, 3 F for training.
Which images have drifted is forced here; all passes are made. Results go to bench/results/replay_DEVICE.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from arrangements import Run, Task, arrest_method, trainer_step
from measure import Seconds, interleave, machine, machine_line, text_table, write_json
from throughput import RESULTS, make_task, say
from torch import Tensor

from fastadv.trainers import ArrestRecipe

SHARES = (1.0, 0.75, 0.5, 0.25, 0.0)


def step_with(task: Task, attacked: int) -> Run:
    """An ARREST step in which so many of the images have not drifted."""
    method = arrest_method(task, ArrestRecipe(steps=task.steps, phi=80.0))
    near = torch.arange(len(task.x), device=task.device) < attacked
    method._drifting_features = forced(method._drifting_features, near)  # type: ignore[method-assign]
    # A learning rate of 0: features stay at no angle from the teacher's, where they are not set to 0.
    return trainer_step(method, task, 0.0)


def forced(features: Callable[[Tensor], Tensor], near: Tensor) -> Callable[[Tensor], Tensor]:
    """The features of images that shall be near, and 0, which is as far as can be, of the others."""
    return lambda x: features(x) * near[:, None, None, None]


def rows_of(times: dict[float, Seconds], steps: int) -> list[list[str]]:
    """Measured and predicted times, relative to an attack of all images."""
    whole = times[1.0].median
    rows = []
    for share, seconds in times.items():
        predicted = (2 * steps * share + 5) / (2 * steps + 5)
        rows.append(
            [
                f"{share:.2f}",
                f"{seconds.median:.3f} ({seconds.smallest:.3f} to {seconds.largest:.3f})",
                f"{seconds.median / whole:.2f}",
                f"{predicted:.2f}",
            ]
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    device = torch.device(options.device)
    task = make_task(options.model, options.batch, options.steps, device)
    runs = {share: step_with(task, round(share * options.batch)) for share in SHARES}
    for run in runs.values():
        run()
        run()  # the second call of a batch size records it on a GPU
    named = interleave({str(p): run for p, run in runs.items()}, options.rounds, device, say)
    times = {share: named[str(share)] for share in SHARES}
    facts = machine(device)
    print(f"{options.model}, batch {options.batch}, K = {options.steps}; {machine_line(facts)}")
    header = ["attacked", "seconds (min to max)", "measured", "(2Kp + 5) F"]
    print(text_table(header, rows_of(times, options.steps)))
    content = {
        "machine": facts,
        "model": options.model,
        "batch": options.batch,
        "steps": options.steps,
        "seconds": {str(p): seconds.to_dict() for p, seconds in times.items()},
    }
    write_json(options.out / f"replay_{device.type}.json", content)


if __name__ == "__main__":
    main()
