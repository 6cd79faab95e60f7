"""The distances of a model's smallest adversarial perturbations, for attacks without a ball."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastadv.fields import check_fields


@dataclass(frozen=True)
class Distances:
    """The distances of the adversarial images that an attack without a ball has found.

    Images that are classified wrongly without an attack, and images that the attack did not break, have no
    distance and are in neither figure.

    Attributes:
        norm: norm of the distances.
        broken: number of images that the attack broke, at any distance.
        mean: mean of their distances; None if no image was broken.
        median: median of their distances; None if no image was broken.
        curve: (radius, share of all images that are classified correctly and not broken within it).
    """

    norm: str
    broken: int
    mean: float | None = None
    median: float | None = None
    curve: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)

    @classmethod
    def of(cls, distances: Tensor, norm: str, radii: Sequence[float]) -> Distances:
        """Summarise distances.

        Args:
            distances: [N], 0 for images that need no attack and infinite where no adversarial image was found.
            norm: norm of the distances.
            radii: radii of the curve. Each gives the accuracy under this attack in a ball of that radius.
        """
        exact = distances.double()
        found = exact[(exact > 0) & exact.isfinite()]
        # An image exactly at a radius counts as within it, in spite of the radius's rounding to float32.
        curve = tuple((r, float((exact > r * (1 + 1e-6)).double().mean())) for r in radii)
        if len(found) == 0:
            return cls(norm, 0, curve=curve)
        median = torch.quantile(found, 0.5)
        return cls(norm, len(found), float(found.mean()), float(median), curve)

    @classmethod
    def from_dict(cls, entry: dict[str, Any]) -> Distances:
        """Read back the result of ``dataclasses.asdict``."""
        curve = tuple((float(radius), float(share)) for radius, share in entry["curve"])
        return cls(entry["norm"], entry["broken"], entry["mean"], entry["median"], curve)

    def sentence(self, radius_text: str = "") -> str:
        """The distances in words.

        Args:
            radius_text: the curve in words; empty to leave it out.
        """
        if self.mean is None or self.median is None:
            text = "no ball; no image was broken at any distance"
        else:
            text = (
                f"no ball; {self.broken} images were broken, at a mean {self.norm} distance of "
                f"{self.mean:.4g} and a median of {self.median:.4g}"
            )
        return text + (f"; {radius_text}" if radius_text else "")
