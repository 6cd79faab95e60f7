"""The pictures of analyses as PNG: their numbers, and their images."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fastadv.evaluation.analyses.analysis import Measured
from fastadv.evaluation.analyses.registry import ANALYSES
from fastadv.evaluation.plot_style import LIGHT, Style, new_figure, png_of

_MAGNIFIED = 5  # factor of the perturbation in its picture
_GAP = 1  # pixels between two images


def picture_of(found: Mapping[str, Measured], style: Style = LIGHT, title: str = "") -> bytes:
    """Draw the findings of one analysis, as a PNG.

    Args:
        found: the findings of one analysis by the name of each model; of one model where the analysis is not
            shared.
        style: the colours.
        title: second line of the heading.

    Raises:
        ImportError: when matplotlib is not installed.
        ValueError: for no findings, or for several models where the analysis is not shared.
    """
    names = {one.analysis for one in found.values()}
    if len(names) != 1:
        raise ValueError(f"found must be of one analysis, got {', '.join(sorted(names)) or 'none'}")
    analysis = ANALYSES[names.pop()]
    if len(found) > 1 and not analysis.shared:
        raise ValueError(f"found must be of one model with {analysis.name}, got {len(found)}")
    figure, axes = new_figure(style, 7.2, 4.6)
    analysis.draw(found, axes, style)
    axes.set_title("\n".join(filter(None, (analysis.title, title))), fontsize=13, color=style.ink)
    return png_of(figure)


def images_of(measured: Measured, style: Style = LIGHT) -> bytes | None:
    """Draw original, adversarial image and perturbation x 5 below each other, as a PNG; None without images.

    Grey in the perturbation means no change.

    Raises:
        ImportError: when matplotlib is not installed.
    """
    if measured.originals is None or measured.adversarials is None:
        return None
    change = 0.5 + _MAGNIFIED * (measured.adversarials - measured.originals)
    lines = (measured.originals, measured.adversarials, change.clamp(0, 1))
    count, _, height, width = measured.originals.shape
    figure, axes = new_figure(style, 1.2 * max(count, 4), 1.2 * 3 * height / width + 0.4)
    tiled = torch.cat([_in_line(line) for line in lines], 1)
    grey = tiled.shape[0] != 3
    pixels = tiled.mean(0) if grey else tiled.permute(1, 2, 0)
    axes.imshow(pixels.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    middles = [(k + 0.5) * (height + _GAP) - 0.5 for k in range(3)]
    axes.set_yticks(middles, ["original", "adversarial", f"perturbation x {_MAGNIFIED}"])
    axes.set_xticks([])
    axes.spines[:].set_visible(False)
    return png_of(figure)


def _in_line(images: torch.Tensor) -> torch.Tensor:
    """Images [M, C, H, W] side by side with white between them, [C, H + gap, M * (W + gap)]."""
    padded = torch.nn.functional.pad(images, (0, _GAP, 0, _GAP), value=1.0)
    return torch.cat(list(padded), 2)
