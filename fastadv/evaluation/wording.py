"""Radii and distances in words."""

from __future__ import annotations

from fastadv.evaluation.distances import Distances


def format_eps(eps: float) -> str:
    """Write eps as k/255 for a whole number k, else as a decimal number; .2, which is 51/255, as 0.2."""
    k = round(eps * 255) if abs(eps) < 1 else 0
    whole = 0 < k < 255 and k % 51 > 0 and abs(eps * 255 - k) < 1e-6
    return f"{k}/255" if whole else f"{eps:.4g}"


def distances_text(distances: Distances) -> str:
    """The distances that an attack without a ball found, in words."""
    curve = ", ".join(
        f"{100 * share:.2f} % at {format_eps(radius)}" for radius, share in distances.curve
    )
    return distances.sentence(f"an accuracy of {curve}" if curve else "")


def bounds_text(bounds: tuple[float, float]) -> str:
    """Write the range of image values for people, as on the command line: "0 1"."""
    return f"{bounds[0]:g} {bounds[1]:g}"
