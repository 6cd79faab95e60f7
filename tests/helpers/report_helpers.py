"""Results for the tests of reports."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fastadv.evaluation import Result, Row, Stage, Subject

EPS = 8 / 255


def result(name: str, correct: int, eps: float = EPS, **changes: Any) -> Result:
    subject = Subject(
        *("at", "pgd_at", "small_cnn", "step_000010", "a1" * 32, "digits test", "b2" * 32, 56554)
    )
    alpha = eps / 4 if name.startswith("pgd") else None
    stages: tuple[Stage, ...] = ()
    if name == "autoattack":
        stages = (Stage("apgd-ce", correct + 9, "bf16"), Stage("square", correct, "bf16"))
    row = Row(
        *(name, 300, correct, 0.0 if name == "clean" else eps, 5, 1.25, alpha),
        stages=stages,
        search="bf16" if stages else "",
    )
    plain = Result(
        *(subject, row, "linf", (0.0, 1.0), 256, "cpu", {"torch": "2.13"}),
        command="fastadv eval at --attacks 'a b'",
        date="2026-01-02T03:04:05+00:00",
    )
    return replace(plain, **changes)


def by_heading(table: Any) -> list[dict[str, str]]:
    return [dict(zip(table.heading, row, strict=True)) for row in table.rows]
