"""The analysis "minimum": the smallest perturbation that breaks each image, with pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from fastadv.attacks import PGD
from fastadv.evaluation.analyses.analysis import Analysis, AnalysisContext, Measured, label_axes
from fastadv.evaluation.context import evaluation_mode
from fastadv.evaluation.minimum import smallest_radii
from fastadv.evaluation.plot_style import Style
from fastadv.seeding import derive_seed

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class SmallestPerturbation(Analysis):
    """The smallest radius at which PGD breaks each image, by bisection, and images at that radius.

    Images that are classified wrongly without an attack have radius 0. Images that PGD does not break at the
    largest radius tried have no radius.
    """

    name = "minimum"
    title = "Smallest perturbation"
    needs = ("images",)
    uses = ("max_eps", "steps", "pictures", "seed")

    def compute(self, context: AnalysisContext) -> Measured:
        """One row per image: label, radius, the class that the model gives to the adversarial image."""
        settings, model, samples = context.settings, context.model, context.images
        largest = settings.max_eps
        attack = PGD(model, largest, largest / 4, settings.steps, precision="fp32")
        seed = derive_seed(settings.seed, "analyse/minimum")
        rows: list[tuple[int, int, float | None, int]] = []
        shown: list[tuple[torch.Tensor, torch.Tensor]] = []
        with evaluation_mode(model, context.device):
            for x, y, ids in context.batches(samples):
                radii = smallest_radii(
                    attack, x, y, largest, seed=seed, sample_ids=ids, judge=model
                )
                reached = radii.clamp(max=largest)
                adv = attack(x, y, seed=seed, sample_ids=ids, eps=reached)
                # An image that is wrong without an attack is its own smallest adversarial image.
                adv = torch.where((radii == 0).view(-1, *[1] * (x.dim() - 1)), x, adv)
                with torch.no_grad():
                    predicted = model(adv).argmax(1)
                found = (ids, y, radii, predicted)
                cells = zip(*(part.tolist() for part in found), strict=True)
                rows += [(i, c, r if r < torch.inf else None, p) for i, c, r, p in cells]
                broken = (radii > 0) & radii.isfinite() & (predicted != y)
                broken = broken.nonzero().flatten()
                for place in broken[: settings.pictures - len(shown)].tolist():
                    shown.append((x[place].cpu(), adv[place].cpu()))
        distances = torch.tensor([r for _, _, r, _ in rows if r], dtype=torch.float64, device="cpu")
        summary: dict[str, float] = {
            "images broken": float(len(distances)),
            "images wrong without an attack": float(sum(r == 0 for _, _, r, _ in rows)),
            "images not broken": float(sum(r is None for _, _, r, _ in rows)),
        }
        if len(distances):
            summary["mean radius"] = float(distances.mean())
            summary["median radius"] = float(distances.quantile(0.5))
        images = [torch.stack(part) for part in zip(*shown, strict=True)] if shown else [None, None]
        columns = ("image", "label", "radius", "prediction")
        return Measured(self.name, columns, tuple(rows), summary, (), *images)

    def draw(self, found: Mapping[str, Measured], axes: Axes, style: Style) -> None:
        """One curve per model: the share of the images that no smaller perturbation breaks."""
        for number, (name, one) in enumerate(found.items()):
            radii = one.column("radius")
            broken = sorted(radius for radius in radii if radius is not None)
            # The last step ends at the share of the images that are not broken at any radius.
            x = [0.0, *(255 * radius for radius in broken)]
            y = [100 * (1 - k / len(radii)) for k in range(len(broken) + 1)]
            axes.step(x, y, where="post", color=style.colour(number), linewidth=1.8, label=name)
        axes.set_xlim(left=0)
        axes.set_ylim(0, 100)
        label_axes(axes, style, "radius (1/255)", "images not broken (%)")
