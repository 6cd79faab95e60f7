"""The position of a run, as it is counted and stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class Progress:
    """The position and the counters of a run.

    Attributes:
        epoch: epochs done.
        epoch_step: iterations done in the current epoch.
        step: iterations done in all.
        bad_steps: iterations without an update, because loss or gradient was not finite.
        bad_in_a_row: the number of consecutive bad iterations at the end.
        best_step: iteration of the best checkpoint so far; None before the first validation.
        best_score: score of the best checkpoint, an accuracy.
        validations_since_best: validations after the best checkpoint.
        averaged: epochs whose last weights are in the plain average (SWA).
    """

    epoch: int = 0
    epoch_step: int = 0
    step: int = 0
    bad_steps: int = 0
    bad_in_a_row: int = 0
    best_step: int | None = None
    best_score: float = -1.0
    validations_since_best: int = 0
    averaged: int = 0

    def restore(self, stored: dict[str, Any]) -> None:
        """Go back to a stored progress.

        Raises:
            TypeError: if it has a field that is unknown.
        """
        vars(self).update(vars(Progress(**renamed(stored))))


def renamed(progress: dict[str, Any]) -> dict[str, Any]:
    """Return a stored progress under the present names of the fields, which older versions named differently."""
    if "looks_since_best" in progress:
        progress = dict(progress)
        progress["validations_since_best"] = progress.pop("looks_since_best")
    return progress
