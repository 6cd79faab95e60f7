"""Sum, mean and ARDist with intervals that cover the truth as often as they say; one colour per method."""

from __future__ import annotations

import math

import pytest

from fastadv.evaluation import ARREST_CIFAR10_CURVE, Row, ardist, wilson_interval
from fastadv.evaluation.comparison import Comparison, EvaluatedRun
from fastadv.evaluation.metrics import ARREST_CIFAR10_POINTS, ARREST_CIFAR100_POINTS
from fastadv.evaluation.plot_style import DARK, LIGHT
from fastadv.evaluation.plots import TradeOffPoint, draw_trade_off
from fastadv.evaluation.reporting.curves import curve_plots, draw_curves
from fastadv.evaluation.results import Result, Subject
from fastadv.evaluation.trade_off import trade_off

pytestmark = pytest.mark.slow


def rows(clean: int, robust: int, n: int) -> tuple[Row, Row]:
    return Row("clean", n, clean, 0.0, 0, 0.0), Row("pgd-20", n, robust, 8 / 255, 0, 0.0)


@pytest.mark.parametrize(("robust", "only_clean"), [(0.45, 0.4), (0.05, 0.9), (0.6, 0.05)])
def test_intervals_cover_the_truth_as_often_as_they_say(robust: float, only_clean: float) -> None:
    """Over all outcomes of 60 images, each robust, right without an attack alone, or wrong."""
    n, wrong = 60, 1 - robust - only_clean
    covered = {"sum": 0.0, "ardist": 0.0}
    truth = {
        "sum": 100 * (2 * robust + only_clean),
        "ardist": ardist(100 * (robust + only_clean), 100 * robust, ARREST_CIFAR10_CURVE),
    }
    for r in range(n + 1):
        for c in range(n + 1 - r):
            log = math.lgamma(n + 1) - math.lgamma(r + 1) - math.lgamma(c + 1)
            log -= math.lgamma(n - r - c + 1)
            log += r * math.log(robust) + c * math.log(only_clean) + (n - r - c) * math.log(wrong)
            if log < -12:  # what is left out weighs less than a thousandth
                continue
            measured = trade_off(*rows(r + c, r, n), ARREST_CIFAR10_CURVE)
            for name, value in truth.items():
                measure = getattr(measured, name)
                covered[name] += math.exp(log) * (measure.low <= value <= measure.high)
    assert 0.92 < covered["sum"] < 0.99
    if only_clean == 0.4:  # near the curve's own range, where it is no cliff
        assert 0.9 < covered["ardist"] < 0.995


def test_values_and_ends() -> None:
    measured = trade_off(*rows(9024, 5020, 10_000), ARREST_CIFAR10_CURVE)
    assert measured.sum.value == pytest.approx(140.44)
    assert measured.mean.value == pytest.approx(70.22)
    assert (measured.mean.low, measured.mean.high) == pytest.approx(
        (measured.sum.low / 2, measured.sum.high / 2)
    )
    assert measured.ardist is not None and measured.ardist.value == pytest.approx(3.521, abs=2e-3)
    assert measured.ardist.low < 3.521 < measured.ardist.high
    # Clean and robust errors go together: wider than if they were independent.
    independent = 196 * math.sqrt((0.9024 * 0.0976 + 0.502 * 0.498) / 10_000)
    assert measured.sum.high - measured.sum.value > independent
    full, none = trade_off(*rows(50, 50, 50)), trade_off(*rows(0, 0, 50))
    assert full.sum.high == full.sum.value == 200.0 > full.sum.low > 180
    assert none.sum.low == none.sum.value == 0.0 < none.sum.high < 20
    assert full.ardist is None
    with pytest.raises(ValueError, match="robust must be of the 50 images"):
        trade_off(rows(40, 30, 50)[0], rows(40, 30, 60)[1])


def test_the_published_points_have_the_published_distances() -> None:
    from fastadv.evaluation import ARREST_CIFAR100_CURVE

    ten = {n: ardist(*p, ARREST_CIFAR10_CURVE) for n, p in ARREST_CIFAR10_POINTS.items()}
    assert ten == pytest.approx(
        {"AT": -1.5, "LAS-AT": 2.236, "AWP": 2.314, "S2O": 2.41, "LBGAT": 2.706, "ARREST": 3.521},
        abs=2e-3,
    )
    hundred = {n: ardist(*p, ARREST_CIFAR100_CURVE) for n, p in ARREST_CIFAR100_POINTS.items()}
    assert hundred == pytest.approx(
        {"AT": -3.268, "LAS-AT": 3.189, "S2O": 2.786, "LBGAT": 6.639, "ARREST": 7.165}, abs=2e-3
    )


def point(
    name: str, clean: float, robust: float, method: str, minor: bool = False
) -> TradeOffPoint:
    intervals = [
        tuple(100 * end for end in wilson_interval(round(v), 100)) for v in (clean, robust)
    ]
    return TradeOffPoint(name, clean, robust, *intervals, method, minor)  # type: ignore[arg-type]


def test_axes_end_at_100_and_a_method_has_one_colour() -> None:
    pytest.importorskip("matplotlib")
    points = [
        point("a0", 100, 97, "a", minor=True),
        point("a1", 98, 99, "a", minor=True),
        point("a, mean of 2", 99, 98, "a"),
        point("b", 97, 95, "b"),
        point("zero", 96, 0, "c"),
    ]
    for style in (LIGHT, DARK):
        figure = draw_trade_off(points, style=style, published=ARREST_CIFAR10_POINTS, title="T")
        (axes,) = figure.axes
        assert axes.get_xlim()[1] == axes.get_ylim()[1] == 100 and axes.get_ylim()[0] == 0
        colours = [container.lines[0].get_color() for container in axes.containers]
        assert colours == [style.colours[i] for i in (0, 0, 0, 1, 2)]
        labels = {text.get_text(): text.get_color() for text in axes.texts}
        assert not {"a0", "a1"} & labels.keys()
        assert labels["b"] == style.colours[1] and labels["LBGAT"] == style.grey


def test_curves_are_of_models_judged_at_several_radii() -> None:
    pytest.importorskip("matplotlib")

    def result(name: str, correct: int, eps: float) -> Result:
        row = Row(name, 100, correct, eps, 0, 1.0)
        return Result(Subject(data="digits test"), row, "linf", (0.0, 1.0), 256, "cpu", {})

    several = (
        result("clean", 90, 0.0), result("pgd-20", 30, 16 / 255), result("pgd-20", 60, 8 / 255),
        result("fgsm", 70, 8 / 255),
    )  # fmt: skip
    runs = [EvaluatedRun("a", "at", "net", several), EvaluatedRun("b", "at", "net", several[:2])]
    (plot,) = curve_plots(Comparison(runs))
    assert (plot.attack, plot.norm, plot.n) == ("pgd-20", "linf", 100)
    (curve,) = plot.curves
    assert [(eps, row.correct) for eps, row in curve.points] == [
        (0.0, 90),
        (8 / 255, 60),
        (16 / 255, 30),
    ]
    (axes,) = draw_curves(plot).axes
    (container,) = axes.containers
    x, y = container.lines[0].get_data()
    assert list(x) == pytest.approx([0, 8, 16]) and list(y) == pytest.approx([90, 60, 30])
    low, high = container.lines[2][0].get_segments()[1][:, 1]
    assert (low, high) == pytest.approx([100 * end for end in wilson_interval(60, 100)])
    assert axes.get_ylim() == (0, 100)
