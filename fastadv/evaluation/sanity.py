"""Signs of gradient masking: an attack that gets weaker when it is given more is not finding what is there.

Source: A. Athalye, N. Carlini and D. Wagner, "Obfuscated gradients give a false sense of security", ICML 2018,
section 3.1; N. Carlini et al., "On evaluating adversarial robustness", 2019, sections 3.2 and 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from fastadv.evaluation.attack_list import Gradient
from fastadv.evaluation.context import Model, evaluation_mode
from fastadv.evaluation.progress import Progress
from fastadv.evaluation.runner import Runner
from fastadv.evaluation.samples import as_samples, check_batch_size, check_eps
from fastadv.ops.values import check_choice, integer, limit, norm_name, number, shown


@dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    Attributes:
        check: ``"eps"``, ``"steps"`` or ``"unbounded"``.
        ok: whether the model behaves as one with useful gradients does.
        message: what was seen, in one sentence.
        accuracies: (value varied, accuracy as a fraction) for every run, for a plot or a table.
    """

    check: str
    ok: bool
    message: str
    accuracies: tuple[tuple[float, float], ...]


def masking_checks(
    model: Model,
    data: Any,
    *,
    eps: float = 8 / 255,
    eps_factors: Sequence[float] = (0.25, 0.5, 1.0, 2.0),
    steps: Sequence[int] = (1, 5, 20, 50),
    norm: str = "linf",
    bounds: tuple[float, float] = (0.0, 1.0),
    slack: float = 0.01,
    batch_size: int = 256,
    device: torch.device | str | None = None,
    seed: int = 0,
    max_examples: int | None = None,
    progress: bool = True,
) -> list[Finding]:
    """Check that PGD behaves on a model as it does where gradients lead somewhere.

    Three checks: robust accuracy does not rise with eps; it does not rise with the number of steps, each of
    size eps / 4; and with eps so large that any image is allowed it is next to zero.

    Args:
        model: as for ``evaluate``.
        data: as for ``evaluate``; a few hundred images are enough.
        eps: radius at which the number of steps is varied.
        eps_factors: eps is varied by these, in increasing order, at the largest number of steps.
        steps: numbers of steps, in increasing order.
        norm: ``"linf"`` or ``"l2"``.
        bounds: range of image values.
        slack: by how much, as a fraction of the images, accuracy may rise before a check fails, and how much may
            be left when eps is unbounded.
        batch_size: images per pass.
        device: where to run; by default where the model is.
        seed: seed of the random starts.
        max_examples: use only the first so many images.
        progress: say which check is running.

    Returns:
        One finding per check. A failed one means that the robust accuracy of this model, as measured by gradient
        attacks, is too high; passing them all proves nothing.

    Raises:
        ValueError: for an argument out of range.
    """
    _check_arguments(eps, eps_factors, steps, slack)
    norm, seed = norm_name(norm), integer("seed", seed)
    check_choice("norm", norm, ("linf", "l2"))
    samples = as_samples(data, bounds, max_examples)
    eps = check_eps(eps, norm, samples)
    with evaluation_mode(model, device) as where:
        runner = Runner(
            model, samples, norm, check_batch_size(batch_size), where, seed, Progress(progress)
        )
        runner.check_labels()
        correct = runner.clean().robust

        def accuracy(radius: float, count: int) -> float:
            attack = Gradient(f"pgd-{count}", steps=count, alpha=radius / 4, random_start=True)
            return float(runner.gradient(attack, radius, correct).robust.float().mean())

        clean = float(correct.float().mean())
        by_eps = [(0.0, clean), *((eps * f, accuracy(eps * f, steps[-1])) for f in eps_factors)]
        by_steps = [(float(count), accuracy(eps, count)) for count in steps]
        width = samples.bounds[1] - samples.bounds[0]
        everything = width * (samples.images[0].numel() ** 0.5 if norm == "l2" else 1.0)
        unbounded = accuracy(everything, steps[-1])
    return [
        _monotone("eps", by_eps, slack),
        _monotone("steps", by_steps, slack),
        _unbounded(everything, unbounded, slack),
    ]


def _check_arguments(
    eps: float, eps_factors: Sequence[float], steps: Sequence[int], slack: float
) -> None:
    if not limit("eps", eps) > 0:
        raise ValueError(f"eps must be > 0, got {eps}")
    if not 0 <= number("slack", slack) < 1:
        raise ValueError(f"slack must be in [0, 1), got {slack}")
    for name, values in (("eps_factors", eps_factors), ("steps", steps)):
        if isinstance(values, str) or not isinstance(values, Sequence):
            raise TypeError(f"{name} must be a sequence of numbers, got {shown(values)}")
        for value in values:
            (integer if name == "steps" else limit)(name, value)
        if not values or values[0] <= 0 or any(b <= a for a, b in pairwise(values)):
            raise ValueError(f"{name} must be positive and increasing, got {tuple(values)}")


def _monotone(check: str, accuracies: Sequence[tuple[float, float]], slack: float) -> Finding:
    """Compare every accuracy with the lowest before it: a slow rise in many small steps counts too."""
    worst, where = 0.0, None
    lowest = accuracies[0]
    for point in accuracies[1:]:
        if point[1] - lowest[1] > worst:
            worst, where = point[1] - lowest[1], (lowest, point)
        lowest = min(lowest, point, key=lambda p: p[1])
    ok = worst <= slack
    if where is None:
        message = f"robust accuracy does not rise with {check}"
    else:
        (from_value, from_accuracy), (to_value, to_accuracy) = where
        message = (
            f"robust accuracy rises with {check}: {100 * from_accuracy:.2f} % at {from_value:.4g}, "
            f"{100 * to_accuracy:.2f} % at {to_value:.4g}" + (", within the slack" if ok else "")
        )
    return Finding(check, ok, message, tuple(accuracies))


def _unbounded(eps: float, accuracy: float, slack: float) -> Finding:
    ok = accuracy <= slack
    message = f"{100 * accuracy:.2f} % are still right when any image is allowed (eps {eps:.4g})"
    return Finding("unbounded", ok, message, ((eps, accuracy),))
