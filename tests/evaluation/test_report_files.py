"""What `fastadv report --out` writes: every file has the results' numbers, and the page needs nothing else."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from report_helpers import EPS, result

from fastadv.cli import main
from fastadv.commands import run_report
from fastadv.evaluation import (
    Report,
    add_results,
    load_results,
    wilson_interval,
)
from fastadv.evaluation.comparison import Comparison, EvaluatedRun
from fastadv.evaluation.reporting import Summary, model_cards
from fastadv.evaluation.reporting.gallery import galleries
from fastadv.evaluation.worst import WorstImages

pytest.importorskip("matplotlib")

INTERVAL = "[{:.2f}, {:.2f}]".format(*(100 * end for end in wilson_interval(137, 300)))
NAME = "we|ird_<net> & 50%"


RESULTS = [
    result("clean", 271),
    result("pgd-20", 137),
    result("pgd-20", 211, eps=3 / 255),
    result("pgd-20", 19, eps=16 / 255),
    result("autoattack", 123),
    result("cw-20", 131, after=("pgd-20",)),
    result("pgd-20", 101, eps=0.5, norm="l2"),
]


class Tables(HTMLParser):
    """The tables of a page as lists of cells, and everything that the page refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.references: list[str] = []
        self.tags: list[str] = []
        self._title, self._open = "", ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [v or "" for k, v in attrs if k in ("src", "srcset", "href", "data")]
        if tag == "h2":
            self._open, self._title = "h2", ""
        elif tag == "table":
            self.tables[self._title] = []
        elif tag == "tr":
            self.tables[self._title].append([])
        elif tag in ("td", "th"):
            self._open = tag
            self.tables[self._title][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("h2", "td", "th"):
            self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open == "h2":
            self._title += data
        elif self._open:
            self.tables[self._title][-1][-1] += data

    def rows(self, title: str) -> list[dict[str, str]]:
        heading, *rows = self.tables[title]
        return [dict(zip(heading, row, strict=True)) for row in rows]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of two files of results, one of which has worst images."""
    folder = tmp_path_factory.mktemp("report")
    images = torch.rand(3, 3, 8, 8)
    two = torch.tensor([2, 3, 1])
    worst = WorstImages(
        *(images, (images + 0.03).clamp(0, 1), two, two + 1),
        *(torch.tensor([0.9, 0.8, 0.7]), torch.tensor([0.05, 0.1, 0.2]), torch.tensor([7, 8, 9])),
    )
    worst.save(folder / "worst" / "pgd.npz")
    found = [RESULTS[0], replace(RESULTS[1], worst_file="worst/pgd.npz"), *RESULTS[2:]]
    add_results(folder / f"{NAME.replace('/', '')}.json", found)
    add_results(folder / "other.json", RESULTS)
    files = [str(folder / f"{NAME}.json"), str(folder / "other.json")]
    run_report(files, out=str(folder / "out"), robust="autoattack")
    return folder / "out"


@pytest.mark.slow
def test_every_file_is_there_and_whole(written: Path) -> None:
    names = sorted(path.relative_to(written).as_posix() for path in written.rglob("*.*"))
    plots = [name for name in names if name.endswith(".png")]
    assert plots == ["over_eps_pgd-20_linf.png", "trade_off.png"]
    assert {f"report.{suffix}" for suffix in ("md", "csv", "tex", "json", "html")} <= {*names}
    assert sum(name.startswith("cards/") for name in names) == 8
    assert (written / "trade_off.png").read_bytes()[:4] == b"\x89PNG"


def test_every_cell_of_the_page_is_that_of_the_results(written: Path) -> None:
    page = Tables((written / "report.html").read_text())
    rows = page.rows("All results")
    entries = json.loads((written.parent / "other.json").read_text())["rows"]
    of_run = [row for row in rows if row["run"] == "other.json"]
    assert len(rows) == 2 * len(entries) and len(of_run) == len(entries)
    for entry in entries:
        attacked = entry["name"] != "clean"
        (row,) = [
            row
            for row in of_run
            if row["attack"] == entry["name"]
            and row["norm"] == (entry["norm"] if attacked else "-")
            and row["eps"] == (shown(entry["eps"]) if attacked else "-")
        ]
        low, high = entry["interval"]
        assert row == {
            "run": "other.json",
            "checkpoint": entry["checkpoint"],
            "data": entry["data"],
            "attack": entry["name"],
            "variant": "-",
            "setting": "white box" if attacked else "no attack",
            "surrogate": "-",
            "accuracy %": f"{100 * entry['accuracy']:.2f}",
            "95 % interval": f"[{100 * low:.2f}, {100 * high:.2f}]",
            "right": str(entry["correct"]),
            "of": str(entry["n"]),
            "norm": entry["norm"] if attacked else "-",
            "eps": shown(entry["eps"]) if attacked else "-",
            "bounds": "0 1",
            "median distance": "-",
            "mean distance": "-",
            "alpha": "-" if entry["alpha"] is None else f"{entry['alpha']:.6g}",
            "steps": "-",
            "after": "+".join(entry["after"]) or "-",
            "seed": str(entry["seed"]),
            "batch": str(entry["batch_size"]),
            "search": entry["search"] or "-",
            "status": entry["status"],
            "seconds": f"{entry['seconds']:.1f}",
            "date": entry["date"],
        }
    (line,) = [
        row for row in page.rows("Accuracy") if row["run"] == "other.json" and row["eps"] == "8/255"
    ]
    assert line["clean %"] == cell(entries[0]) and line["pgd-20 %"] == cell(entries[1])
    assert line["autoattack %"] == cell(entries[4]) and line["n"] == "300"
    stages = page.rows("AutoAttack, stage by stage")
    assert [row["left %"] for row in stages] == [f"{100 * c / 300:.2f}" for c in (132, 123)] * 2
    assert [row["broken"] for row in stages] == [str(271 - 132), "9"] * 2
    (measured,) = [
        row
        for row in page.rows("Trade-off")
        if row["run"] == "other.json" and row["eps"] == "8/255"
    ]
    record = json.loads((written / "report.json").read_text())
    (same,) = [
        one
        for one in record["trade_off"]
        if (one["run"], one["attack"], one["eps"]) == ("other.json", "autoattack", EPS)
    ]
    for name in ("Sum", "mean"):
        value, low, high = (same[name.lower()][key] for key in ("value", "low", "high"))
        assert measured[name] == f"{value:.2f} [{low:.2f}, {high:.2f}]"
    assert same["sum"]["value"] == pytest.approx(100 * (271 + 123) / 300) and same["ardist"] is None


def shown(eps: float) -> str:
    return f"{round(255 * eps)}/255" if eps < 0.1 else "0.5"


def cell(entry: dict[str, Any]) -> str:
    low, high = entry["interval"]
    return f"{100 * entry['accuracy']:.2f} [{100 * low:.2f}, {100 * high:.2f}]"


def test_the_page_needs_nothing_but_itself(written: Path) -> None:
    text = (written / "report.html").read_text()
    page = Tables(text)
    assert len(page.references) == 4 + 3 * 3  # two plots in light and dark, three images of three
    assert all(ref.startswith("data:image/png;base64,iVBOR") for ref in page.references)
    assert not {"script", "link", "iframe", "object"} & {*page.tags}
    assert "url(" not in text and "@import" not in text
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text
    assert "<net>" not in text and "we|ird_&lt;net&gt; &amp; 50%" in text
    assert "No. 7: class 2 (5.0 %) taken for 3 (90.0 %); difference x 10" in text


def test_csv_and_json_have_all_of_the_results(written: Path) -> None:
    lines = list(csv.DictReader(io.StringIO((written / "report.csv").read_text())))
    record = json.loads((written / "report.json").read_text())
    entries = json.loads((written.parent / "other.json").read_text())["rows"]
    ours = [one for one in record["results"] if one["run"] == "other.json"]
    for entry in entries:
        del entry["sha256"]
        entry["setting"] = "no attack" if entry["name"] == "clean" else "white box"
    by_key = {(e["name"], e["norm"], e["eps"]): e | {"run": "other.json"} for e in entries}
    assert {(e["name"], e["norm"], e["eps"]): e for e in ours} == by_key
    for line in (line for line in lines if line["run"] == "other.json"):
        entry = by_key[line["attack"], line["norm"], float(line["eps"])]
        assert float(line["accuracy"]) == entry["accuracy"]
        assert [float(line["low"]), float(line["high"])] == entry["interval"]
        assert (line["command"], line["weights"]) == (entry["command"], entry["weights"])
    assert record["plot"] == {"norm": "linf", "eps": EPS, "attack": "autoattack"}


def test_latex_is_ruled_and_escaped(written: Path) -> None:
    text = (written / "report.tex").read_text()
    assert text.count(r"\toprule") == text.count(r"\bottomrule") == text.count(r"\begin{table}")
    assert r"we\textbar{}ird\_\textless{}net\textgreater{} \& 50\%.json & pgd\_at" in text
    assert rf"45.67 {{\scriptsize {INTERVAL}}}" in text
    for row in re.findall(r"^    (?!\\)(.*) \\\\$", text, re.MULTILINE):
        assert not re.search(r"(?<!\\)[%#_]", row) and "|" not in row
    columns = [len(spec) for spec in re.findall(r"\\begin\{tabular\}\{([lr]+)\}", text)]
    bodies = re.findall(r"\\midrule\n(.*?)\n +\\bottomrule", text, re.DOTALL)
    for width, body in zip(columns, bodies, strict=True):
        assert {len(re.findall(r"(?<!\\)&", row)) + 1 for row in body.splitlines()} == {width}


def test_markdown_has_the_intervals(written: Path) -> None:
    text = (written / "report.md").read_text()
    assert f"| 45.67 {INTERVAL} |" in text and r"we\|ird_&lt;net>" in text
    assert "## AutoAttack, stage by stage" in text


def test_a_card_per_model_and_threat(written: Path) -> None:
    card = json.loads((written / "cards" / "other.json-linf-8_255.json").read_text())
    entry = json.loads((written.parent / "other.json").read_text())["rows"][4]
    assert card["architecture"] == "small_cnn" and card["parameters"] == 56554
    assert card["threat"] == {"norm": "linf", "eps": EPS, "eps_text": "8/255", "bounds": [0, 1]}
    assert card["weights_sha256"] == entry["weights"] and card["data"]["images"] == 300
    assert card["clean_accuracy"]["accuracy"] == 271 / 300
    robust = card["robust_accuracy"]
    for name in (
        "accuracy",
        "correct",
        "search",
        "seed",
        "batch_size",
        "versions",
        "command",
        "date",
    ):
        assert robust[name] == entry[name]
    assert robust["interval_95"] == entry["interval"] and robust["version"] == "standard"
    assert {one["attack"] for one in card["attacks"]} == {"pgd-20", "autoattack", "cw-20"}
    weaker = json.loads((written / "cards" / "other.json-l2-0.5.json").read_text())
    assert weaker["robust_accuracy"]["attack"] == "pgd-20"
    assert weaker["robust_accuracy"]["version"] is None


def test_only_what_all_runs_have_is_plotted_and_why_not_is_said(tmp_path: Path) -> None:
    file = tmp_path / "eval.json"
    add_results(file, [result("clean", 271), *(result("pgd-20", 100, eps=e) for e in (0.01, 0.02))])
    text = run_report([str(file)], out=str(tmp_path / "out"))
    assert "There is no trade-off plot: eps must name one radius" in text
    assert not (tmp_path / "out" / "trade_off.png").exists()
    assert "There is no trade-off plot" in (tmp_path / "out" / "report.html").read_text()
    assert (tmp_path / "out" / "over_eps_pgd-20_linf.png").is_file()


def test_a_name_that_leads_out_of_the_folder_is_not_read(tmp_path: Path) -> None:
    one = torch.ones(1, dtype=torch.int64)
    picture = torch.rand(1, 1, 4, 4)
    worst = WorstImages(picture, picture, one, one, one.float(), one.float(), one)
    worst.save(tmp_path / "outside.npz")
    worst.save(tmp_path / "inside" / "a.npz")
    for name, count in (("../outside.npz", 0), (str(tmp_path / "outside.npz"), 0), ("a.npz", 1)):
        results = (result("clean", 9), result("pgd-20", 5, worst_file=name))
        run = EvaluatedRun("r", "m", "n", results, folder=tmp_path / "inside")
        assert len(galleries(Comparison([run]), None)) == count
    assert model_cards(Summary(Comparison([run])))["r-linf-8_255.json"]["name"] == "r"


def test_files_of_earlier_versions_and_of_later_ones_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = (result("clean", 90).row, result("pgd-20", 40).row)
    old = Report(rows, "Net", "digits test", batch_size=256).save(tmp_path / "old.json")
    new = add_results(tmp_path / "new.json", RESULTS)
    content = json.loads(new.read_text())
    for entry in content["rows"]:
        entry["mood"] = "later"  # of a later version
        for name in ("command", "date", "worst_file", "parameters", "sha256"):
            del entry[name]  # of an earlier one
        for stage in entry["stages"]:
            stage["queries"] = 7
    new.write_text(json.dumps(content))
    assert [one.row for one in load_results(new)] == [one.row for one in RESULTS]
    assert main(["report", str(old), str(new), "--out", str(tmp_path / "out"), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert [one["run"] for one in record["results"]].count("old.json") == 2
    assert (tmp_path / "out" / "report.html").is_file()
