"""Tables at the scale tiny: what stands in them, what they share, and that a kill loses nothing."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import Started
from reproduction_helpers import lines_of, small_item, tiny

import fastadv
from fastadv.cli.program import main
from fastadv.data import load_dataset
from fastadv.evaluation import load_results, wilson_interval
from fastadv.reproduction import (
    Cell,
    Column,
    Item,
    MeasuredCell,
    ReproductionJob,
    RowSpec,
    find_item,
    find_scale,
    reproduce,
)
from fastadv.reproduction.measures import Accuracy, SizeMeasure
from fastadv.reproduction.specs import resolve, spec, stack
from fastadv.reproduction.tables import NOT_AT_HAND
from fastadv.reproduction.writers import markdown
from fastadv.trainers import load_model, methods
from fastadv.trainers.checkpoint import checkpoints_in
from fastadv.trainers.pgd_at import PGDAT

pytestmark = [pytest.mark.longest, pytest.mark.usefixtures("one_thread")]
PGD_20 = Column("PGD-20", Accuracy("pgd-20"))


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all items, which share their trainings."""
    return tmp_path_factory.mktemp("reproduced")


@pytest.mark.slow
def test_the_paper_s_figures_stand_beside_ours(out: Path) -> None:
    table = tiny("arrest/table2", out).table
    assert table.cell("ARREST", "AA (WRN-34-10)").paper == 50.20
    assert table.cell("ST", "Clean (WRN-34-10)").paper is None
    first = lines_of(tiny("arrest/table2", out).files[0])[0]
    assert first[2] == "94.53" and first[6] == NOT_AT_HAND
    with pytest.raises(KeyError, match="no cell 'ARREST', 'PGD'"):
        table.cell("ARREST", "PGD")
    assert f"figures are {NOT_AT_HAND}" in markdown(tiny("arrest/table5", out).table)


@pytest.mark.slow
def test_what_is_there_is_used_again(out: Path) -> None:
    first = tiny("act/table1", out)
    before = {file: file.read_bytes() for file in first.files}
    again = tiny("act/table1", out)
    assert again.trained == () and again.judged == 0
    assert {file: file.read_bytes() for file in again.files} == before
    tiny("arrest/table2", out)
    assert tiny("arrest/table3", out).trained == ()  # the models of table 2


@pytest.mark.slow
@pytest.mark.parametrize("option", [("--norm", "l2"), ("--alpha", "0.0001")])
def test_what_a_user_has_judged_by_other_options_gets_into_no_table(
    out: Path, option: tuple[str, str]
) -> None:
    item = Item("act", "table9", "pgd-20", (RowSpec("ST", spec("standard")),), (PGD_20,))
    first = tiny(item, out)
    run = ReproductionJob.of(item, out, scale="tiny").store.path(
        resolve(item.rows[0].run, find_scale("tiny"), "digits", 0)
    )
    words = ["--attacks", "pgd-20", "--eps", "0.1", "--max_examples", "30", "--quiet"]
    assert main(["eval", str(run), *words, *option]) == 0
    again = tiny(item, out)
    assert again.judged == 0 and again.trained == ()
    mean = again.table.cell("ST", "PGD-20").mean
    assert mean is not None and mean == first.table.cell("ST", "PGD-20").mean < 50


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the model is right on")
def test_a_cell_is_what_evaluate_finds(out: Path) -> None:
    scale, images = find_scale("tiny"), load_dataset("digits").test
    whole = find_item("vfd/table2")
    item = replace(whole, rows=whole.rows[6:7], columns=whole.columns[:1])
    store = ReproductionJob.of(item, out, scale="tiny").store
    table, n = tiny(item, out).table, scale.test_images
    judged = load_model(store.path(resolve(item.rows[0].run, scale, "digits", 0)))
    source = item.columns[0].measure.needs()[0]
    surrogate = load_model(store.path(resolve(source, scale, "digits", 0)))
    report = fastadv.evaluate(
        judged, images, "pgd-20", eps=0.1, max_examples=n, surrogate=surrogate, progress=False
    )
    assert item.rows[0].label == "TRADES"
    cell = table.cell("TRADES", item.columns[0].label)
    assert cell.mean == 100 * report.rows[0].accuracy
    assert cell.interval == tuple(100 * end for end in wilson_interval(report.rows[0].correct, n))


@pytest.mark.slow
@pytest.mark.processes
def test_a_killed_reproduction_goes_on_where_it_was(out: Path, tmp_path: Path) -> None:
    undisturbed = tiny("arrest/table3", out)
    command = ["-m", "fastadv", "reproduce", "arrest/table3", "--scale", "tiny"]
    process = Started(  # with one thread, as many as here: sums depend on the number
        [*command, "--quiet", "--out", str(tmp_path)], {**os.environ, "OMP_NUM_THREADS": "1"}
    )
    deadline = time.monotonic() + 120
    while not half_trained(tmp_path):
        assert process.poll() is None and time.monotonic() < deadline, "it ended before the kill"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    whole = {file.parent.name for file in tmp_path.glob("runs/*/reproduction.json")}
    assert half_trained(tmp_path) and whole
    resumed = tiny("arrest/table3", tmp_path)
    assert not whole & set(resumed.trained)
    content = [json.loads(done.files[2].read_text()) for done in (undisturbed, resumed)]
    assert content[0] == content[1]


def half_trained(folder: Path) -> bool:
    """Whether a run that is not the first has a checkpoint and has not ended."""
    begun = {file.parent.parent.parent for file in folder.glob("runs/*/checkpoints/*/meta.json")}
    return any((run / "reproduction.json").exists() for run in begun) and any(
        not (run / "reproduction.json").exists() for run in begun
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the model is right on")
def test_several_seeds_give_mean_deviation_and_interval(out: Path) -> None:
    item = small_item(RowSpec("AT", spec("pgd_at")))
    cell = tiny(item, out, seeds=2).table.cell("AT", "Clean")
    values = [measured.value for measured in cell.measured]
    assert len(values) == 2 and cell.mean == pytest.approx(sum(values) / 2)
    cell = Cell(tuple(MeasuredCell(value) for value in (80.0, 82.0, 84.0)))
    assert cell.deviation == 2.0
    assert cell.interval == pytest.approx((82 - 4.303 * 2 / 3**0.5, 82 + 4.303 * 2 / 3**0.5))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the model is right on")
def test_a_row_without_its_method_says_so_and_comes_alive_with_it(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = (
        RowSpec("AT", spec("pgd_at")),
        RowSpec("new", spec("brand_new")),
        RowSpec("option", spec("pgd_at", brand_new=1)),
        RowSpec("value", spec("vfd", base="brand_new")),
    )
    item = small_item(*rows)
    table = tiny(item, out).table
    assert table.cell("new", "Clean").reason == "cannot run: there is no method brand_new"
    assert (
        table.cell("option", "Clean").reason == "cannot run: method pgd_at has no option brand_new"
    )
    assert "takes no such option" in table.cell("value", "Clean").reason
    assert table.cell("AT", "Clean").mean is not None

    class New(PGDAT):
        """PGD-AT by another name."""

        name = "brand_new"

    monkeypatch.setattr(methods, "_METHODS", (*methods._METHODS, New))
    table = tiny(item, out).table
    assert table.cell("new", "Clean").mean == table.cell("AT", "Clean").mean


@pytest.mark.slow
def test_a_training_that_diverges_costs_its_own_row_alone(out: Path) -> None:
    item = small_item(RowSpec("bad", spec("standard", lr=1e30)), RowSpec("good", spec("standard")))
    for _ in range(2):
        done = tiny(item, out)
        assert "diverged" in done.table.cell("bad", "Clean").reason
        assert done.table.cell("good", "Clean").mean is not None
    assert done.trained == ()  # it is not tried again


@pytest.mark.slow
def test_the_plan_trains_nothing(
    out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["reproduce", "act/table1", "--scale", "tiny", "--plan", "--out"]
    assert main([*words, str(tmp_path)]) == 0
    assert "for 3 trainings" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    tiny("act/table1", out)
    assert main([*words, str(out)]) == 0
    assert "nothing is left" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the model is right on")
def test_further_images_go_to_the_rows_that_take_them(out: Path, tmp_path: Path) -> None:
    rows = (
        RowSpec("AT", spec("pgd_at")),
        RowSpec("more", spec("pgd_at", extra_fraction=0.5)),
    )
    table = tiny(small_item(*rows), out).table
    assert "needs further images: --extra FILE" in table.cell("more", "Clean").reason
    train = load_dataset("digits").train
    file = tmp_path / "more.npz"
    np.savez(
        file, image=train.images[600:700].permute(0, 2, 3, 1).numpy(), label=train.labels[600:700]
    )
    done = reproduce(small_item(*rows), out=out, scale="tiny", extra=str(file))
    assert done.table.cell("more", "Clean").mean is not None
    assert len(done.trained) == 1  # plain AT does not depend on them


@pytest.mark.slow
def test_sizes_are_counted(out: Path) -> None:
    item = small_item(
        RowSpec("ST", spec("standard")),
        RowSpec("AFS", stack([spec("pgd_at"), spec("pgd_at", eps=4 / 255)])),
        columns=(Column("P", SizeMeasure()), Column("M", SizeMeasure("multiply_adds"))),
    )
    table = tiny(item, out).table
    assert table.cell("ST", "P").mean == pytest.approx(0.056554)
    # 8x8 images: 64 places of 32 filters of 9, then 16 of 64 filters of 288 and of 576, then 640 weights.
    convolutions = 64 * 32 * 9 + 16 * 64 * 864
    assert table.cell("ST", "M").mean == pytest.approx((convolutions + 640) / 1e9)
    # The merger of two extractors has 128 x 10 weights.
    assert table.cell("AFS", "M").mean == pytest.approx((2 * convolutions + 1280) / 1e9)


def test_extractors_that_the_paper_stops_early_are_those_of_the_best_checkpoint(out: Path) -> None:
    trained = spec("pgd_at", weight_decay=1e-4)
    store = ReproductionJob.of(small_item(RowSpec("AT", trained)), out, scale="tiny").store
    run = store.resolve(trained, 0)
    store.ensure(run)
    checkpoints = store.path(run) / "checkpoints"
    first, last = (path.name for path in checkpoints_in(checkpoints))
    (checkpoints / "best").unlink()
    (checkpoints / "best").symlink_to(first)
    item = small_item(
        RowSpec("AT", trained),
        RowSpec("AT, stopped early", trained.at_best()),
        RowSpec("AFS", stack([trained.at_best()])),
        RowSpec("AFS of the last", stack([trained])),
    )
    done = tiny(item, out)
    assert (
        len(done.trained) == 2
    )  # the stacks; the early and the last checkpoint are of one training
    found = {
        result.subject.checkpoint: result.row.accuracy
        for result in load_results(store.path(run) / "eval.json")
    }
    assert 100 * found[first] == done.table.cell("AT, stopped early", "Clean").mean
    assert 100 * found[last] == done.table.cell("AT", "Clean").mean
    extractor = load_model(store.path(store.resolve(item.rows[2].run, 0))).extractors[0]
    for of, same in ((first, True), (last, False)):
        weights = load_model(checkpoints / of).state_dict()
        pairs = [
            (weights[name], value)
            for name, value in extractor.state_dict().items()
            if name in weights
        ]
        assert pairs and all(torch.equal(*pair) for pair in pairs) == same
    again = tiny(item, out)
    assert again.trained == () and again.judged == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["arrest/tabel2", "--out", "x"], "did you mean 'arrest/table2'?"),
        (["arrest/table2"], "needs --out"),
        ([], "needs ITEM"),
        (["arrest/table2", "--out", "x", "--scale", "tiny", "--seeds", "0"], "seeds must be >= 1"),
        (["arrest/table2", "--out", "x", "--scale", "tiny", "--data", "cifar10"], "root must be"),
    ],
)
def test_mistakes_are_told(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status: int | str | None = main(["reproduce", *words])
    except SystemExit as stop:  # the parser's own refusals
        status = stop.code
    assert status == 2
    assert message in capsys.readouterr().err


def test_the_options_of_the_document_exist(capsys: pytest.CaptureFixture[str]) -> None:
    document = (Path(__file__).parents[2] / "docs" / "reproduce.md").read_text()
    with pytest.raises(SystemExit):
        main(["reproduce", "--help"])
    known = set(re.findall(r"--(\w+)", capsys.readouterr().out))
    named = set(re.findall(r"--([a-z_]+)", document))
    assert {"scale", "seeds", "network", "plan", "list"} <= named <= known
