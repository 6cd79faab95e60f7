"""Metrics of accuracies and features: Wilson's interval, ARDist, Sum, cosine similarity to a teacher.

Accuracies in the trade-off metrics are percentages (0 to 100), as in the papers' tables and curves.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastadv.evaluation.context import all_in_evaluation_mode
from fastadv.evaluation.samples import Samples, as_samples, check_batch_size
from fastadv.fields import arguments_checked, check_fields
from fastadv.models.split import refuse_other_halves
from fastadv.ops.values import integer, shown


@arguments_checked
def wilson_interval(correct: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion.

    Args:
        correct: number of successes, 0 to n.
        n: number of trials, at least 1.
        confidence: probability that the interval is to cover, between 0 and 1.

    Returns:
        Lower and upper end, fractions in [0, 1].

    Raises:
        ValueError: for counts or a confidence out of range.

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference",
    Journal of the American Statistical Association 22 (1927), without continuity correction.
    """
    n = integer("n", n, at_least=1)
    if not 0 <= correct <= n:
        raise ValueError(f"correct must be between 0 and n = {n}, got {correct}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    p = correct / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    # At 0 and n the end is exact in theory; rounding must not move it.
    low = 0.0 if correct == 0 else max(0.0, centre - half)
    high = 1.0 if correct == n else min(1.0, centre + half)
    return low, high


@dataclass(frozen=True)
class Cubic:
    """The curve ``robust = c3 * clean**3 + c2 * clean**2 + c1 * clean + c0``, in percent."""

    c3: float
    c2: float
    c1: float
    c0: float

    def __post_init__(self) -> None:
        """Check that there are four numbers.

        Raises:
            TypeError: one is of another type.
        """
        check_fields(self)

    @arguments_checked
    def __call__(self, clean: float) -> float:
        """Robust accuracy on the curve at a clean accuracy, both in percent."""
        return ((self.c3 * clean + self.c2) * clean + self.c1) * clean + self.c0


# Fitted to the methods that the ARREST paper compares, (clean, AutoAttack) in percent.
ARREST_CIFAR10_CURVE = Cubic(9.877e-5, -0.3922, 63.82, -2600.0)
ARREST_CIFAR100_CURVE = Cubic(5.615e-4, -0.1582, 12.44, -271.8)
# The figures that the ARREST paper reports for WRN-34-10 at 8/255 linf, (clean, AutoAttack) in percent.
ARREST_CIFAR10_POINTS = {
    "AT": (87.14, 44.04),
    "LAS-AT": (86.23, 53.58),
    "AWP": (85.57, 54.04),
    "S2O": (85.67, 54.10),
    "LBGAT": (88.22, 52.18),
    "ARREST": (90.24, 50.20),
}
ARREST_CIFAR100_POINTS = {
    "AT": (59.59, 22.86),
    "LAS-AT": (61.80, 29.03),
    "S2O": (63.40, 27.60),
    "LBGAT": (70.25, 26.73),
    "ARREST": (73.05, 24.32),
}


@arguments_checked
def ardist(clean: float, robust: float, curve: Cubic) -> float:
    """Signed distance of a method from a trade-off curve, ARREST's ARDist.

    It is the distance to the nearest point of the curve. It is found exactly: the squared distance is a polynomial
    in the clean accuracy, so its minimum is at a real root of its derivative, of degree five.

    Args:
        clean: clean accuracy, percent.
        robust: robust accuracy, percent.
        curve: the cubic fitted to the methods compared with.

    Returns:
        The distance in percentage points: positive above the curve, negative below, 0 on it.
    """
    if not (math.isfinite(clean) and math.isfinite(robust)):
        raise ValueError(f"clean and robust must be finite, got {clean} and {robust}")
    # In t = x - clean the numbers stay small, which the root finder needs: a*t^3 + b*t^2 + c*t + gap.
    a = curve.c3
    b = 3 * curve.c3 * clean + curve.c2
    c = (3 * curve.c3 * clean + 2 * curve.c2) * clean + curve.c1
    gap = curve(clean) - robust
    height = np.poly1d([a, b, c, gap])
    squared = np.poly1d([1.0, 0.0]) ** 2 + height**2
    roots = np.roots(np.polyder(squared))
    # A double root may come out as a conjugate pair; every real part is a point of the curve, and the
    # nearest of them is the distance, so points that are no root cannot make the distance too small.
    distances = np.sqrt(np.polyval(squared, roots.real).clip(min=0.0))
    return math.copysign(float(distances.min()), -gap) if gap != 0 else 0.0


def fit_cubic(points: Iterable[tuple[float, float]]) -> Cubic:
    """Least-squares cubic through (clean, robust) pairs.

    Args:
        points: at least four pairs with different clean accuracies, in percent.

    Returns:
        The curve, which `ardist` takes.

    Raises:
        ValueError: for fewer than four different clean accuracies, or numbers that are not finite.
    """
    try:
        found = np.asarray(list(points))
        if found.dtype.kind not in "iufO":
            raise TypeError(f"{found.dtype}")
        pairs = found.astype(np.float64).reshape(-1, 2)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"points must be pairs (clean, robust) of numbers, got {shown(points)}"
        ) from error
    if not np.isfinite(pairs).all():
        raise ValueError(
            f"points must be finite, got {pairs[~np.isfinite(pairs).all(1)][0].tolist()} among them"
        )
    different = len(np.unique(pairs[:, 0]))
    if different < 4:
        raise ValueError(f"points must have at least 4 different clean accuracies, got {different}")
    # polynomial.Polynomial.fit maps the abscissas to [-1, 1] first; raw powers of 80..95 are ill-conditioned.
    fitted = np.polynomial.Polynomial.fit(pairs[:, 0], pairs[:, 1], deg=3).convert().coef
    c0, c1, c2, c3 = np.pad(fitted, (0, 4 - len(fitted)))
    return Cubic(float(c3), float(c2), float(c1), float(c0))


@arguments_checked
def trade_off_sum(clean: float, robust: float) -> float:
    """Return the sum of clean and robust accuracy, the simplest trade-off metric, in percentage points.

    Args:
        clean: accuracy on clean images, in percent.
        robust: accuracy under attack, in percent.
    """
    return clean + robust


def cosine_similarity_to(
    model: nn.Module,
    teacher: nn.Module,
    data: Any,
    *,
    batch_size: int = 256,
    device: torch.device | str | None = None,
    max_examples: int | None = None,
) -> float:
    """Mean cosine similarity of the features of a model and of a teacher, on clean images.

    The features are ``forward_features(x)``, the maps before global pooling, flattened. In this way ARREST
    compares the representations of robust models with the representations of the standard model (its table 3).

    Args:
        model: a model with ``forward_features``.
        teacher: another model whose features have the same shape.
        data: as for ``evaluate``.
        batch_size: images per pass.
        device: as for ``evaluate``.
        max_examples: use only so many images, as for ``evaluate``.

    Returns:
        The mean over images, in [-1, 1]. Features of norm zero count as similarity 0.

    Raises:
        TypeError: when a model has no ``forward_features``.
        ValueError: when the features have different shapes, or a model is more than its halves.
    """
    samples = as_samples(data, (0.0, 1.0), max_examples)
    found = cosine_similarities_to(model, teacher, samples, batch_size=batch_size, device=device)
    return float(found.double().mean())


def cosine_similarities_to(
    model: nn.Module,
    teacher: nn.Module,
    samples: Samples,
    *,
    batch_size: int = 256,
    device: torch.device | str | None = None,
) -> Tensor:
    """The cosine similarity for each image, [N] float32 on the CPU; arguments as in `cosine_similarity_to`."""
    for role, network in (("model", model), ("teacher", teacher)):
        if not callable(getattr(network, "forward_features", None)):
            raise TypeError(
                f"{role} must have forward_features(x), {type(network).__name__} has not"
            )
    batch_size = check_batch_size(batch_size)
    found: list[Tensor] = []
    with all_in_evaluation_mode([model, teacher], device) as where:
        for indices in samples.batches(batch_size):
            x, _ = samples.take(indices, where)
            with torch.no_grad():
                if not found:
                    _check_halves(model, teacher, x[:2])
                u, v = model.forward_features(x), teacher.forward_features(x)  # type: ignore[operator]
            found.append(_cosine(u, v).cpu())
    return torch.cat(found)


def _check_halves(model: nn.Module, teacher: nn.Module, x: Tensor) -> None:
    """Refuse models whose features are taken without a part of their forward, as far as they have a head."""
    for role, network in (("model", model), ("teacher", teacher)):
        if callable(getattr(network, "forward_head", None)):
            refuse_other_halves(role, network, lambda f: f(x), "the cosine similarity")


def _cosine(u: Tensor, v: Tensor) -> Tensor:
    """Cosine similarity per sample over all other axes, 0 where a norm is 0. [B, ...] x 2 -> [B]."""
    if u.shape != v.shape:
        raise ValueError(
            f"features must have one shape, the model's are {tuple(u.shape)} "
            f"and the teacher's {tuple(v.shape)}"
        )
    u, v = u.flatten(1), v.flatten(1)
    norms = u.norm(dim=1) * v.norm(dim=1)
    return torch.where(norms > 0, (u * v).sum(1) / norms, torch.zeros_like(norms))
