"""Entries of files of results that no evaluation writes: the file is named, and nothing is shown of it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from report_helpers import result

from fastadv.commands.report import run_report
from fastadv.evaluation import Report, Subject, add_results, load_results
from fastadv.evaluation.analyses.records import AnalysisRecord
from fastadv.evaluation.findings import Finding
from fastadv.evaluation.sanity_file import SanityResult, add_sanity_result, load_sanity_results
from fastadv.evaluation.transfer_table import TransferMatrix
from fastadv.evaluation.wording import format_eps

HUGE = 10**400  # JSON has integers of any length


def rewritten(file: Path, place: tuple[Any, ...], value: Any) -> None:
    """Put a value into a file of JSON, and take away the hashes of its entries."""
    content = json.loads(file.read_text())
    inner = content
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    for entry in (content, *content.get("rows", ()), *content.get("checks", ())):
        entry.pop("sha256", None)
    file.write_text(json.dumps(content))


STAGE = ("rows", 1, "stages", 0)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ((*STAGE, "name"), None),
        ((*STAGE, "name"), ["a"]),
        ((*STAGE, "search"), True),
        ((*STAGE, "seconds"), "x"),
        ((*STAGE, "seconds"), math.inf),
        ((*STAGE, "correct"), 301),
        ((*STAGE, "correct"), -1),
        ((*STAGE, "refined"), math.inf),
        (("rows", 1, "seconds"), math.nan),
        (("rows", 1, "alpha"), HUGE),
        (("rows", 1, "eps"), HUGE),
        (("rows", 1, "accuracy"), HUGE),
        (("rows", 1, "n"), HUGE),
        (("rows", 1, "correct"), HUGE),
        (("rows", 1, "versions"), {"torch": math.inf}),
        (("rows", 1, "bounds", 0), HUGE),
    ],
)
def test_a_result_that_cannot_be_is_named(
    place: tuple[Any, ...], value: Any, tmp_path: Path
) -> None:
    file = add_results(tmp_path / "eval.json", [result("clean", 271), result("autoattack", 123)])
    run_report([str(file)])
    rewritten(file, place, value)
    for read in (load_results, Report.load):
        with pytest.raises(ValueError, match=r"eval\.json: "):
            read(file)


@pytest.mark.parametrize("rows", [[1], [None], "text", 3, [{}]])
def test_rows_that_are_no_entries_are_named(rows: Any, tmp_path: Path) -> None:
    file = tmp_path / "eval.json"
    file.write_text(json.dumps({"format": 2, "rows": rows}))
    for read in (load_results, Report.load):
        with pytest.raises(ValueError, match=r"eval\.json: "):
            read(file)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("findings", 0, "check"), True),
        (("findings", 0, "message"), 3),
        (("findings", 0, "ok"), "yes"),
        (("findings", 0, "accuracies"), [[0.0, HUGE]]),
        (("eps",), math.nan),
        (("n",), "ten"),
    ],
)
def test_findings_that_cannot_be_are_named(
    place: tuple[Any, ...], value: Any, tmp_path: Path
) -> None:
    file = tmp_path / "eval.sanity.json"
    finding = Finding("eps", True, "it does not rise", ((0.0, 1.0), (0.1, 0.5)))
    add_sanity_result(file, SanityResult(Subject(), (finding,), 10, 0.1, "linf"))
    rewritten(file, ("checks", 0, *place), value)
    with pytest.raises(ValueError, match=r"eval\.sanity\.json: findings are damaged"):
        load_sanity_results(file)


def test_findings_of_a_later_version_are_read(tmp_path: Path) -> None:
    file = tmp_path / "eval.sanity.json"
    finding = Finding("eps", True, "it does not rise", ((0.0, 1.0),))
    add_sanity_result(file, SanityResult(Subject("run"), (finding,), 10, 0.1, "linf"))
    for place in (("mood",), ("subject", "mood"), ("findings", 0, "mood")):
        rewritten(file, ("checks", 0, *place), "later")
    (read,) = load_sanity_results(file)
    assert read.findings == (finding,) and read.subject.run == "run"


@pytest.mark.parametrize(("place", "value"), [("eps", math.nan), ("eps", HUGE), ("seconds", -1)])
def test_a_matrix_that_cannot_be_is_named(place: str, value: Any, tmp_path: Path) -> None:
    counts = ((1, 2), (2, 1))
    matrix = TransferMatrix("pgd-5", ("a", "b"), counts, (3, 3), 5, 0.1, "linf", (0.0, 1.0), 0)
    file = matrix.save(tmp_path / "m.json")
    rewritten(file, (place,), value)
    with pytest.raises(ValueError, match=r"m\.json: "):
        TransferMatrix.load(file)


@pytest.mark.parametrize(
    "read",
    [load_results, Report.load, load_sanity_results, TransferMatrix.load, AnalysisRecord.load],
)
def test_brackets_without_end_are_named(read: Callable[[Path], Any], tmp_path: Path) -> None:
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"deep\.json: "):
        read(tmp_path / "deep.json")


def test_a_mark_in_front_is_no_damage_and_a_pipe_is_no_file(tmp_path: Path) -> None:
    file = add_results(tmp_path / "eval.json", [result("clean", 271)])
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    assert [one.row.correct for one in load_results(file)] == [271]
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(OSError, match=r"a pipe or a device, and must be a file.*pipe\.json"):
        load_results(tmp_path / "pipe.json")


def test_a_radius_of_any_size_has_words() -> None:
    radii = (8 / 255, 128 / 255, 0.2, 1.0, 1e308)
    assert [format_eps(eps) for eps in radii] == ["8/255", "128/255", "0.2", "1", "1e+308"]


@pytest.mark.parametrize("content", [b"", b'{"format": 2, "rows": [', b"\xff\xfe", b"{}\0\0"])
def test_a_file_that_is_no_json_is_said_to_be_none(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(content)
    for read in (
        load_results,
        Report.load,
        load_sanity_results,
        AnalysisRecord.load,
        TransferMatrix.load,
    ):
        with pytest.raises(ValueError, match=r"a\.json: .*it is not valid JSON"):
            read(file)
