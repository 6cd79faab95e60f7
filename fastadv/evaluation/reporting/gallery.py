"""Worst adversarial images as pictures: the original, the adversarial one, and their difference magnified."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from fastadv.evaluation.comparison import Comparison, Line
from fastadv.evaluation.worst import WorstImages

_MOST = 8  # images of one result
_MOST_LARGE = 4  # of images larger than these
_LARGE = 96 * 96


@dataclass(frozen=True)
class Pictures:
    """One adversarial image.

    Attributes:
        original: PNG.
        adversarial: PNG.
        difference: PNG, grey where nothing has changed.
        magnified: by how much the difference is multiplied.
        index: which image of the data it is.
        label: its class.
        prediction: the class that the model gives to the adversarial image.
        confidence: probability of that class.
        label_confidence: probability of the label.
    """

    original: bytes
    adversarial: bytes
    difference: bytes
    magnified: float
    index: int
    label: int
    prediction: int
    confidence: float
    label_confidence: float


@dataclass(frozen=True)
class Gallery:
    """The worst images of one result.

    Attributes:
        run: the name of the model.
        attack: the column of the table.
        norm: of the perturbation.
        eps: its radius; None for an attack without a ball.
        pictures: the worst first.
    """

    run: str
    attack: str
    norm: str
    eps: float | None
    pictures: tuple[Pictures, ...]


def galleries(comparison: Comparison, radius: tuple[str, float] | None) -> list[Gallery]:
    """The worst images of all results, or of those at one radius, as far as their files are there.

    Raises:
        ValueError: when a file is damaged; the message names it.
    """
    found = []
    for line in comparison.lines:
        if radius is not None and not (line.ball and line.radius == radius):
            continue
        for title, result in line.cells.items():
            worst = _read(line, result.worst_file)
            if worst is not None and worst.originals.dim() == 4:
                pictures = _pictures(worst, result.bounds)
                label = comparison.label(line)
                found.append(
                    Gallery(label, title, line.norm, line.eps if line.ball else None, pictures)
                )
    return found


def _read(line: Line, name: str) -> WorstImages | None:
    # A name from a file of elsewhere may not lead out of the folder of the results.
    if not name or Path(name).is_absolute() or ".." in Path(name).parts:
        return None
    file = line.run.folder / name
    return WorstImages.load(file) if file.is_file() else None


def _pictures(worst: WorstImages, bounds: tuple[float, float]) -> tuple[Pictures, ...]:
    low, width = bounds[0], bounds[1] - bounds[0]
    height, breadth = worst.originals.shape[2:]
    count = min(len(worst), _MOST if height * breadth <= _LARGE else _MOST_LARGE)
    found = []
    for number in range(count):
        original = (worst.originals[number] - low) / width
        adversarial = (worst.adversarials[number] - low) / width
        change = adversarial - original
        # As large as fits between black and white, in a round number.
        magnified = _round_down(0.5 / max(float(change.abs().max()), 1e-6))
        found.append(
            Pictures(
                _png(original),
                _png(adversarial),
                _png(0.5 + magnified * change),
                magnified,
                int(worst.indices[number]),
                int(worst.labels[number]),
                int(worst.predictions[number]),
                float(worst.confidences[number]),
                float(worst.label_confidences[number]),
            )
        )
    return tuple(found)


def _round_down(factor: float) -> float:
    """The largest number of one digit that is not larger, at least 1."""
    if factor <= 1:
        return 1.0
    power = 10.0 ** np.floor(np.log10(factor))
    return float(np.floor(factor / power) * power)


def _png(image: Tensor) -> bytes:
    """A PNG of an image [C, H, W] in 0..1; other than 3 channels become grey."""
    from matplotlib.image import imsave

    channels = image if image.shape[0] == 3 else image.mean(dim=0, keepdim=True).expand(3, -1, -1)
    pixels = (channels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
    content = io.BytesIO()
    imsave(content, pixels, format="png")
    return content.getvalue()
