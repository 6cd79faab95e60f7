"""The worst adversarial images as pictures: original, adversarial image, and magnified difference."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from fastadv.evaluation.comparison import Comparison, Line
from fastadv.evaluation.worst import WorstImages

_MOST = 8  # images of one result
_MOST_LARGE = 4  # images of one result, where they are large
_LARGE = 96 * 96  # pixels above which images are large


@dataclass(frozen=True)
class Pictures:
    """One adversarial image.

    Attributes:
        original: PNG.
        adversarial: PNG.
        difference: PNG, grey where nothing has changed.
        magnified: factor of the difference.
        index: the image's index in the data.
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
        norm: norm of the perturbation.
        eps: radius of the ball; None for an attack without a ball.
        pictures: the images, the worst first.
    """

    run: str
    attack: str
    norm: str
    eps: float | None
    pictures: tuple[Pictures, ...]


def galleries(comparison: Comparison, radius: tuple[str, float] | None) -> list[Gallery]:
    """The worst images of all results, or of the results at one radius, where their files exist.

    Raises:
        ValueError: when a file is damaged; the message names the file.
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
    # A file of results may come from elsewhere: its names must not lead out of its folder.
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
        # The largest round factor with which the difference fits between black and white.
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
    """A PNG of an image [C, H, W] in 0..1; an image without 3 channels becomes grey."""
    from matplotlib.image import imsave

    channels = image if image.shape[0] == 3 else image.mean(dim=0, keepdim=True).expand(3, -1, -1)
    pixels = (channels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
    content = io.BytesIO()
    imsave(content, pixels, format="png")
    return content.getvalue()
