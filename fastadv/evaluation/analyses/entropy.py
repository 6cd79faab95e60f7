"""The analysis "entropy": entropy of the predicted probabilities on the training set."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from fastadv.evaluation.analyses.analysis import Analysis, AnalysisContext, Measured, label_axes
from fastadv.evaluation.context import evaluation_mode
from fastadv.evaluation.plot_style import Style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BINS = 50


class PosteriorEntropy(Analysis):
    """Entropy of the predicted probabilities of the training images, in nats, without augmentation."""

    name = "entropy"
    title = "Posterior entropy on the training set"
    needs = ("train",)

    def compute(self, context: AnalysisContext) -> Measured:
        """A histogram between 0 and the logarithm of the number of classes, which is the largest entropy."""
        parts = []
        with evaluation_mode(context.model, context.device), torch.no_grad():
            for x, _, _ in context.batches(context.train_images):
                logits = context.model(x).double()
                parts.append(torch.special.entr(logits.softmax(1)).sum(1).cpu())
        found, largest = torch.cat(parts), math.log(logits.shape[1])
        counts = torch.histc(found.clamp(0, largest), _BINS, 0, largest).long().tolist()
        edges = [largest * k / _BINS for k in range(_BINS + 1)]
        rows = tuple(
            (low, high, count, count / len(found))
            for low, high, count in zip(edges, edges[1:], counts, strict=False)
        )
        summary = {
            "mean entropy": float(found.mean()),
            "median entropy": float(found.quantile(0.5)),
            "standard deviation": float(found.std(correction=0)),
            "largest possible": largest,
        }
        return Measured(self.name, ("from", "to", "images", "share"), rows, summary)

    def draw(self, found: Mapping[str, Measured], axes: Axes, style: Style) -> None:
        """One histogram per model, as an outline."""
        for number, (name, one) in enumerate(found.items()):
            edges = [*one.column("from"), one.column("to")[-1]]
            shares = one.column("share")
            axes.stairs(shares, edges, color=style.colour(number), linewidth=1.8, label=name)
        axes.set_yscale("symlog", linthresh=1e-3)
        label_axes(axes, style, "entropy (nats)", "share of the images")
