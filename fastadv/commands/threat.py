"""The norm and the radius in which `fastadv eval` judges a model, and the sentence that names them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastadv.evaluation import Report, Row
from fastadv.evaluation.attack_list import CLEAN
from fastadv.evaluation.comparison import radius_text
from fastadv.evaluation.wording import format_eps
from fastadv.ops.values import norm_name
from fastadv.trainers.run_directory import Description


def threat_of(
    recorded: Description | None, norm: str | None, eps: Any, bounds: tuple[float, float]
) -> tuple[Any, Any]:
    """Return the norm and the radius in which a model is judged.

    By default the norm is the norm of the run. In l2 and l1 the radius is by default the radius of the run, if the
    images are in 0..1, as a run's radius is in the units of such images. In linf the radius may stay None.
    """
    trained = _norm_of(recorded)
    norm = norm_name(trained if norm is None else norm)
    if eps is None and recorded is not None and norm == trained != "linf" and bounds == (0, 1):
        eps = recorded.recipe.get("eps")
    return norm, eps


def _norm_of(recorded: Description | None) -> str:
    """The norm in which a run was trained; linf if the run does not record it."""
    return "linf" if recorded is None else str(recorded.recipe.get("norm", "linf"))


def radii_of(eps: float | Sequence[float]) -> list[float]:
    """Return one radius or several as a list.

    Raises:
        ValueError: the list is empty.
    """
    radii = list(eps) if isinstance(eps, Sequence) else [eps]
    if not radii:
        raise ValueError(f"eps must be a radius or several, got {eps}")
    return radii


def sentence_about_radius(
    eps: float | Sequence[float] | None,
    radius: float,
    norm: str,
    report: Report,
    recorded: Description | None,
) -> str:
    """Return a sentence that says at which radius a model was judged, if the command named no radius."""
    if all(row.name == CLEAN or _has_no_radius(row) for row in report.rows):
        return "" if eps is None else "\neps was not used: there was no attack in a ball.\n"
    if eps is not None:
        return ""
    trained = None if recorded is None else recorded.recipe.get("eps")
    norm_trained = _norm_of(recorded)
    if norm_trained == norm != "linf":
        return f"\nJudged {radius_text(norm, radius)}, where the run was trained. --norm linf judges it in linf.\n"
    text = f"\nJudged {radius_text(norm, radius)}, the default."
    if trained is not None and (norm_trained, trained) != (norm, radius):
        there = format_eps(trained)
        if norm_trained != norm:
            there += f" --norm {norm_trained}"
        text += f" The run was trained {radius_text(norm_trained, trained)}: --eps {there} judges it there."
    else:
        text += " --eps names another radius."
    return text + "\n"


def _has_no_radius(row: Row) -> bool:
    return row.distances is not None and not row.distances.curve
