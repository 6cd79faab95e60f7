"""`fastadv sweep`: the grid, the plan, resuming after a kill, Slurm's script, a Ray cluster that loses a node."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from processes import Started, warm_python
from report_helpers import result

from fastadv.cli import main
from fastadv.evaluation.comparison import EvaluatedRun
from fastadv.locks import locked
from fastadv.sweeps import Axis, Grid, Plan, parse_grid
from fastadv.sweeps.processes import command_of, last_lines
from fastadv.sweeps.ray_cluster import run_on_ray
from fastadv.sweeps.table import Judgement, SweepTable

pytestmark = pytest.mark.usefixtures("one_thread")

TRAINING = (
    *("--data", "digits", "--epochs", "3", "--train_images", "128", "--batch_size", "32"),
    *("--pad", "1", "--flip", "false", "--precision", "fp32", "--schedule", "Constant"),
    *("--monitor_images", "16", "--monitor_steps", "2", "--checkpoint_every", "2"),
)
JUDGING = ("--attacks", "clean", "fgsm", "--max_examples", "60", "--eval_eps", ".1")


def values(*words: str) -> list[tuple[str, ...]]:
    return [axis.values for axis in parse_grid(words).axes]


def sweep_words(out: Path, *grid: str) -> list[str]:
    return ["sweep", "standard", "--grid", *grid, *TRAINING, *JUDGING, "--out", str(out)]


def started(words: list[str]) -> Started:
    return Started(["-m", "fastadv", *words], {**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.fixture
def warm_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let sweeps of this process start their runs without the seconds that a new interpreter takes.

    Sweeps that are processes of their own, see `started`, start theirs as users do.
    """

    def start(folder: Path, name: str, log: Path, *, environment: Mapping[str, str]) -> Started:
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as output:
            words, variables = command_of(folder, name)[1:], {**os.environ, **environment}
            return Started(words, variables, merged=True, stdout=output.fileno())

    monkeypatch.setattr("fastadv.sweeps.local.start", start)


def wait_for(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("lam=0:.04:.01", ("0", "0.01", "0.02", "0.03", "0.04")),
        ("lr=.1,1e-2,0.050", ("0.1", "0.01", "0.05")),
        ("eps=2/255:8/255:2/255", ("2/255", "4/255", "6/255", "8/255")),
        ("eps=0:4/255:2/255,8/255", ("0", "2/255", "4/255", "8/255")),
        ("tau=0:1:1/3", ("0", "1/3", "2/3", "1")),
        ("steps=3:1:-1", ("3", "2", "1")),
        ("steps=1:3", ("1", "2", "3")),
        ("base=trades,mart", ("trades", "mart")),
        ("model=timm:resnet18,small_cnn", ("timm:resnet18", "small_cnn")),
        ("milestones=[2,3],[4,5]", ("[2,3]", "[4,5]")),
        ("weight-decay=100,200000", ("100", "200000")),
    ],
)
def test_a_grid_has_ranges_with_both_ends_fractions_words_and_lists(
    word: str, expected: tuple[str, ...]
) -> None:
    assert values(word) == [expected]


def test_a_grid_is_all_combinations_and_its_seeds() -> None:
    grid = parse_grid(["a-b=1,2", "c=x,y", "seeds=3"])
    assert grid.seeds == (0, 1, 2)
    assert [tuple(one.items()) for one in grid.settings()] == [
        (("a_b", a), ("c", c)) for a in "12" for c in "xy"
    ]
    assert parse_grid(["seed=7,3"]) == Grid((), (7, 3))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lr"], "NAME=VALUES"),
        (["=1"], "NAME=VALUES"),
        (["lr=1,,2"], "lr must have values"),
        (["lr="], "lr must have values"),
        (["m=[1,2"], "m must have values"),
        (["lr=0:1:.3"], "whole number of steps"),
        (["lr=0:1:0"], "leads to its end"),
        (["lr=0:1:-1"], "leads to its end"),
        (["lr=0:x"], "ranges such as"),
        (["lr=0:1:.1:2"], "ranges such as"),
        (["lr=0:1:1e-9"], "at most"),
        (["lr=.1,0.10"], "0.1 twice"),
        (["eps=8/255,16/510"], "twice"),
        (["eps=8/255,0.03137254901960784"], "twice"),
        (["lr=1", "lr=2"], "lr twice"),
        (["seeds=0"], "seeds must be"),
        (["seeds=x"], "seeds must be"),
        (["seed=-1"], "seed must be"),
        (["seeds=2", "seed=3"], "seed twice"),
        ([], "grid must name"),
    ],
)
def test_a_wrong_grid_is_told_by_name(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_grid(words)


def plan_of(folder: Path, *grid: str, training: tuple[str, ...] = ("--epochs", "2")) -> Plan:
    return Plan(folder, "standard", training, ("--attacks", "clean"), parse_grid(grid))


def test_a_plan_takes_more_points_and_refuses_another_sweep(tmp_path: Path) -> None:
    first = plan_of(tmp_path, "lr=.1,.2", "seeds=1")
    first.save()
    assert Plan.load(tmp_path) == first
    more = plan_of(tmp_path, "lr=.05:.2:.05", "seeds=2", training=("--epochs=2.0", "--quiet"))
    more.save()  # --quiet and the spelling of a number change nothing that is computed
    assert {run.name for run in first.runs} < {run.name for run in more.runs}
    for other, message in (
        (plan_of(tmp_path, "lr=.1,.2", "seeds=2"), "leaves out lr=0.05,seed=0 and others"),
        (plan_of(tmp_path, "momentum=.9", "seeds=2"), "grid must be lr .*, got momentum"),
        (plan_of(tmp_path, "lr=.05:.2:.05", "seeds=2", training=("--epochs", "3")), "epochs must"),
    ):
        with pytest.raises(ValueError, match=message):
            other.save()
    assert Plan.load(tmp_path) == more


def test_a_config_whose_text_has_changed_is_another_sweep(tmp_path: Path) -> None:
    config = tmp_path / "options.yaml"
    config.write_text("epochs: 2\n")
    plan = plan_of(tmp_path / "sweep", "lr=.1", "seeds=1", training=("--config", str(config)))
    plan.save()
    plan.save()
    config.write_text("epochs: 3\n")
    with pytest.raises(ValueError, match="config must be the file as it was"):
        plan.save()


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.usefixtures("warm_runs")
def test_a_method_of_ones_own_is_swept_and_each_checkpoint_has_a_table_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "swept_method.py").write_text(
        "from fastadv.trainers.standard import Standard\n\n\n"
        "class Swept(Standard):\n    name = 'swept'\n"
    )
    words = ["sweep", "swept_method:Swept", "--grid", "lr=.1", *TRAINING, *JUDGING]
    words += ["--keep", "9", "--out", "own"]
    assert main(words) == 0
    checkpoints = sorted(Path("own/runs/lr=0.1,seed=0/checkpoints").glob("step_*"))
    capsys.readouterr()
    assert main([*words, "--eval_checkpoint", checkpoints[0].name]) == 0
    assert "lr=0.1,seed=0: done" in capsys.readouterr().err
    (line,) = csv.DictReader(Path("own/table.csv").read_text().splitlines())
    assert line["seeds"] == "0"


def test_runs_keep_their_names_and_no_two_share_one(tmp_path: Path) -> None:
    grid = Grid((Axis("m", ("[1,2]", "[1-2]", "a/b", "8/255")), Axis("a", ("1",))), (0,))
    names = [run.name for run in Plan(tmp_path, "standard", (), (), grid).runs]
    assert len(set(names)) == 4 and not any("/" in name for name in names)
    assert names[3] == "a=1,m=8_255,seed=0"
    teacher = plan_of(tmp_path, "lr=.1", "seed=4", training=("--teacher", "runs/std-{seed}-{lr}"))
    words = teacher.training_words(teacher.runs[0])
    assert words == ["--teacher", "runs/std-4-0.1", "--lr=0.1", "--seed=4"]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--grid", "lr=.1", "--resume"], "resume must be left out"),
        (["--grid", "run=a,b"], "resumes them, got 'a,b'"),
        (["--grid", "overwrite=true,false"], "overwrite must be left out"),
        (["--grid", "lr=.1", "--lr", ".2"], "lr must be in the grid or an option"),
        (["--grid", "lr=0:-1:-1"], "lr must"),
        (["--grid", "lr=.1", "--gpus_per_run", "1"], "gpus_per_run has no effect"),
        (["--grid", "lr=.1", "--jobs", "0"], "jobs must be >= 1"),
        (["--grid", "lr=.1", "--beside", "nowhere"], "no sweep in nowhere"),
        (["--grid", "lr=.1", "--beside", "a", "./a"], "beside must name other sweeps than out"),
        (["--grid", "lr=.1", "--eval_network", "natural"], "eval_network must be left out"),
        (["--grid", "lr=.1", "--eval_extractors", "1,2"], "eval_extractors must be left out"),
        (["--grid", "lr=.1", "--eval_attacks", "pgd-2o"], "unknown attack 'pgd-2o'"),
        (["--grid", "lr=.1", "--eval_out", "all.json"], "eval_out must be left out"),
        (
            ["--grid", "lr=.1", "--attacks", "fgsm", "--eval_engine", "fp32"],
            "engine must be left out",
        ),
        (["--grid", "lr=.1", "--attacks", "square", "--eval_eot", "2"], "eot must be 1 for square"),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: list[str], message: str
) -> None:
    out = tmp_path / "sweep"
    assert main(["sweep", "standard", *TRAINING, "--out", str(out), *extra]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("words", [["--no_such", "1"], ["--attacks", "clean", "--eval_nothing"]])
def test_unknown_options_of_train_and_eval_end_it(tmp_path: Path, words: list[str]) -> None:
    with pytest.raises(SystemExit):
        main([*sweep_words(tmp_path / "sweep", "lr=.1"), *words])


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.usefixtures("warm_runs")
def test_a_sweep_that_is_killed_ends_as_an_undisturbed_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main(sweep_words(whole, "lr=.1")) == 0
    table = capsys.readouterr().out.partition("\n\n")[0]
    assert "clean %" in table and (whole / "report" / "report.html").is_file()
    assert (whole / "trade_off.png").read_bytes().startswith(b"\x89PNG")

    assert main([*sweep_words(whole, "lr=.1"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (row,) = found["rows"]
    assert (row["settings"], row["seeds"], row["n"]) == ({"lr": "0.1"}, [0], 60)
    assert row["accuracy"]["fgsm"]["deviation"] is None
    assert f"{row['accuracy']['fgsm']['mean']:.2f}" in table
    assert found["files"]["report"] == str(whole / "report" / "report.html")
    assert (found["missing"], found["failures"]) == ([], [])

    process = started(sweep_words(killed, "lr=.1"))
    wait_for((killed / "runs" / "lr=0.1,seed=0" / "checkpoints" / "latest").exists)
    process.kill()
    process.wait()
    assert main(sweep_words(killed, "lr=.1")) == 0
    assert capsys.readouterr().out.partition("\n\n")[0] == table
    assert (killed / "table.csv").read_bytes() == (whole / "table.csv").read_bytes()

    # A finished run is not run again, and a run that fails leaves the others as they are.
    (log,) = (whole / "logs").iterdir()
    content = log.read_text()
    (whole / "runs" / "lr=0.2,seed=0").write_text("a file in the way of the run")
    assert main([*sweep_words(whole, "lr=.1,.2"), "--dry_run", "--json"]) == 0
    left = json.loads(capsys.readouterr().out)
    assert left["runs"] == 2 and left["left"][0].startswith("fastadv train standard --data digits")
    assert main([*sweep_words(whole, "lr=.1,.2"), "--jobs", "2"]) == 2
    failed = capsys.readouterr().out
    assert "lr=0.2,seed=0: exit status 2" in failed and "got the file" in failed
    assert failed.partition("\n\n")[0] == table and log.read_text() == content


def test_a_damaged_record_of_a_run_is_no_record(tmp_path: Path) -> None:
    run = plan_of(tmp_path, "lr=.1", "seed=0").runs[0]
    run.folder.mkdir(parents=True)
    (run.folder / "run.json").write_text('{"format": 1, "run": "one"}')
    run.mark_trained()
    record = run.folder / "sweep_run.json"
    assert run.is_trained()
    record.write_text(json.dumps({**json.loads(record.read_text()), "judged": 3}))
    assert not run.is_trained() and not run.is_finished(())


def test_one_process_at_a_time_does_a_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fastadv.commands.sweep._TIMEOUT", 0)
    with locked(tmp_path / "sweep.json"):
        assert main(sweep_words(tmp_path, "lr=.1")) == 2
    told = capsys.readouterr().err
    assert f"no other process does a sweep, got {tmp_path}" in told
    assert not (tmp_path / "runs").exists()


def test_a_table_that_cannot_be_written_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = plan_of(tmp_path, "lr=.1", "seed=0").runs[0]
    judged = EvaluatedRun(run.name, "standard", "small_cnn", (result("clean", 250),))
    found = ([Judgement("standard", run, judged)], ["lr=0.2,seed=0"])
    monkeypatch.setattr("fastadv.commands.sweep._judgements", lambda plans: found)
    monkeypatch.setattr("fastadv.commands.sweep.run_locally", lambda *arguments: [])
    (tmp_path / "table.csv").mkdir()
    assert main(sweep_words(tmp_path, "lr=.1")) == 2
    out, err = capsys.readouterr()
    assert "clean %" in out and "not in the table: lr=0.2,seed=0" in out
    assert "table.csv cannot be written: Is a directory" in err


def test_the_table_has_mean_and_deviation_over_the_seeds(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "lr=.1,.2", "seeds=2")
    judgements = []
    for number, run in enumerate(plan.runs[:3]):
        subject = replace(result("clean", 0).subject, weights=run.name)
        rows = [result("clean", 240 + 30 * number, subject=subject)]
        rows.append(result("pgd-20", 90 + 60 * number, subject=subject))
        judged = EvaluatedRun(run.name, "standard", "small_cnn", tuple(rows), seed=run.seed)
        judgements.append(Judgement("standard", run, judged))
    table = SweepTable(judgements)
    text = dict(zip(table.table().heading, table.table().rows[0], strict=True))
    assert (text["lr"], text["seeds"], text["n"]) == ("0.1", "0, 1", "300")
    assert (text["clean %"], text["pgd-20 %"]) == ("85.00 ± 7.07", "40.00 ± 14.14")
    assert table.table().rows[1][-2:] == ("100.00", "70.00")
    first = next(csv.DictReader(table.csv().splitlines()))
    assert float(first["pgd-20 mean"]) == pytest.approx(40)
    assert float(first["pgd-20 deviation"]) == pytest.approx(200**0.5, rel=1e-5)
    points = table.points()
    assert [(point.name, point.curve, point.clean) for point in points] == [
        ("lr 0.1", "standard", pytest.approx(85)),
        ("lr 0.2", "standard", pytest.approx(100)),
    ]
    assert points[0].robust_interval == pytest.approx((40 - 200**0.5, 40 + 200**0.5))
    assert (table.picture() or b"").startswith(b"\x89PNG")


def test_a_sweep_marks_doubtful_figures_in_all_its_formats(tmp_path: Path) -> None:
    judgements = []
    for run in plan_of(tmp_path, "lr=.1", "seeds=2").runs:
        subject = replace(result("clean", 0).subject, weights=run.name)
        rows = [result("clean", 240, subject=subject), result("fgsm", 90, subject=subject)]
        if run.seed == 1:
            doubtful = replace(rows[1].row, status="suspect", notes=("gradients are zero",))
            rows[1] = replace(rows[1], row=doubtful)
        judged = EvaluatedRun(run.name, "standard", "small_cnn", tuple(rows), seed=run.seed)
        judgements.append(Judgement("standard", run, judged))
    table = SweepTable(judgements)
    text = dict(zip(table.table().heading, table.table().rows[0], strict=True))
    assert (text["clean %"], text["fgsm %"]) == ("80.00 ± 0.00", "30.00 ± 0.00 suspect")
    assert any("gradients are zero" in note for note in table.table().notes)
    first = next(csv.DictReader(table.csv().splitlines()))
    assert (first["clean status"], first["fgsm status"]) == ("ok", "suspect")
    accuracy = table.records()[0]["accuracy"]
    assert (accuracy["clean"]["status"], accuracy["fgsm"]["status"]) == ("ok", "suspect")
    assert [point.name for point in table.points()] == ["lr 0.1 suspect"]


@pytest.mark.slow
@pytest.mark.processes
def test_sigterm_lets_the_runs_save_their_checkpoints(tmp_path: Path) -> None:
    words = sweep_words(tmp_path, "seeds=1")
    words[words.index("--epochs") + 1] = "10000"  # more than it will come to
    process = started(words)
    (name,) = ("seed=0",)
    latest = tmp_path / "runs" / name / "checkpoints" / "latest"
    wait_for(latest.exists)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143 and "the same command goes on" in errors
    log = "\n".join(last_lines(tmp_path / "logs" / f"{name}.log"))
    assert "SIGTERM" in log and "go on:" in log
    assert not (tmp_path / "runs" / name / ".lock").exists()


@pytest.mark.slow
@pytest.mark.processes
def test_slurm_gets_an_array_of_the_runs_that_are_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "sbatch").write_text(
        f'#!/bin/sh\ncp "$2" {tmp_path}/submitted\necho "42;cluster"\n'
    )
    (programs / "squeue").write_text(f"#!/bin/sh\ncat {tmp_path}/queue\n")
    for program in programs.iterdir():
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    out = tmp_path / "a sweep"
    words = [*sweep_words(out, "lr=.1,.2", "seeds=2"), "--launcher", "slurm", "--gpus_per_run", "1"]
    words += ["--jobs", "3", "--slurm", "partition=gpu", "time=1:00:00"]
    assert main([*words, "--dry_run"]) == 0
    assert not (tmp_path / "submitted").exists() and "written" in capsys.readouterr().out
    assert main(words) == 0
    assert "job 42" in capsys.readouterr().out
    script = (tmp_path / "submitted").read_text()
    for line in ("array=0-3%3", "gpus=1", "partition=gpu", "time=1:00:00", "signal=B:TERM@120"):
        assert f"#SBATCH --{line}\n" in script
    (tmp_path / "queue").write_text("42 pending\n")
    assert main(words) == 2
    assert "job 42 of this sweep has not ended" in capsys.readouterr().err

    (tmp_path / "queue").write_text("")
    task = {**os.environ, "SLURM_ARRAY_TASK_ID": "2", "OMP_NUM_THREADS": "1"}
    with warm_python() as python:
        words_of_python = script.replace(sys.executable, python)
        assert words_of_python != script
        bash = ["bash", "-c", words_of_python]
        subprocess.run(bash, env=task, check=True, capture_output=True)
    assert Plan.load(out).run_named("lr=0.2,seed=0").is_finished(Plan.load(out).evaluation)
    assert main(words) == 0
    script = (tmp_path / "submitted").read_text()
    assert "array=0-2%3" in script and "lr=0.2,seed=0" not in script


def test_ray_runs_go_on_elsewhere_when_their_node_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    training = list(TRAINING)
    training[training.index("--epochs") + 1] = "60"  # so that a node can be killed in its middle
    judging = ("--attacks", "clean", "--max_examples", "60")
    plan = Plan(tmp_path, "standard", tuple(training), judging, parse_grid(["seeds=2"]))
    plan.save()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    lost = cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        latest = [run.folder / "checkpoints" / "latest" for run in plan.runs]

        def kill_a_node() -> None:
            wait_for(lambda: all(path.exists() for path in latest))
            cluster.remove_node(lost, allow_graceful=False)

        killer = threading.Thread(target=kill_a_node)
        killer.start()
        assert run_on_ray(plan, plan.runs, quiet=True) == []
        killer.join()
        assert not plan.unfinished()
        commands = [run.log.read_text().count("$ fastadv train") for run in plan.runs]
        assert sorted(commands) == [1, 2]  # one of the two was lost, and went on
    finally:
        ray.shutdown()
        cluster.shutdown()
