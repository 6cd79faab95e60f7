"""The trade-off plot: a whole PNG, labels that do not overlap, no trace in the process."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fastadv.evaluation import ARREST_CIFAR10_CURVE, Report, Row, wilson_interval
from fastadv.evaluation.label_placement import Box, place_labels
from fastadv.evaluation.plots import TradeOffPoint, draw_trade_off, plot_trade_off

pytest.importorskip("matplotlib")

TABLE = {
    "AT": (87.14, 44.04),
    "LAS-AT": (86.23, 53.58),
    "AWP": (85.57, 54.04),
    "S2O": (85.67, 54.10),
    "LBGAT": (88.22, 52.18),
    "ARREST": (90.24, 50.20),
    "TRADES": (84.92, 53.08),
    "MART with AWP": (84.20, 53.60),
}


def points(count: int, n: int | None = 10_000) -> list[TradeOffPoint]:
    def interval(percent):
        return (
            None
            if n is None
            else tuple(100 * v for v in wilson_interval(round(percent * n / 100), n))
        )

    rows = list(TABLE.items())[:count]
    return [TradeOffPoint(name, c, r, interval(c), interval(r)) for name, (c, r) in rows]


@pytest.mark.parametrize("count", [1, 3, 4, 6, 8])
@pytest.mark.parametrize("n", [None, 500, 10_000])
def test_labels_neither_overlap_nor_leave_the_axes(count, n):
    figure = draw_trade_off(points(count, n), curve=ARREST_CIFAR10_CURVE)
    (axes,) = figure.axes
    labels = [text for text in axes.texts if text.get_text() in TABLE]
    boxes = [text.get_window_extent() for text in labels]
    assert len(labels) == count
    window = axes.get_window_extent()
    for number, box in enumerate(boxes):
        assert window.x0 <= box.x0 and box.x1 <= window.x1 + 1
        assert window.y0 <= box.y0 and box.y1 <= window.y1 + 1
        for other in boxes[:number]:
            assert not box.overlaps(other)
        for point in points(count, n):
            x, y = axes.transData.transform((point.clean, point.robust))
            assert not (box.x0 < x < box.x1 and box.y0 < y < box.y1), "a label covers a marker"


def test_the_picture_is_saved_whole(tmp_path):
    path = plot_trade_off(
        points(6), tmp_path / "plots" / "p.png", curve=ARREST_CIFAR10_CURVE, title="T"
    )
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG") and data.endswith(b"IEND\xaeB`\x82")
    assert [p.name for p in path.parent.iterdir()] == ["p.png"]


def test_bars_show_the_intervals_and_lines_the_sums():
    (axes,) = draw_trade_off(points(3)).axes
    sums = [text.get_text() for text in axes.texts if text.get_text().startswith("Sum")]
    assert sums and len(axes.containers) == 3
    dotted = [line for line in axes.lines if line.get_linestyle() == "--"]
    assert len(dotted) >= len(sums)
    for line in dotted:
        x, y = line.get_data()
        assert x[0] + y[0] == pytest.approx(x[1] + y[1])
    bars = axes.containers[0].lines[2]
    low, high = bars[0].get_segments()[0][:, 0]
    assert (low, high) == pytest.approx(points(1)[0].clean_interval)


def test_points_from_a_report():
    rows = (Row("clean", 200, 180, 0.0, 0, 0.0), Row("pgd-20", 200, 100, 0.03, 0, 0.0))
    point = TradeOffPoint.from_report("ours", Report(rows), robust="pgd-20")
    assert (point.clean, point.robust) == (90.0, 50.0)
    assert point.robust_interval == pytest.approx((43.136, 56.864), abs=1e-3)
    with pytest.raises(KeyError, match="no row 'autoattack'"):
        TradeOffPoint.from_report("ours", Report(rows))


def test_wrong_arguments(tmp_path):
    with pytest.raises(ValueError, match="at least one method"):
        plot_trade_off([], tmp_path / "p.png")
    with pytest.raises(ValueError, match=r"must end in \.png"):
        plot_trade_off(points(1), tmp_path / "p.pdf")


@pytest.mark.slow
@pytest.mark.processes
def test_matplotlib_is_lazy_and_its_backend_untouched(tmp_path):
    code = (
        "import sys, fastadv.evaluation, fastadv.evaluation.plots as plots\n"
        "assert 'matplotlib' not in sys.modules\n"
        f"plots.plot_trade_off([plots.TradeOffPoint('a', 90, 50)], {str(tmp_path / 'p.png')!r})\n"
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_labels_go_to_free_places():
    frame = Box(0, 0, 100, 100)
    first, second = place_labels([(50, 50), (52, 50)], [(20, 8), (20, 8)], [], frame)
    assert first.shared(second) == 0
    (corner,) = place_labels([(99, 99)], [(20, 8)], [], frame)
    assert corner.right <= 100 and corner.top <= 100
    blocked = Box(50, 40, 100, 100)
    (left,) = place_labels([(50, 50)], [(20, 8)], [blocked], frame)
    assert left.shared(blocked) == 0
