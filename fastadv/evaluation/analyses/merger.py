"""The analyses "importance" and "merger-weights": the weights that AFS's merger gives to its extractors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

from fastadv.evaluation.analyses.analysis import (
    Analysis,
    AnalysisContext,
    Measured,
    draw_bars,
    label_axes,
)
from fastadv.evaluation.plot_style import Style
from fastadv.models import importance_ratios

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class ImportanceRatios(Analysis):
    """How much the merger relies on each extractor, by the sum of its absolute weights. Source: AFS."""

    name = "importance"
    title = "Importance ratio of each extractor"
    needs = ("merger",)

    def compute(self, context: AnalysisContext) -> Measured:
        """One row per extractor: its number of features, ratio, mean absolute weight and norm of its weights."""
        stack = context.merger
        ratios = importance_ratios(stack)
        blocks = stack.merger.weight.detach().double().split(stack.widths, dim=1)
        rows = tuple(
            (number, width, ratio, float(block.abs().mean()), float(block.norm()))
            for number, (width, ratio, block) in enumerate(
                zip(stack.widths, ratios, blocks, strict=True), 1
            )
        )
        columns = ("extractor", "features", "ratio", "mean absolute weight", "norm")
        summary = {"largest ratio": max(ratios), "smallest ratio": min(ratios)}
        return Measured(self.name, columns, rows, summary)

    def draw(self, found: Mapping[str, Measured], axes: Axes, style: Style) -> None:
        """One bar per extractor and model."""
        values = {name: one.column("ratio") for name, one in found.items()}
        labels = [str(k + 1) for k in range(max(map(len, values.values())))]
        draw_bars(values, labels, axes, style)
        label_axes(axes, style, "extractor", "importance ratio")


class MergerWeights(Analysis):
    """Every weight of the merger: of each feature for each class."""

    name = "merger-weights"
    title = "Weights of the merger"
    needs = ("merger",)
    shared = False

    def compute(self, context: AnalysisContext) -> Measured:
        """One row per feature: its extractor, its number there, and its weight for each class."""
        stack = context.merger
        weights = stack.merger.weight.detach().double().t().tolist()
        places = [
            (number, feature)
            for number, width in enumerate(stack.widths, 1)
            for feature in range(width)
        ]
        rows = tuple((*place, *row) for place, row in zip(places, weights, strict=True))
        classes = tuple(f"class {k}" for k in range(stack.num_classes))
        summary = {"largest absolute weight": float(stack.merger.weight.detach().abs().max())}
        return Measured(self.name, ("extractor", "feature", *classes), rows, summary)

    def draw(self, found: Mapping[str, Measured], axes: Axes, style: Style) -> None:
        """The mean absolute weight of each feature, in the colour of its extractor."""
        ((_, one),) = found.items()
        extractors = one.column("extractor")
        for number in dict.fromkeys(extractors):
            places = [i for i, extractor in enumerate(extractors) if extractor == number]
            means = [_mean_magnitude(one.rows[i][2:]) for i in places]
            colour = style.colour(number - 1)
            axes.vlines(places, 0, means, color=colour, linewidth=0.8, label=f"extractor {number}")
        axes.set_ylim(bottom=0)
        label_axes(axes, style, "feature", "mean absolute weight")


def _mean_magnitude(weights: tuple[object, ...]) -> float:
    return sum(abs(cast(float, weight)) for weight in weights) / len(weights)
