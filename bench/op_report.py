"""The measurements of `ops.py`, for reading: tables, progress, a comparison with an earlier run."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

import op_targets
from measure import machine_line, text_table
from op_rows import BOTH, COMPILED, COPY, EAGER, USUAL, USUAL_COMPILED

Results = dict[str, Any]  # pytest-benchmark's JSON
Entry = dict[str, Any]  # one of its benchmarks
Group = Mapping[str, Entry]  # those of a row by candidate

RIVALS = (EAGER, COMPILED, USUAL, USUAL_COMPILED)
HEADER = ["op", "shape", "dtype", "layout", "direction", "backend", "us", "+-%"]
HEADER += [*RIVALS, COPY, "GB/s", "of copy", "MB", "eager MB"]
_SHORT = {"float32": "f32", "bfloat16": "bf16", "float16": "f16", "float64": "f64"}


def report(results: Results) -> str:
    """The whole report for a terminal."""
    parts = [*head(results), "", table(results), "", *_legend()]
    if _on_cpu(results):
        parts += ["", targets(results)]
    return "\n".join(parts)


def markdown(results: Results) -> str:
    """The tables for a document."""
    groups = groups_of(results)
    parts = ["  \n".join(head(results))]
    if _on_cpu(results):
        parts.append(_markdown_table(op_targets.HEADER, op_targets.lines(groups)))
    return "\n\n".join([*parts, _markdown_table(HEADER, _lines(groups)), " ".join(_legend())])


def _on_cpu(results: Results) -> bool:
    """Whether the speeds that were asked for concern this run."""
    return results["machine_info"]["fastadv"]["device"] == "cpu"


def head(results: Results) -> list[str]:
    """Machine, bandwidth, and the rows missing from the tables, with reasons."""
    facts = results["machine_info"]
    bandwidth = facts["copy_bytes_per_second"] / 1e9
    lines = [
        machine_line(facts["fastadv"]),
        f"copy bandwidth, 256 MB: {bandwidth:.1f} GB/s, read and written counted",
    ]
    lines += [f"refused: {name}: {why}" for name, why in results.get("refused", {}).items()]
    for row, reasons in results.get("missing", {}).items():
        lines += [f"missing: {row}: {n}: {why.splitlines()[0]}" for n, why in reasons.items()]
    return lines


def table(results: Results) -> str:
    """One line per row and backend."""
    return text_table(HEADER, _lines(groups_of(results)))


def targets(results: Results) -> str:
    """The speeds asked for, and whether they are reached."""
    return text_table(op_targets.HEADER, op_targets.lines(groups_of(results)))


def _legend() -> list[str]:
    return [
        "us: median time of a call; +-%: half the distance of its quartiles; *: the backend that runs unforced.",
        "reference, compiled: the op's reference; usual: the common code; copy: as many bytes; each",
        "with its time in us and how many times the op's that is.",
        "GB/s: bytes that must be moved at least, over the time. MB: memory needed at the peak, results included;",
        "eager MB: the reference's, in direction both the usual code's.",
    ]


def groups_of(results: Results) -> dict[str, Group]:
    """The candidates of each row by name."""
    groups: dict[str, dict[str, Entry]] = {}
    for entry in results["benchmarks"]:
        groups.setdefault(entry["group"], {})[entry["extra_info"]["candidate"]] = entry
    return dict(groups)


def _lines(groups: Mapping[str, Group]) -> list[list[str]]:
    """Those of this package's backends; the others are in their columns."""
    return [
        _line(name, entry, group)
        for group in groups.values()
        for name, entry in group.items()
        if name == entry["extra_info"]["owner"] or name not in (*RIVALS, COPY)
    ]


def _line(name: str, entry: Entry, group: Group) -> list[str]:
    facts, seconds = entry["extra_info"], median(entry)
    return [
        f"{facts['op']} {facts['variant']}",
        "x".join(map(str, facts["shape"])),
        _SHORT[facts["dtype"]],
        facts["layout"],
        facts["direction"],
        f"{name} *" if name == facts["owner"] else name,
        _microseconds(entry),
        f"{50 * entry['stats']['iqr'] / seconds:.0f}",
        *(_beside(group.get(rival), entry) for rival in (*RIVALS, COPY)),
        f"{facts['bytes'] / seconds / 1e9:.1f}",
        f"{median(group[COPY]) / seconds:.2f}" if COPY in group else "",
        _megabytes(entry),
        _megabytes(group.get(USUAL if facts["direction"] == BOTH else EAGER)),
    ]


def _microseconds(entry: Entry) -> str:
    return f"{median(entry) * 1e6:.1f}"


def _beside(rival: Entry | None, entry: Entry) -> str:
    """A rival's time and how many times this one's that is."""
    if rival is None or rival is entry:
        return ""
    return f"{_microseconds(rival)} ({median(rival) / median(entry):.2f}x)"


def _megabytes(entry: Entry | None) -> str:
    peak = entry["extra_info"]["peak"] if entry else None
    return "" if peak is None else f"{peak / 1e6:.1f}"


def median(entry: Entry) -> float:
    """Seconds of a call."""
    return entry["stats"]["median"]


def _markdown_table(header: list[str], rows: list[list[str]]) -> str:
    rule = ["---" if i == 0 else "---:" for i in range(len(header))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


def progress(row: str, facts: Mapping[str, Any], owner: str) -> str:
    """A row in short, as soon as it is measured."""
    times = {name: statistics.median(f["times"]) for name, f in facts.items()}
    own = times.pop(owner, None)
    if own is None:
        return row
    ratios = (f"{name} takes {seconds / own:.2f}x" for name, seconds in times.items())
    return f"{row}: {', '.join((f'{own * 1e6:.1f} us', *ratios))}"


def comparison(earlier: Results, later: Results) -> str:
    """The measurements of both runs, side by side; a change counts where the quartiles do not overlap."""
    before = {entry["name"]: entry for entry in earlier["benchmarks"]}
    lines = []
    for entry in later["benchmarks"]:
        old = before.get(entry["name"])
        if old is not None and entry["extra_info"]["candidate"] != COPY:
            times = [_microseconds(e) for e in (old, entry)]
            ratio = f"{median(old) / median(entry):.2f}x"
            lines.append([entry["name"].partition("[")[2][:-1], *times, ratio, _change(old, entry)])
    head_line = f"compared with the run of {earlier['machine_info']['fastadv']['date']}"
    differing = _differing(earlier["machine_info"]["fastadv"], later["machine_info"]["fastadv"])
    if differing:
        head_line += f"; ANOTHER SETUP, so that times do not compare: {', '.join(differing)}"
    if not lines:
        return f"{head_line}\nnothing was measured in both"
    return f"{head_line}\n{text_table(['row', 'us then', 'us now', 'speedup', ''], lines)}"


def _change(old: Entry, new: Entry) -> str:
    if new["stats"]["q3"] < old["stats"]["q1"]:
        return "faster"
    return "slower" if new["stats"]["q1"] > old["stats"]["q3"] else ""


def _differing(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The facts about machine and versions in which two runs differ."""
    return [key for key in ("device", "gpu", "cpu", "packages") if old.get(key) != new.get(key)]
