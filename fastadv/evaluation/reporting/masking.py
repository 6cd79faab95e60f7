"""The findings of masking checks in a report, for the weights and images that it shows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fastadv.evaluation.comparison import Comparison, EvaluatedRun, radius_text
from fastadv.evaluation.findings import verdict_of
from fastadv.evaluation.reporting.tables import Table
from fastadv.evaluation.results import Subject
from fastadv.evaluation.sanity_file import SanityResult, sanity_entry


def masking_checks_of(comparison: Comparison) -> Iterable[tuple[EvaluatedRun, SanityResult]]:
    """The findings on the same weights and images as a result of their run."""
    for run in comparison.runs:
        judged = {_judged(result.subject) for result in run.results}
        for check in run.checks:
            if _judged(check.subject) in judged:
                yield run, check


def masking_table(comparison: Comparison) -> Table:
    """One line per check, with its verdict in words."""
    rows = [
        (
            *(run.name, check.subject.checkpoint or "-", check.subject.data or "-", str(check.n)),
            *(radius_text(check.norm, check.eps).removeprefix("at "), str(check.seed)),
            *(finding.check, finding.verdict, finding.message),
        )
        for run, check in masking_checks_of(comparison)
        for finding in check.findings
    ]
    heading = ("run", "checkpoint", "data", "n", "radius", "seed", "check", "verdict", "finding")
    return Table("Signs of gradient masking", heading, tuple(rows), tuple(verdicts(comparison)))


def verdicts(comparison: Comparison) -> list[str]:
    """The verdicts of the checks, one sentence for each `SanityResult`."""
    shown = [
        f"{run.name}, masking checks {radius_text(check.norm, check.eps)} on {check.n} images of "
        f"{check.subject.data or 'unknown data'}{_how(check)}: {verdict_of(check.findings)}."
        for run, check in masking_checks_of(comparison)
    ]
    kept = {id(check) for _, check in masking_checks_of(comparison)}
    left = [run.name for run in comparison.runs for check in run.checks if id(check) not in kept]
    return shown + [
        f"{name} has masking checks of other weights or images, which are left out here."
        for name in dict.fromkeys(left)
    ]


def masking_records(comparison: Comparison) -> list[dict[str, Any]]:
    """The findings as JSON types, each with the name that its run has in the report and the verdict in words."""
    return [
        {**sanity_entry(check), "run": run.name, "verdict": verdict_of(check.findings)}
        for run, check in masking_checks_of(comparison)
    ]


def _judged(subject: Subject) -> tuple[str, str]:
    return subject.weights, subject.images


def _how(check: SanityResult) -> str:
    parts = [f"with images made on {check.surrogate}"] if check.surrogate else []
    parts += [f"with {check.eot} passes for each gradient"] if check.eot > 1 else []
    return "".join(f", {part}" for part in parts)
