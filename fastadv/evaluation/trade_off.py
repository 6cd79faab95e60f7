"""The trade-off of clean and robust accuracy as one number: Sum, mean or ARDist, each with a 95 % interval."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

from fastadv.evaluation.attack_list import AUTOATTACK
from fastadv.evaluation.metrics import (
    ARREST_CIFAR10_CURVE,
    ARREST_CIFAR10_POINTS,
    ARREST_CIFAR100_CURVE,
    ARREST_CIFAR100_POINTS,
    Cubic,
    ardist,
    trade_off_sum,
)
from fastadv.evaluation.result_row import Row, check_white_box
from fastadv.evaluation.results import Result

_EPS = 8 / 255
_SMALL = 1e-3  # step of the numerical derivative, in percent
_Z = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Published:
    """The curve and the points of the ARREST paper on one data set.

    Attributes:
        data: the data set.
        curve: the curve of ARDist.
        points: (clean, AutoAttack) in percent by method, for WRN-34-10.
    """

    data: str
    curve: Cubic
    points: dict[str, tuple[float, float]]

    def covers(self, clean: float) -> bool:
        """Whether a clean accuracy in percent lies in the range of the published points."""
        known = [point[0] for point in self.points.values()]
        return min(known) <= clean <= max(known)


_PUBLISHED = {
    "cifar10": Published("cifar10", ARREST_CIFAR10_CURVE, ARREST_CIFAR10_POINTS),
    "cifar100": Published("cifar100", ARREST_CIFAR100_CURVE, ARREST_CIFAR100_POINTS),
}


def published_for(result: Result) -> Published | None:
    """The published curve for a result of AutoAttack at 8/255 in linf, the threat of the curve; None otherwise."""
    fits = (
        result.row.name == AUTOATTACK
        and result.row.is_white_box
        and result.norm == "linf"
        and abs(result.row.eps - _EPS) < 1e-6
        and result.bounds == (0.0, 1.0)
        and result.row.status != "invalid"
    )
    return _PUBLISHED.get(result.subject.data.partition(" ")[0]) if fits else None


@dataclass(frozen=True)
class NumberWithInterval:
    """A number with its 95 % interval.

    Attributes:
        value: the number.
        low: lower end.
        high: upper end.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """The number and the interval, with two decimals."""
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class TradeOff:
    """The trade-off of clean and robust accuracy, in percent or percentage points.

    Attributes:
        sum: sum of the two accuracies.
        mean: mean of the two accuracies.
        ardist: ARREST's distance from the published curve; None if no curve applies.
    """

    sum: NumberWithInterval
    mean: NumberWithInterval
    ardist: NumberWithInterval | None = None


def trade_off(clean: Row, robust: Row, curve: Cubic | None = None) -> TradeOff:
    """Measure the trade-off between two rows.

    Both rows are about the same images, and an image that is wrong without an attack is wrong under it. So their
    errors are not independent. The intervals follow by the delta method from three shares of images: robust, right
    only without an attack, and wrong. For the variance z^2 / 3 is added to each of the three counts, as Agresti
    and Coull do for one share, so that the interval is not too narrow near 0 and 1.

    Args:
        clean: the row without an attack.
        robust: the row under an attack.
        curve: the curve of ARDist; None for no ARDist.

    Raises:
        ValueError: when the rows have different numbers of images, or ``robust`` is not an attack in a ball on the
            judged model itself.
    """
    check_white_box(robust)
    if clean.n != robust.n:
        raise ValueError(f"robust must be of the {clean.n} images of clean, got {robust.n}")
    added = _Z * _Z / 3
    r = (min(robust.correct, clean.correct) + added) / (clean.n + 3 * added)
    c = (clean.correct + 2 * added) / (clean.n + 3 * added)
    covariance = (c * (1 - c), r * (1 - c), r * (1 - r))
    at = (100 * clean.accuracy, 100 * robust.accuracy)

    def measure(
        of: Callable[[float, float], float], least: float, most: float
    ) -> NumberWithInterval:
        value = of(*at)
        by_clean = (of(at[0] + _SMALL, at[1]) - of(at[0] - _SMALL, at[1])) / (2 * _SMALL)
        by_robust = (of(at[0], at[1] + _SMALL) - of(at[0], at[1] - _SMALL)) / (2 * _SMALL)
        variance = (
            by_clean**2 * covariance[0]
            + 2 * by_clean * by_robust * covariance[1]
            + by_robust**2 * covariance[2]
        )
        half = 100 * _Z * math.sqrt(max(variance, 0.0) / (clean.n + 3 * added))
        return NumberWithInterval(value, max(value - half, least), min(value + half, most))

    return TradeOff(
        measure(trade_off_sum, 0.0, 200.0),
        measure(lambda x, y: trade_off_sum(x, y) / 2, 0.0, 100.0),
        None if curve is None else measure(lambda x, y: ardist(x, y, curve), -math.inf, math.inf),
    )
