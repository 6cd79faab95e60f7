"""Every table and figure of the papers: its rows, its recipes, and a run of it in a second or two."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from reproduction_helpers import CLEAN, is_true, lines_of, small_item

from fastadv.cli.program import main
from fastadv.evaluation.metrics import ARREST_CIFAR10_POINTS
from fastadv.reproduction import (
    Item,
    ReproductionJob,
    RowSpec,
    all_items,
    find_item,
    find_scale,
    reproduce,
)
from fastadv.reproduction.cost import attack_passes, passes_of
from fastadv.reproduction.scales import TINY
from fastadv.reproduction.specs import CannotRun, RunSpec, resolve, spec, stack
from fastadv.trainers.unused import check_all_used

pytestmark = [pytest.mark.longest, pytest.mark.usefixtures("one_thread")]

IDS = {
    "arrest": "table1 table2 table3 table4 table5 figure1 figure3 figure4 figure5 figure6",
    "vfd": "table1 table2 figure2 figure3 figure4a figure4b vgg16",
    "afs": "table1 table2 table3 table4 table5 table6 figure3 figure4 figure5a figure5b figure6",
    "act": "table1 table2 table3 table4 table5 figure2 figure3-left figure3-right figure4",
}
ALL = [f"{paper}/{name}" for paper, names in IDS.items() for name in names.split()]
# As at the scale tiny, with fewer images and shorter attacks.
TINIEST = replace(
    TINY,
    epochs={**TINY.epochs, "standard": 4},
    numbers={**TINY.numbers, "train_images": 48, "batch_size": 24, "monitor_images": 8},
    attacks={
        **{"autoattack": "apgd-ce-2", "cwl2-1000": "cwl2-10", "min-pgd-20": "min-pgd-2"},
        **{"pgd-100": "pgd-4", "pgd-20": "pgd-3", "cw-20": "cw-3"},
    },
    test_images=12,
)


def facts_of(run: RunSpec) -> set[Any]:
    """What a training is, apart from its numbers and the count of its teachers."""
    names = tuple(name for name, _ in run.changes)
    words = {(name, value) for name, value in run.changes if isinstance(value, str | bool)}
    taught = {(run.method, fact) for _, teacher in run.teachers for fact in facts_of(teacher)}
    return {(run.method, names), run.repetition > 0, run.checkpoint} | words | taught


def few_rows() -> Mapping[str, Item]:
    """All items, each with its first row, and those in which its paper has something for the first time."""
    seen: set[Any] = set()
    found = {}
    for name, item in all_items().items():
        kept = []
        for row in item.rows:
            facts = {(item.paper, fact) for fact in facts_of(row.run)}
            if not kept or not facts <= seen:
                kept.append(row)
            seen |= facts
        labels = {row.label for row in kept}
        published = {
            data: {label: cells for label, cells in figures.items() if label in labels}
            for data, figures in item.published.items()
        }
        found[name] = replace(item, rows=tuple(kept), published=published)
    return found


FEW_ROWS = few_rows()


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all items, which share their trainings."""
    return tmp_path_factory.mktemp("reproduced")


def test_the_list_shows_every_item(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "--list"]) == 0
    shown = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert shown == ALL == list(all_items())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the model is right on")
@pytest.mark.parametrize("name", ALL)
def test_an_item_runs(name: str, out: Path, request: pytest.FixtureRequest) -> None:
    """With few rows, on few images; `--thorough` has all rows at the scale tiny."""
    thorough = request.config.getoption("--thorough")
    item, scale = (find_item(name), TINY) if thorough else (FEW_ROWS[name], TINIEST)
    done = reproduce(item, out=out, scale=scale)
    files = {file.suffix: file for file in done.files}
    assert [row.label for row in item.rows] == [line[0] for line in lines_of(files[".md"])]
    with open(files[".csv"]) as file:
        rows = list(csv.DictReader(file))
    places = [(row.label, column.label) for row in item.rows for column in item.columns]
    assert [(row["row"], row["column"]) for row in rows] == places
    for row in rows:
        if row["reason"]:
            assert row["mean"] == "" and is_true(row["reason"]), row
        else:
            assert float(row["mean"]) == float(row["mean"]), row
    measured = any(not row["reason"] for row in rows)
    assert (".png" in files) == measured
    if measured:
        assert files[".png"].read_bytes().startswith(b"\x89PNG")


def test_the_tables_have_the_rows_and_columns_of_the_papers() -> None:
    for name in ("vfd/table1", "vfd/table2", "vfd/vgg16"):
        labels = [row.label for row in find_item(name).rows]
        assert len(labels) == 21 and labels[:3] == ["Vanilla", "ALP", "ALP + KD"]
    table = find_item("arrest/table2")
    assert [row.label for row in table.rows] == [
        "ST",
        "AT",
        "AFT",
        "AFT + RGKD",
        "AFT + NR",
        "ARREST",
    ]
    assert [c.label for c in table.columns] == [
        "Clean (ResNet-18)",
        "AA (ResNet-18)",
        "Clean (WRN-34-10)",
        "AA (WRN-34-10)",
    ]
    assert [c.label for c in find_item("arrest/table1").columns] == ["Clean", "AA", "Sum", "ARDist"]
    assert {row.label for row in find_item("arrest/table1").rows} == set(ARREST_CIFAR10_POINTS)


@pytest.mark.parametrize("scale", ["paper", "small", "tiny"])
def test_every_row_has_a_recipe_that_trains(scale: str) -> None:
    chosen = find_scale(scale)
    found = 0
    for item in all_items().values():
        for row in item.rows:
            try:
                run = resolve(row.run, chosen, chosen.data, 0)
            except CannotRun as reason:
                assert is_true(f"cannot run: {reason}") or "model" in str(reason), reason
                continue
            for one in run.with_teachers():
                check_all_used(one.method, one.recipe)
                found += 1
    assert found > 150


def test_the_scale_paper_has_the_recipes_of_the_papers() -> None:
    paper = find_scale("paper")
    for row in find_item("arrest/table2").rows:
        run = resolve(row.run, paper, "cifar10", 0)
        default = run.method.recipe_class(**dict(row.run.changes))
        assert run.recipe == default and run.network == "resnet18"
    stacked = resolve(find_item("afs/table2").rows[0].run, paper, "cifar10", 0)
    assert stacked.network == "stack:" + "+".join(["wrn_28_10"] * 6)
    assert [t.recipe.eps for _, t in stacked.teachers] == [e / 255 for e in range(3, 9)]


def test_the_cost_is_that_of_the_methods() -> None:
    paper = find_scale("paper")
    assert passes_of(resolve(spec("pgd_at"), paper, "cifar10", 0)) == 100 * 23
    stacked = stack([spec("pgd_at", eps=0.01), spec("pgd_at", eps=0.02)])
    assert passes_of(resolve(stacked, paper, "cifar10", 0)) == 5 * 22
    assert attack_passes("pgd-20-5") == 200 and attack_passes("clean") == 1


def test_an_item_has_each_row_once_and_a_place_for_each_figure() -> None:
    row = RowSpec("AT", spec("pgd_at"))
    with pytest.raises(ValueError, match="rows of arrest/table9"):
        small_item(row, row)
    with pytest.raises(ValueError, match="have no place: ST"):
        Item("arrest", "t", "t", (row,), (CLEAN,), published={"cifar10": {"ST": {"Clean": 1.0}}})


def test_arrest_has_the_angles_of_its_data_set() -> None:
    angles = {"cifar10": (30.0, 37.5, 45.0), "cifar100": (30.0, 32.5, 35.0)}
    for name in ("table5", "figure1", "figure3", "figure4"):
        for data, phis in {**angles, "digits": angles["cifar10"]}.items():
            rows = find_item(f"arrest/{name}").on(data).rows
            runs = [dict(row.run.changes) for row in rows if row.run.method == "arrest"]
            assert {numbers["phi"] for numbers in runs} == set(phis)
            for row, phi in zip((r for r in rows if "phi" in r.label), phis * 2, strict=False):
                assert row.label.endswith(f"phi = {phi:g}") and ("phi", phi) in row.run.changes


def test_a_job_has_the_rows_of_its_data_set(tmp_path: Path) -> None:
    for data, last in (("cifar100", "phi = 35"), ("cifar10", "phi = 45")):
        job = ReproductionJob.of("arrest/table5", tmp_path, data, str(tmp_path))
        assert [row.label for row in job.item.rows][-1] == last


def test_mart_on_a_wide_network_has_the_numbers_for_it() -> None:
    (row,) = (row for row in find_item("afs/table4").rows if row.label == "MART")
    numbers = vars(resolve(row.run, find_scale("paper"), "cifar10", 0).recipe)
    assert {name: numbers[name] for name in ("epochs", "lr", "weight_decay", "beta")} == {
        "epochs": 90,
        "lr": 0.1,
        "weight_decay": 7e-4,
        "beta": 6.0,
    }
    assert numbers["schedule"].milestones == (74, 89) and not numbers["code_constants"]
