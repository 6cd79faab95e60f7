"""One row of an evaluation's result: the accuracy under one attack, written and read as JSON types."""

from __future__ import annotations

import math
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from typing import Any, Literal

from fastadv.evaluation.distances import Distances
from fastadv.evaluation.metrics import wilson_interval
from fastadv.evaluation.wording import distances_text
from fastadv.evaluation.worst import WorstImages
from fastadv.fields import check_fields
from fastadv.ops.values import integer, limit, number

Status = Literal["ok", "suspect", "invalid"]
REFERENCE = "reference"
# How the note of a row begins whose model draws random numbers.
RANDOM = "the model draws random numbers: two passes over the same images differ"


@dataclass(frozen=True)
class Stage:
    """One attack of an ensemble.

    Attributes:
        name: name of the attack.
        correct: number of images still classified correctly after this attack and all before it.
        search: precision of this package's engine in the search, or ``"reference"``.
        refined: number of images that were broken only by float32 steps on the plain model or an exact copy, after
            a search in a narrower precision or on a copy of the model.
        unconfirmed: number of points that the engine misclassified and the plain model did not.
        seconds: wall-clock time.
        refinement_seconds: wall-clock time of these float32 steps, a part of ``seconds``.
    """

    name: str
    correct: int
    search: str = REFERENCE
    refined: int = field(default=0, compare=False)
    unconfirmed: int = field(default=0, compare=False)
    seconds: float = field(default=0.0, compare=False)
    refinement_seconds: float = field(default=0.0, compare=False)

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("correct", "refined", "unconfirmed", "seconds", "refinement_seconds"):
            limit(name, getattr(self, name))


@dataclass(frozen=True)
class Row:
    """Accuracy under one attack.

    Attributes:
        name: name of the attack.
        n: number of images evaluated.
        correct: number of images classified correctly under the attack.
        eps: radius of the ball, 0 without an attack and for an attack without a ball.
        seed: seed of the random numbers.
        seconds: wall-clock time.
        alpha: step size, where the attack has one.
        steps: number of steps, where the attack has one.
        status: ``"ok"``, ``"suspect"`` (may be too high) or ``"invalid"``.
        notes: warnings and violations, one sentence each.
        stages: for an ensemble, the images that withstood each of its attacks.
        search: for an ensemble, the precision of its search: ``"bf16"`` or ``"fp16"`` on the engine, ``"fp32"``,
            or ``"reference"``.
        variant: settings that other attacks of this name may not have, such as a constant, in words.
        surrogate: the model on which the adversarial images were made; empty where it was the judged model.
        distances: for an attack without a ball, the distances of its adversarial images.
        worst: adversarial images of the attack, where some are kept; JSON does not contain them.
    """

    name: str
    n: int
    correct: int
    eps: float
    seed: int
    seconds: float
    alpha: float | None = None
    steps: int | None = None
    status: Status = "ok"
    notes: tuple[str, ...] = ()
    stages: tuple[Stage, ...] = ()
    search: str = ""
    variant: str = ""
    surrogate: str = ""
    distances: Distances | None = None
    worst: WorstImages | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_fields(self)
        limit("eps", self.eps)
        if self.alpha is not None:
            limit("alpha", self.alpha)
        limit("seconds", self.seconds)
        wilson_interval(self.correct, self.n)  # checks the counts
        for stage in self.stages:
            wilson_interval(stage.correct, self.n)

    @property
    def accuracy(self) -> float:
        """Fraction of the images classified correctly."""
        return self.correct / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the accuracy, fractions."""
        return wilson_interval(self.correct, self.n)

    @property
    def title(self) -> str:
        """The attack's name, with its variant and its surrogate."""
        source = f" from {self.surrogate}" if self.surrogate else ""
        return self.name + (f" ({self.variant})" if self.variant else "") + source

    @property
    def is_white_box(self) -> bool:
        """Whether the attack was in a ball and on the judged model itself; also true without an attack."""
        return not self.surrogate and self.distances is None

    @property
    def is_random(self) -> bool:
        """Whether the model draws random numbers, so that even the clean accuracy depends on the seed."""
        return any(note.startswith(RANDOM) for note in self.notes)

    def line(self) -> str:
        """The row in one line of text."""
        low, high = self.interval
        text = (
            f"{self.title}: {100 * self.accuracy:.2f} % ({self.correct}/{self.n}, "
            f"95 % interval {100 * low:.2f} to {100 * high:.2f}), {self.seconds:.1f} s, {self.status}"
        )
        remarks = [
            *([] if self.distances is None else [distances_text(self.distances)]),
            *self.notes,
        ]
        return text + "".join(f"\n  {remark}" for remark in remarks)


def row_to_dict(row: Row) -> dict[str, Any]:
    """All figures of a row, with accuracy and interval written out; adversarial images are left out."""
    content = asdict(replace(row, worst=None))
    del content["worst"]
    return {**content, "accuracy": row.accuracy, "interval": row.interval}


def row_from_dict(entry: dict[str, Any]) -> Row:
    """Read a row back from an entry of ``Report.to_dict``.

    Raises:
        KeyError: when an entry is missing.
        TypeError: when an entry is of another type.
        ValueError: when a number is out of range.
    """
    # Earlier versions wrote no "search": ensembles, which have stages, ran by the reference.
    known: dict[str, Any] = {"search": REFERENCE if entry["stages"] else "", **entry}
    values = known_fields(Row, known)
    accuracy = entry.get("accuracy")
    whole = integer("correct", values["correct"], at_least=0), integer("n", values["n"], at_least=1)
    if accuracy is not None and not math.isclose(
        number("accuracy", accuracy), whole[0] / whole[1], abs_tol=1e-9
    ):
        raise ValueError(
            f"accuracy must be correct / n, {values['correct']} / {values['n']}, got {accuracy}: one of them was "
            "changed after they were written"
        )
    values["stages"] = tuple(Stage(**known_fields(Stage, stage)) for stage in entry["stages"])
    if values.get("distances") is not None:
        values["distances"] = Distances.from_dict(values["distances"])
    return Row(**{**values, "worst": None})


def known_fields(kind: Any, entry: dict[str, Any]) -> dict[str, Any]:
    """The values of an entry for the fields of a dataclass.

    Entries of other versions may have further fields, or lack newer fields.

    Raises:
        KeyError: when a field without a default is missing.
    """
    needed = [f.name for f in fields(kind) if f.default is f.default_factory is MISSING]
    for name in needed:
        entry[name]
    return {f.name: entry[f.name] for f in fields(kind) if f.name in entry}


def check_white_box(robust: Row) -> None:
    """Require an accuracy that can serve as a model's robust accuracy.

    Raises:
        ValueError: for adversarial images of a surrogate, and for an attack without a ball.
    """
    if not robust.is_white_box:
        raise ValueError(
            f"robust must be an attack in a ball on the judged model itself, got {robust.title!r}"
        )
