"""Intervals, ARDist, curve fitting, feature similarity."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from fastadv.evaluation import (
    ARREST_CIFAR10_CURVE,
    ARREST_CIFAR100_CURVE,
    Cubic,
    ardist,
    cosine_similarity_to,
    fit_cubic,
    trade_off_sum,
    wilson_interval,
)
from fastadv.evaluation.analyses.analysis import pooled_features
from fastadv.models import Normalized, SmallCNN

# Clean, AutoAttack and ARDist in percent, from the ARREST paper.
CIFAR10 = {
    "AT": (87.14, 44.04, -1.500),
    "LAS-AT": (86.23, 53.58, 2.236),
    "AWP": (85.57, 54.04, 2.314),
    "S2O": (85.67, 54.10, 2.410),
    "LBGAT": (88.22, 52.18, 2.706),
    "ARREST": (90.24, 50.20, 3.521),
}
CIFAR100 = {
    "AT": (59.59, 22.86, -3.268),
    "LAS-AT": (61.80, 29.03, 3.189),
    "S2O": (63.40, 27.60, 2.786),
    "LBGAT": (70.25, 26.73, 6.639),
    "ARREST": (73.05, 24.32, 7.165),
}
TABLE = [(ARREST_CIFAR10_CURVE, name, *row) for name, row in CIFAR10.items()]
TABLE += [(ARREST_CIFAR100_CURVE, name, *row) for name, row in CIFAR100.items()]


@pytest.mark.parametrize(("curve", "name", "clean", "robust", "expected"), TABLE)
def test_ardist_of_the_paper(curve, name, clean, robust, expected):
    assert ardist(clean, robust, curve) == pytest.approx(expected, abs=6e-4)


def test_ardist_is_the_distance_to_the_nearest_point_of_the_curve():
    curve = Cubic(1e-3, -0.2, 12.0, -200.0)
    x = np.linspace(0, 100, 2_000_001)
    for clean, robust in [(30.0, 60.0), (70.0, 10.0), (66.0, 57.0), (50.0, 25.1)]:
        nearest = np.hypot(
            x - clean, ((curve.c3 * x + curve.c2) * x + curve.c1) * x + curve.c0 - robust
        ).min()
        found = ardist(clean, robust, curve)
        assert abs(found) == pytest.approx(nearest, abs=1e-5)
        assert math.copysign(1, found) == math.copysign(1, robust - curve(clean))


def test_ardist_of_simple_curves():
    assert ardist(3.0, 5.0, Cubic(0, 0, 0, 2.0)) == pytest.approx(3.0)
    assert ardist(0.0, -2.0, Cubic(0, 0, 1.0, 0)) == pytest.approx(-math.sqrt(2))
    assert ardist(0.0, 10.0, Cubic(0, 1.0, 0, 0)) == pytest.approx(math.sqrt(9.75))
    curve = ARREST_CIFAR10_CURVE
    assert ardist(88.0, curve(88.0), curve) == 0.0
    assert abs(ardist(88.0, curve(88.0) + 1e-6, curve)) < 1e-6
    with pytest.raises(ValueError, match="finite"):
        ardist(math.nan, 1.0, curve)


def test_fit_cubic_recovers_a_cubic():
    clean = [84.0, 85.5, 87.0, 88.0, 90.5, 92.0]
    fitted = fit_cubic((c, ARREST_CIFAR10_CURVE(c)) for c in clean)
    for c in (84.0, 86.3, 91.0):
        assert fitted(c) == pytest.approx(ARREST_CIFAR10_CURVE(c), abs=1e-6)
    assert fitted.c3 == pytest.approx(9.877e-5, rel=1e-3)


def test_fit_cubic_is_least_squares():
    clean, robust = np.array([80.0, 82, 85, 86, 90, 91]), np.array([50.0, 53, 51, 49, 44, 45])
    fitted = fit_cubic(zip(clean, robust, strict=True))

    def error(curve):
        return sum((curve(c) - r) ** 2 for c, r in zip(clean, robust, strict=True))

    for change in (1e-3, -1e-3):
        assert error(fitted) < error(Cubic(fitted.c3, fitted.c2, fitted.c1, fitted.c0 + change))
        assert error(fitted) < error(Cubic(fitted.c3, fitted.c2, fitted.c1 + change, fitted.c0))


def test_fit_cubic_needs_four_abscissas():
    with pytest.raises(ValueError, match="at least 4"):
        fit_cubic([(80, 50), (81, 49), (82, 48), (82, 47)])


def test_wilson_interval_known_values():
    # From scipy.stats.binomtest(correct, n).proportion_ci(confidence, method="wilson").
    assert wilson_interval(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775328), abs=1e-6)
    assert wilson_interval(10, 10) == pytest.approx((0.7224672, 1.0), abs=1e-6)
    assert wilson_interval(50, 100) == pytest.approx((0.4038315, 0.5961685), abs=1e-6)
    assert wilson_interval(9, 10, confidence=0.9) == pytest.approx((0.6522813, 0.9773651), abs=1e-6)


def test_wilson_interval_covers_the_truth_as_often_as_it_says():
    n, p = 40, 0.55
    probability = 0.0
    for k in range(n + 1):
        low, high = wilson_interval(k, n)
        assert 0 <= low <= k / n <= high <= 1
        if low <= p <= high:
            probability += math.comb(n, k) * p**k * (1 - p) ** (n - k)
    assert 0.93 < probability < 0.98


@pytest.mark.parametrize(
    ("correct", "n", "message"), [(0, 0, "n must"), (5, 4, "correct"), (-1, 4, "correct")]
)
def test_wilson_interval_refuses_wrong_counts(correct, n, message):
    with pytest.raises(ValueError, match=message):
        wilson_interval(correct, n)


def test_sum():
    assert trade_off_sum(90.24, 50.20) == pytest.approx(140.44)


class Features(nn.Module):
    """Features that are a linear map of the image."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward_features(self, x):
        return (x.flatten(1) @ self.weight).view(len(x), -1, 2, 2)


def test_cosine_similarity_to_a_teacher():
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(10, 1, 3, 3, generator=generator)
    labels = torch.zeros(10, dtype=torch.int64)
    weight, other = (torch.randn(9, 8, generator=generator) for _ in range(2))
    model = Features(weight).train()
    assert cosine_similarity_to(
        model, Features(weight), (images, labels), batch_size=4
    ) == pytest.approx(1, abs=1e-6)
    assert cosine_similarity_to(model, Features(-2 * weight), (images, labels)) == pytest.approx(
        -1, abs=1e-6
    )
    assert cosine_similarity_to(model, Features(0 * weight), (images, labels)) == 0
    expected = nn.functional.cosine_similarity(
        images.flatten(1) @ weight, images.flatten(1) @ other
    )
    found = cosine_similarity_to(model, Features(other), (images, labels), batch_size=3)
    assert found == pytest.approx(float(expected.mean()), abs=1e-6)
    assert model.training and model.weight.requires_grad


def test_cosine_similarity_says_what_is_missing():
    data = torch.rand(2, 1, 3, 3), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"teacher must have forward_features"):
        cosine_similarity_to(Features(torch.ones(9, 4)), nn.Flatten(), data)
    with pytest.raises(ValueError, match="one shape"):
        cosine_similarity_to(Features(torch.ones(9, 4)), Features(torch.ones(9, 8)), data)


def test_features_without_a_part_of_the_forward_are_refused():
    class Brightened(SmallCNN):  # its own forward normalises the images, which its halves do not
        def forward(self, x):
            return super().forward(2 * x - 1)

    torch.manual_seed(0)
    hidden, plain = Brightened(num_classes=4, in_channels=1).eval(), SmallCNN(4, 1).eval()
    whole = Normalized(plain, 0.5, 0.5).eval()
    images, labels = torch.rand(6, 1, 8, 8), torch.zeros(6, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"^teacher must compute .* a Brightened whose logits"):
        cosine_similarity_to(whole, hidden, (images, labels))
    with pytest.raises(
        ValueError, match=r"^model must compute .* which the cosine similarity runs"
    ):
        cosine_similarity_to(hidden, plain, (images, labels))
    with pytest.raises(ValueError, match=r"^model must compute .* which the analysis runs"):
        pooled_features(hidden, images)
    assert cosine_similarity_to(whole, whole, (images, labels)) == pytest.approx(1)
    assert pooled_features(whole, images).shape == (6, 64)
