"""The analysis "frobenius": norms of the weights of each layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from fastadv.evaluation.analyses.analysis import Analysis, AnalysisContext, Measured, label_axes
from fastadv.evaluation.plot_style import MARKERS, Style

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class FrobeniusNorms(Analysis):
    """Frobenius norm of the weights of each layer, the parameters with two axes or more.

    ``rms`` is the norm divided by the square root of the number of weights, so that layers of different size can
    be compared.
    """

    name = "frobenius"
    title = "Frobenius norm of the weights of each layer"
    needs = ()

    def compute(self, context: AnalysisContext) -> Measured:
        """One row per layer, in the order of the model's parameters."""
        rows = []
        for name, weight in context.model.named_parameters():
            if weight.dim() >= 2:
                norm = float(torch.linalg.vector_norm(weight.detach().double()))
                rows.append((name, weight.numel(), norm, norm / weight.numel() ** 0.5))
        if not rows:
            raise ValueError(
                f"model must have layers with weights, got {type(context.model).__name__} without any"
            )
        total = sum(norm**2 for _, _, norm, _ in rows) ** 0.5
        summary = {"norm of all layers": total}
        return Measured(self.name, ("layer", "parameters", "norm", "rms"), tuple(rows), summary)

    def draw(self, found: Mapping[str, Measured], axes: Axes, style: Style) -> None:
        """One line per model over the layers."""
        for number, (name, one) in enumerate(found.items()):
            norms = one.column("norm")
            marker = MARKERS[number % len(MARKERS)]
            axes.plot(
                range(1, 1 + len(norms)),
                norms,
                marker=marker,
                color=style.colour(number),
                label=name,
            )
        axes.set_ylim(bottom=0)
        label_axes(axes, style, "layer", "Frobenius norm")
