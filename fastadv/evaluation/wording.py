"""Radii and distances in words."""

from __future__ import annotations

from fastadv.evaluation.distances import Distances


def format_eps(eps: float) -> str:
    """Write eps as k/255 for a whole number k, else as a decimal number."""
    k = round(eps * 255) if abs(eps) < 1 else 0
    return f"{k}/255" if k > 0 and abs(eps * 255 - k) < 1e-6 and k < 255 else f"{eps:.4g}"


def distances_text(distances: Distances) -> str:
    """The distances that an attack without a ball found, in words."""
    curve = ", ".join(
        f"{100 * share:.2f} % at {format_eps(radius)}" for radius, share in distances.curve
    )
    return distances.sentence(f"an accuracy of {curve}" if curve else "")


def bounds_text(bounds: tuple[float, float]) -> str:
    """Write the range of image values for people, as on the command line: "0 1"."""
    return f"{bounds[0]:g} {bounds[1]:g}"
