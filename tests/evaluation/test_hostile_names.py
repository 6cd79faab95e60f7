"""Names of runs and data may hold anything: no format of a report takes them for its own signs."""

from __future__ import annotations

import csv
import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from report_helpers import result

from fastadv.cli import main
from fastadv.evaluation import add_results, load_results
from fastadv.evaluation.comparison import Comparison, EvaluatedRun
from fastadv.evaluation.reporting import Summary, aligned
from fastadv.evaluation.reporting.latex import latex
from fastadv.evaluation.reporting.pages import page
from fastadv.evaluation.reporting.records import to_csv, to_json
from fastadv.evaluation.reporting.tables import markdown
from fastadv.plain_text import csv_cell, markdown_text, one_line

# The last is the name of a folder whose bytes are no UTF-8, as Python reads it.
BREAKING = ["two\nlines", "a\rb", "\x1b[2Jgone", "a\u2028b", "\u202eback", "caf\udce9"]


def summary_of(name: str) -> Summary:
    found = [result("clean", 271), result("pgd-20", 137)]
    subject = replace(found[0].subject, data=name, checkpoint=name)
    results = tuple(replace(one, subject=subject) for one in found)
    return Summary(Comparison([EvaluatedRun(name, name, name, results)]))


@pytest.mark.parametrize("name", BREAKING)
def test_no_name_breaks_a_line_of_a_report(name: str) -> None:
    summary, plain = summary_of(name), one_line(name)
    texts = {
        "md": markdown(summary.tables, name),
        "tex": latex(summary.printed),
        "html": page(name, name, tables=summary.tables, plots=[], galleries=[]),
        "csv": to_csv(summary),
        "text": aligned(summary.comparison.cells()) + "\n",
    }
    for kind, text in texts.items():
        assert all(letter.isprintable() or letter == "\n" for letter in text), kind
        text.encode()
    assert len(texts["text"].splitlines()) == 2
    rows = list(csv.DictReader(io.StringIO(texts["csv"], newline="")))
    assert [row["run"] for row in rows] == [plain] * 2
    assert [row["correct"] for row in rows] == ["137", "271"]
    assert json.loads(to_json(summary))["results"][0]["run"] == name


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_a_table_is_printed_in_every_encoding(
    encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "modèle.json"
    add_results(file, [result("clean", 271), result("pgd-20", 137)])
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding=encoding))
    assert main(["report", str(file)]) == 0
    name = "modèle" if encoding == "utf-8" else r"mod\xe8le"
    assert name in shown.getvalue().decode(encoding)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("[y](http://a)", r"[y\](http://a)"),
        ("*a* b_c_d", r"\*a\* b_c_d"),
        ("_a_ b_c", r"\_a_ b_c"),
        (r"a\|b", r"a\\\|b"),
        ("$x$ `y` ~~z~~", r"\$x\$ \`y\` \~\~z\~\~"),
        ("&lt;b> R&D <b>", "&amp;lt;b> R&D &lt;b>"),
        ("[x] done", r"\[x] done"),
        ("45.67 [40.12, 51.32]", "45.67 [40.12, 51.32]"),
    ],
)
def test_markdown_shows_a_name_as_it_is(text: str, shown: str) -> None:
    assert markdown_text(text) == shown


def test_a_row_of_latex_is_no_argument_of_the_row_before() -> None:
    for name in ("[tag] run", "*star"):
        body = latex([summary_of(name).accuracies()]).split(r"\midrule")[1]
        assert body.strip().startswith("{}" + name)
    assert "-{}-eot" in latex([summary_of("--eot").accuracies()])


def test_a_cell_of_csv_is_one_line() -> None:
    assert csv_cell("a\rb\nc") == "a b c" and csv_cell("\t=1") == "' =1"


def test_the_report_of_a_folder_whose_name_is_no_utf8(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    from fastadv.cli import main
    from fastadv.evaluation import add_results

    folder = tmp_path / "caf\udce9"
    file = add_results(folder / "eval.json", [result("clean", 271), result("pgd-20", 137)])
    assert main(["report", str(file), "--out", str(tmp_path / "out")]) == 0
    assert "90.33" in capsys.readouterr().out
    assert len(load_results(file)) == 2 and "90.33" in (tmp_path / "out/report.md").read_text()
