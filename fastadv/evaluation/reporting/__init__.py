"""Reports on several runs: tables, pictures and model cards, in several formats."""

from __future__ import annotations

from fastadv.evaluation.reporting.cards import model_cards
from fastadv.evaluation.reporting.masking import verdicts
from fastadv.evaluation.reporting.records import as_record, to_csv, to_json
from fastadv.evaluation.reporting.summary import Summary
from fastadv.evaluation.reporting.tables import Table, aligned, markdown
from fastadv.evaluation.reporting.writer import write_report

__all__ = [
    "Summary",
    "Table",
    "aligned",
    "as_record",
    "markdown",
    "model_cards",
    "to_csv",
    "to_json",
    "verdicts",
    "write_report",
]
