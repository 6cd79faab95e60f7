"""The file of findings of masking checks, to which later checks add."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastadv.digest import sealed, unsealed
from fastadv.evaluation.findings import Finding, findings_text
from fastadv.evaluation.result_row import known_fields
from fastadv.evaluation.results import Subject
from fastadv.fields import check_fields
from fastadv.files import json_of, write_atomically
from fastadv.locks import rewriting
from fastadv.ops.values import limit

_FORMAT = 1


@dataclass(frozen=True)
class SanityResult:
    """The findings on one model, with everything that they depend on.

    Attributes:
        subject: the judged model and data.
        findings: findings of the checks.
        n: number of images.
        eps: radius of the ball.
        norm: norm of the ball.
        seed: seed of the random numbers.
        surrogate: the name of the surrogate; empty without one.
        eot: number of passes for each gradient.
        bounds: range of image values.
    """

    subject: Subject
    findings: tuple[Finding, ...]
    n: int
    eps: float
    norm: str
    seed: int = 0
    surrogate: str = ""
    eot: int = 1
    bounds: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        check_fields(self)
        limit("eps", self.eps)

    @property
    def key(self) -> tuple[Any, ...]:
        """Everything that the findings depend on. A result replaces an earlier result with the same key."""
        subject = self.subject
        model = (subject.network, subject.weights, subject.checkpoint)
        judged = (*model, subject.data, subject.images, self.n)
        return (*judged, self.eps, self.norm, self.bounds, self.seed, self.surrogate, self.eot)

    def text(self) -> str:
        """The findings in words."""
        return findings_text(self.findings, self.n, self.eps, self.norm)


def sanity_file_of(results: Path) -> Path:
    """The file of findings that belongs to a file of results."""
    return results.with_suffix(".sanity.json")


def load_sanity_results(path: str | os.PathLike[str]) -> list[SanityResult]:
    """Read the findings that a file holds.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is damaged or something else; the message names the file.
    """
    try:
        content = json_of(path)
        if content["format"] != _FORMAT:
            raise ValueError(f"findings must have format {_FORMAT}, got {content['format']!r}")
        return [_from_dict(unsealed(entry)) for entry in content["checks"]]
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{os.fspath(path)}: findings are damaged: {error}") from error


def add_sanity_result(path: str | os.PathLike[str], result: SanityResult) -> Path:
    """Add findings to a file, in place of earlier findings with the same key.

    Raises:
        ValueError: when the file exists and is damaged; it is not changed.
        OSError: when the file cannot be written.
    """
    with rewriting(path) as target:
        known: Sequence[SanityResult] = load_sanity_results(target) if target.exists() else ()
        merged = {one.key: one for one in (*known, result)}
        content = {
            "format": _FORMAT,
            "checks": [sealed(sanity_entry(one)) for one in merged.values()],
        }
        return write_atomically(target, json.dumps(content, indent=2) + "\n")


def sanity_entry(result: SanityResult) -> dict[str, Any]:
    """Findings as JSON types, each with its verdict."""
    content = asdict(result)
    for entry, finding in zip(content["findings"], result.findings, strict=True):
        entry["verdict"] = finding.verdict
    return content


def _from_dict(entry: dict[str, Any]) -> SanityResult:
    findings = tuple(
        Finding(
            found["check"],
            found["ok"],
            found["message"],
            tuple((value, share) for value, share in found["accuracies"]),
        )
        for found in entry["findings"]
    )
    bounds = tuple(entry.get("bounds", (0.0, 1.0)))
    subject = Subject(**known_fields(Subject, entry["subject"]))
    parts = {"subject": subject, "findings": findings, "bounds": bounds}
    return SanityResult(**{**known_fields(SanityResult, entry), **parts})
