"""A report for programs: JSON and CSV, with the same numbers as in the files of results."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict
from typing import Any

from fastadv.evaluation.reporting.masking import masking_records
from fastadv.evaluation.reporting.seeds import mean_and_deviation
from fastadv.evaluation.reporting.summary import Summary
from fastadv.evaluation.wording import bounds_text
from fastadv.plain_text import csv_cell

_FORMAT = 1
_COLUMNS = (
    *("run", "method", "network", "checkpoint", "data"),
    *("attack", "variant", "setting", "surrogate"),
    *("norm", "eps", "bounds", "median_distance", "mean_distance", "n", "correct"),
    *("accuracy", "low", "high", "sum", "mean", "ardist", "alpha", "steps", "after", "seed"),
    *("batch_size", "search", "status", "notes", "seconds", "device", "parameters"),
    *("multiply_adds", "weights", "images", "command", "date"),
)


def as_record(summary: Summary) -> dict[str, Any]:
    """The report as JSON types.

    Returns:
        ``results``: the entries of the files of results, each with the name that its run has in the report and its
        ``setting``: "no attack", "white box", "transfer", "no ball" or "no ball, transfer".
        ``trade_off``: Sum, mean and ARDist of every pair of clean and robust accuracy, in percent with intervals.
        ``series``: accuracies of runs that differ in the training's seed, with mean and standard deviation.
        ``masking_checks``: the findings on these weights and images, with their verdict in words.
        ``plot``: norm, eps and attack of the trade-off plot, or null.
    """
    plot = None
    if summary.radius is not None:
        norm, eps = summary.radius
        plot = {"norm": norm, "eps": eps, "attack": summary.robust}
    return {
        "format": _FORMAT,
        "plot": plot,
        "results": [
            {
                **result.to_dict(),
                "run": line.run.name,
                "method": line.run.method,
                "setting": result.setting,
            }
            for line, _, result in summary.listed()
        ],
        "trade_off": _trade_offs(summary),
        "series": _series(summary),
        "masking_checks": masking_records(summary.comparison),
    }


def to_json(summary: Summary) -> str:
    """The record as JSON text."""
    return json.dumps(as_record(summary), indent=2) + "\n"


def to_csv(summary: Summary) -> str:
    """The report as CSV, one line per result; accuracies are fractions; sum, mean and ardist are in percent."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for line, title, result in summary.listed():
        entry = result.to_dict() | {"run": line.run.name, "method": line.run.method}
        entry["setting"], distances = result.setting, result.row.distances
        if distances is not None:  # without a ball, eps is 0 in the row and has no meaning
            entry["eps"] = None
            entry["median_distance"], entry["mean_distance"] = distances.median, distances.mean
        entry["attack"], (entry["low"], entry["high"]) = entry["name"], entry["interval"]
        entry["bounds"] = bounds_text(result.bounds)
        entry["notes"], entry["after"] = "; ".join(entry["notes"]), "+".join(entry["after"])
        measured = summary.trade_off(line, title)
        for name in ("sum", "mean", "ardist"):
            measure = getattr(measured, name, None)
            entry[name] = "" if measure is None else measure.value
        writer.writerow({name: csv_cell(value) for name, value in entry.items()})
    return text.getvalue()


def _trade_offs(summary: Summary) -> list[dict[str, Any]]:
    found = []
    for line in summary.comparison.lines:
        for title in line.cells:
            measured = summary.trade_off(line, title)
            if measured is not None:
                threat = {"run": line.run.name, "norm": line.norm, "eps": line.eps}
                judged = {"checkpoint": line.subject.checkpoint, "data": line.subject.data}
                found.append({**threat, **judged, "attack": title, **asdict(measured)})
    return found


def _series(summary: Summary) -> list[dict[str, Any]]:
    found = []
    for series in summary.series:
        line = series.lines[0]
        spreads = {}
        for title in dict.fromkeys(title for one in series.lines for title in one.cells):
            values = series.accuracies(title)
            if values is not None:
                mean, deviation = mean_and_deviation(values)
                spreads[title] = {"values": values, "mean": mean, "std": deviation}
        found.append(
            {
                "runs": [one.run.name for one in series.lines],
                "method": series.method,
                "seeds": list(series.seeds),
                "norm": line.norm,
                "eps": line.eps if line.ball else None,
                "ball": line.ball,
                "surrogate": line.surrogate,
                "data": line.subject.data,
                "n": line.n,
                "accuracy_percent": spreads,
            }
        )
    return found
