"""The estimated time of a reproduction: the methods' numbers of forward passes, times the seconds of one pass."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from fastadv.models import create_model
from fastadv.reproduction.images import Source
from fastadv.reproduction.scales import Scale
from fastadv.reproduction.specs import ResolvedRun
from fastadv.trainers import Runtime
from fastadv.trainers.hardware import choose_device
from fastadv.trainers.phases import PhaseTimer

# Forward passes per image of attacks whose names have no number of steps, if half of the images withstand
# AutoAttack's first attack.
_PASSES = {"clean": 1.0, "fgsm": 3.0, "autoattack": 4500.0, "fab-t": 1800.0, "square": 2500.0}
_BATCH, _CPU_BATCH = 128, 16
_STAND_IN = "small_cnn"
_PER_STEP = {"apgd": 2.0, "apgd-t": 9.0, "min-pgd": 80.0, "cwl2": 3.0}


@dataclass(frozen=True)
class Estimate:
    """The work that is left, and its time.

    Attributes:
        runs: the number of trainings.
        training: seconds of the trainings.
        evaluation: seconds of the attacks.
        device: the type of the device.
    """

    runs: int
    training: float
    evaluation: float
    device: str

    def __str__(self) -> str:
        """One sentence."""
        if self.runs == 0 and self.evaluation == 0:
            return "nothing is left to train or to measure"
        trainings = f"{self.runs} training{'s' * (self.runs != 1)}"
        return (
            f"about {_long(self.training)} for {trainings} and at most {_long(self.evaluation)} for the attacks, "
            f"on one {self.device}, going by the time of single forward passes"
        )


class Clock:
    """The measured time of a forward pass of each network.

    Args:
        source: the images, for their size.
        device: the device; None chooses.
    """

    def __init__(self, source: Source, device: str | None) -> None:
        self.device = choose_device(device)
        self._shape, self._classes = source.image_shape, source.num_classes
        self._seconds: dict[str, float] = {}

    def seconds(self, network: str) -> float:
        """Seconds of a forward pass, per image."""
        if network.startswith("stack:"):
            return sum(self.seconds(part) for part in network.removeprefix("stack:").split("+"))
        if network not in self._seconds:
            self._seconds[network] = self._timed(network)
        return self._seconds[network]

    def _timed(self, network: str) -> float:
        model = create_model(network, self._classes, self._shape[0]).eval().to(self.device)
        batch = _CPU_BATCH if self.device.type == "cpu" else _BATCH
        images = torch.rand(batch, *self._shape, device=self.device)
        seconds = 0.0
        with torch.no_grad():
            for _ in range(2):  # the first pass also pays for starting up
                began = time.perf_counter()
                model(images).sum().item()
                seconds = time.perf_counter() - began
        return seconds / batch


def passes_of(run: ResolvedRun) -> float:
    """Forward passes of a training per image of the training set, as the method counts them for a small network.

    Where a method does not take the small network, the number follows from the steps of its attack.
    """
    try:
        return _counted(run)
    except (ValueError, TypeError):
        return float(run.recipe.epochs * (2 * getattr(run.recipe, "steps", 0) + 7))


def _counted(run: ResolvedRun) -> float:
    parts = (
        run.network.removeprefix("stack:").split("+") if run.network.startswith("stack:") else []
    )
    name = "stack:" + "+".join([_STAND_IN] * len(parts)) if parts else _STAND_IN
    model = create_model(name, 10, 1)
    teachers = {teacher: create_model(_STAND_IN, 10, 1) for teacher, _ in run.teachers}
    cpu = torch.device("cpu")
    runtime = Runtime(
        cpu, None, PhaseTimer(cpu), build=lambda other: create_model(_STAND_IN, 10, 1)
    )
    method = run.method(run.recipe, model, runtime, teachers)
    return sum(method.passes(epoch) for epoch in range(run.recipe.epochs))


def attack_passes(attack: str) -> float:
    """The approximate number of forward passes of an attack per image."""
    if attack in _PASSES:
        return _PASSES[attack]
    kind, *numbers = re.split(r"-(?=\d)", attack)
    counts = [float(re.sub(r"\D", "", number)) for number in numbers]
    steps = counts[0] if counts else 100.0
    runs = counts[1] if len(counts) > 1 else 1.0
    return _PER_STEP.get(kind, 2.0) * steps * runs


def estimate(
    missing: Iterable[ResolvedRun],
    attacks: Iterable[tuple[ResolvedRun, str]],
    scale: Scale,
    source: Source,
    device: str | None,
) -> Estimate:
    """Estimate the time of trainings and attacks.

    Args:
        missing: the runs that are to be trained, each once.
        attacks: the missing measurements: a run and the name of an attack.
        scale: the scale.
        source: the images.
        device: the device; None chooses.
    """
    clock, runs, training, evaluation = Clock(source, device), 0, 0.0, 0.0
    for run in missing:
        images = run.recipe.train_images or source.train_count
        training += images * passes_of(run) * clock.seconds(run.network)
        runs += 1
    for run, attack in attacks:
        images = scale.images_for(attack) or source.test_count
        evaluation += images * attack_passes(attack) * clock.seconds(run.network)
    return Estimate(runs, training, evaluation, clock.device.type)


def _long(seconds: float) -> str:
    for unit, size in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    whole = round(seconds)
    return f"{whole} second{'s' * (whole != 1)}"
