"""The analysis "delta-z": AFS's delta z of a merger's extractors, and whether it is concave in their radius."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from fastadv.evaluation.analyses.analysis import Analysis, AnalysisContext, Measured, label_axes
from fastadv.evaluation.plot_style import MARKERS, Style
from fastadv.evaluation.stacking import delta_z

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PAPER = tuple(k / 255 for k in range(3, 9))  # radii of the six extractors of AFS


class DeltaZCurve(Analysis):
    """Decrease of each extractor's margin under PGD, over the radius for which it was trained.

    Source: AFS, equations 8 to 10; see `fastadv.evaluation.delta_z`.
    """

    name = "delta-z"
    title = "Delta z of the extractors"
    needs = ("merger", "images")
    uses = ("eps", "steps", "extractor_eps", "seed")

    def compute(self, context: AnalysisContext) -> Measured:
        """One row per extractor, radii ascending; the first and the last have no curvature."""
        settings, extractors = context.settings, context.merger.extractors
        radii = settings.extractor_eps
        if not radii and len(extractors) == len(_PAPER):
            radii = _PAPER
        if len(radii) != len(extractors) or len(set(radii)) != len(radii):
            given = ", ".join(f"{radius:.6g}" for radius in radii) or "no radius"
            raise ValueError(
                f"extractor_eps must be {len(extractors)} different radii, one per extractor of the merger, "
                f"got {given}"
            )
        found = delta_z(
            dict(zip(radii, extractors, strict=True)),
            context.images,
            eps=settings.eps,
            steps=settings.steps,
            batch_size=settings.batch_size,
            device=context.device,
            seed=settings.seed,
        )
        curvature = (None, *found.curvature, None)
        rows = tuple(zip(found.radii, found.margin, found.delta_z, curvature, strict=True))
        summary = {
            "concave": float(found.concave),
            "largest curvature": max(found.curvature),
        }
        columns = ("extractor eps", "margin", "delta z", "curvature")
        return Measured(self.name, columns, rows, summary)

    def draw(self, found: Mapping[str, Measured], axes: Axes, style: Style) -> None:
        """One curve per merger."""
        for number, (name, one) in enumerate(found.items()):
            word = "concave" if one.summary["concave"] else "not concave"
            axes.plot(
                [255 * radius for radius in one.column("extractor eps")],
                one.column("delta z"),
                marker=MARKERS[number % len(MARKERS)],
                color=style.colour(number),
                label=f"{name}, {word}",
            )
        label_axes(axes, style, "radius of the extractor's training (1/255)", "delta z")
