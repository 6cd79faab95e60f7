"""The analysis "cosine": similarity of a model's features to the features of the standard model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from fastadv.evaluation.analyses.analysis import (
    Analysis,
    AnalysisContext,
    Measured,
    draw_bars,
    label_axes,
)
from fastadv.evaluation.metrics import cosine_similarities_to
from fastadv.evaluation.plot_style import Style

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class CosineSimilarity(Analysis):
    """Cosine similarity of the features of the model and of the teacher, for each clean image.

    Source: ARREST, table 3. The features are the maps before global pooling, flattened.
    """

    name = "cosine"
    title = "Cosine similarity of features to the standard model's"
    needs = ("images", "teacher")

    def compute(self, context: AnalysisContext) -> Measured:
        """One row per image."""
        assert context.teacher is not None
        found = cosine_similarities_to(
            context.model,
            context.teacher,
            context.images,
            batch_size=context.settings.batch_size,
            device=context.device,
        ).double()
        angles = found.clamp(-1, 1).arccos() * (180 / math.pi)
        rows = zip(
            range(len(found)),
            context.images.labels.tolist(),
            found.tolist(),
            angles.tolist(),
            strict=True,
        )
        summary = {
            "mean cosine": float(found.mean()),
            "standard deviation": float(found.std(correction=0)),
            "mean angle in degrees": float(angles.mean()),
        }
        return Measured(self.name, ("image", "label", "cosine", "angle"), tuple(rows), summary)

    def draw(self, found: Mapping[str, Measured], axes: Axes, style: Style) -> None:
        """Draw the mean of each model over all images and over each class."""
        classes = sorted({label for one in found.values() for label in one.column("label")})
        values = {}
        for name, one in found.items():
            means = [one.summary["mean cosine"]]
            for wanted in classes:
                cells = zip(one.column("label"), one.column("cosine"), strict=True)
                of_class = [value for label, value in cells if label == wanted]
                means.append(sum(of_class) / len(of_class) if of_class else math.nan)
            values[name] = means
        # With many classes there is no room for a bar each.
        shown = classes if len(classes) <= 20 else []
        values = {name: means[: 1 + len(shown)] for name, means in values.items()}
        draw_bars(values, ["all", *map(str, shown)], axes, style)
        label_axes(axes, style, "class", "cosine similarity")
