"""Placing the labels of a scatter plot so that they cover neither each other nor the points."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_DIRECTIONS = 16  # tried around each anchor
_GAPS = (6.0, 11.0, 18.0, 28.0, 40.0)  # tried distances from the anchor, in typographic points


@dataclass(frozen=True)
class Box:
    """An upright rectangle, in any unit of length."""

    left: float
    bottom: float
    right: float
    top: float

    @property
    def area(self) -> float:
        """Width times height."""
        return max(0.0, self.right - self.left) * max(0.0, self.top - self.bottom)

    def shared(self, other: Box) -> float:
        """Area in common with another box."""
        return Box(
            max(self.left, other.left),
            max(self.bottom, other.bottom),
            min(self.right, other.right),
            min(self.top, other.top),
        ).area


def place_labels(
    anchors: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    obstacles: Sequence[Box],
    frame: Box,
    unit: float = 1.0,
) -> list[Box]:
    """Choose a place for every label, in the order given.

    Places are tried in all directions around the anchor and at several distances. The place is chosen that covers
    the least area of obstacles, of labels placed before and of the space outside the frame; among equal places the
    nearest one.

    Args:
        anchors: the points that the labels belong to.
        sizes: width and height of each label.
        obstacles: the places that are taken already.
        frame: the box in which labels should lie.
        unit: length of one typographic point in the unit of the other arguments.

    Returns:
        The box of each label.
    """
    taken, placed = list(obstacles), []
    for anchor, size in zip(anchors, sizes, strict=True):
        best = min(_candidates(anchor, size, unit), key=lambda place: _cost(place, taken, frame))[0]
        placed.append(best)
        taken.append(best)
    return placed


def _candidates(
    anchor: tuple[float, float], size: tuple[float, float], unit: float
) -> Iterator[tuple[Box, float]]:
    """Boxes around an anchor, each with a penalty that is smallest close to the anchor and to the upper right."""
    for gap in _GAPS:
        for number in range(_DIRECTIONS):
            angle = 2 * math.pi * number / _DIRECTIONS
            x = anchor[0] + math.cos(angle) * (size[0] / 2 + gap * unit)
            y = anchor[1] + math.sin(angle) * (size[1] / 2 + gap * unit)
            box = Box(x - size[0] / 2, y - size[1] / 2, x + size[0] / 2, y + size[1] / 2)
            yield box, gap + 2 * (1 - math.cos(angle - math.pi / 8))


def _cost(place: tuple[Box, float], taken: Sequence[Box], frame: Box) -> float:
    box, distance = place
    covered = sum(box.shared(other) for other in taken) + box.area - box.shared(frame)
    return 1000 * covered / box.area + distance
