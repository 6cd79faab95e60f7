"""`fastadv eval`: what it judges, what it keeps, and what an interruption or a full disk costs."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Started
from training_helpers import small_recipe

from fastadv.cli import main
from fastadv.commands.images import Reading, images_of_run
from fastadv.commands.result_keeper import unfinished_work
from fastadv.data import load_dataset
from fastadv.digest import digest_of
from fastadv.evaluation import AutoAttackResult, Report, Stage, evaluate, load_results
from fastadv.models import create_model
from fastadv.trainers import load_model, train
from fastadv.trainers.checkpoint import find_checkpoint
from fastadv.trainers.run_directory import Description, RunDirectory

pytestmark = pytest.mark.usefixtures("one_thread")
FEW = ("--max_examples", "20", "--device", "cpu", "--quiet")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "at"
    recipe = small_recipe("pgd_at", epochs=1, train_images=64)
    train(
        "pgd_at",
        recipe,
        data="digits",
        model="small_cnn",
        run_dir=folder,
        device="cpu",
        progress=False,
    )
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "at", symlinks=True))


def judge(run: Path, *words: str) -> int:
    return main(["eval", str(run), *words, *FEW])


def names(run: Path) -> list[str]:
    return [result.row.name for result in load_results(run / "eval.json")]


def test_a_second_evaluation_adds_to_the_first(run: Path) -> None:
    assert judge(run, "--attacks", "clean", "pgd-2") == 0
    assert judge(run, "--attacks", "clean", "fgsm") == 0
    assert names(run) == ["clean", "pgd-2", "fgsm"]
    assert judge(run, "--attacks", "pgd-2", "--eps", "3/255") == 0
    assert judge(run, "--attacks", "pgd-2", "--seed", "1") == 0
    assert judge(run, "--attacks", "pgd-2", "--norm", "l2", "--eps", "0.5") == 0
    assert judge(run, "--attacks", "pgd-2") == 0  # again
    assert names(run) == ["clean", "pgd-2", "fgsm", "pgd-2", "pgd-2", "pgd-2"]


def test_a_result_says_what_it_is_about(run: Path) -> None:
    assert judge(run, "--attacks", "pgd-2", "--checkpoint", "best") == 0
    (result,) = load_results(run / "eval.json")
    images = load_dataset("digits").test
    subject = result.subject
    assert subject.checkpoint == "step_000004" and subject.data == images.name
    assert subject.weights == digest_of(load_model(run).state_dict())
    few = {"images": images.images[:20], "labels": images.labels[:20]}
    assert subject.images == digest_of(few) and result.row.n == 20
    assert (subject.run, subject.method, subject.network) == ("at", "pgd_at", "small_cnn")
    assert result.row.eps == 8 / 255 and result.norm == "linf"


def test_the_radius_is_8_255_unless_told_otherwise_and_said(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert judge(run, "--attacks", "clean", "pgd-2") == 0
    out = capsys.readouterr().out
    assert "Judged at 8/255 linf, the default." in out
    assert "trained at 0.1 linf: --eps 0.1 judges it there" in out
    assert judge(run, "--attacks", "clean", "pgd-2", "--eps", "0.1") == 0
    out = capsys.readouterr().out
    assert "Judged" not in out and " 0.1 " in out
    assert judge(run, "--attacks", "clean", "--eps", "0.1") == 0
    assert "eps was not used" in capsys.readouterr().out
    assert judge(run, "--attacks", "pgd-2", "--norm", "l2") == 2
    assert "eps must be given with norm l2" in capsys.readouterr().err


def test_what_has_no_effect_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (["--attacks", "clean", "fgsm", "--alpha", "0.1"], "alpha must be left out"),
        (["--attacks", "pgd-2", "--engine", "fp32"], "engine must be left out"),
        (["--attacks", "pgd-2", "--cw_c", "2"], "cw_c must be left out, got 2.0"),
        (["--attacks", "min-fgsm", "--cw_lr", ".1"], "cw_lr must be left out, got 0.1"),
        (["--attacks", "clean", "--worst_case"], "worst_case must be left out, got True"),
        (["--attacks", "clean", "--eot", "2"], "eot must be left out, got 2"),
        (["--attacks", "clean", "--surrogate", "x"], "surrogate must be left out, got 'x'"),
        (["--attacks", "pgd-2", "--root", "x"], "root must be left out with digits"),
        (["--attacks", "pgd2"], "did you mean 'pgd-2'?"),
        (["--checkpoint", "bst"], "did you mean 'best'?"),
        (["--data", "digit"], "did you mean 'digits'?"),
        (["--norm", "linff"], "did you mean 'linf'?"),
        (["--out", "results.txt"], "out must be a file that ends in .json"),
    ):
        try:
            status = judge(run, *words)
        except SystemExit as exit_:
            status = int(str(exit_.code))
        assert status == 2 and message in capsys.readouterr().err
    assert not (run / "eval.json").exists()


def test_nothing_is_lost_where_nothing_can_be_written(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (run / "eval.json").mkdir()
    words = ["eval", str(run), "--attacks", "clean", "pgd-2", "--max_examples", "20"]
    assert main(words) == 2
    out, err = capfd.readouterr()
    assert "pgd-2" in out and "95 % interval" in out
    early, *_, late = err.splitlines()
    assert early.startswith("note: ")  # before the work, and after it
    for line in (early, late):
        assert "eval.json cannot be written: Is a directory; --out FILE.json keeps" in line
    kept = tmp_path / "elsewhere" / "results.json"
    assert main([*words, "--out", str(kept)]) == 0
    assert [result.row.name for result in load_results(kept)] == ["clean", "pgd-2"]
    assert main(["report", str(kept)]) == 0


def test_a_disk_that_fills_up_costs_no_result(
    run: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastadv.evaluation.results.write_atomically", full)
    assert judge(run, "--attacks", "clean", "pgd-2") == 2
    out, err = capfd.readouterr()
    assert "pgd-2" in out and "No space left on device" in err and "; --out FILE.json" in err


def test_a_damaged_file_of_results_is_told_of_before_the_work(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "eval.json").write_text("{")
    assert judge(run, "--attacks", "clean", "pgd-2") == 2
    out, err = capsys.readouterr()
    assert out == "" and "eval.json" in err
    assert (run / "eval.json").read_text() == "{"


def test_what_is_done_is_kept_when_a_later_attack_fails(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("out of memory")

    module = sys.modules["fastadv.evaluation.rows"]
    monkeypatch.setattr(module, "autoattack", fail)
    assert judge(run, "--attacks", "clean", "pgd-2", "autoattack") == 2
    assert names(run) == ["clean", "pgd-2"]


def test_what_is_done_is_printed_when_a_later_attack_fails_and_nothing_can_be_written(
    run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("out of memory")

    module = sys.modules["fastadv.evaluation.rows"]
    monkeypatch.setattr(module, "autoattack", fail)
    (run / "eval.json").mkdir()
    assert judge(run, "--attacks", "clean", "pgd-2", "autoattack") == 2
    out, err = capfd.readouterr()
    assert "pgd-2" in out and "out of memory" in err and "--out FILE.json" in err


def test_results_of_two_searches_by_autoattack_stand_side_by_side(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = []

    def found(model: Any, samples: Any, *, engine: str, state_dir: Any, **_: Any) -> Any:
        folders.append(state_dir)
        n, nothing = len(samples), torch.empty(0)
        search = {"auto": "bf16"}.get(engine, engine)
        stages = (Stage("apgd-ce", n, search=search),)
        flags = torch.ones(n, dtype=torch.bool)
        return AutoAttackResult(flags, nothing, nothing, stages, "ok", (), 0, 256, 1.0, search)

    module = sys.modules["fastadv.evaluation.rows"]
    monkeypatch.setattr(module, "autoattack", found)
    for words in ((), ("--engine", "fp32"), ("--engine", "reference"), ("--engine", "auto")):
        assert judge(run, "--attacks", "autoattack", *words) == 0
    searches = [result.row.search for result in load_results(run / "eval.json")]
    assert searches == ["bf16", "fp32", "reference"]
    assert len(set(folders)) == 3 and folders[0] == folders[3]
    with pytest.raises(SystemExit):
        judge(run, "--attacks", "autoattack", "--engine", "bf16")


def test_evaluate_tells_of_each_attack_as_it_ends() -> None:
    seen: list[list[str]] = []
    images = load_dataset("digits").test
    model = create_model("small_cnn", 10, 1)
    report = evaluate(
        model,
        images,
        ("clean", "fgsm"),
        max_examples=10,
        progress=False,
        on_row=lambda so_far: seen.append([row.name for row in so_far.rows]),
    )
    assert isinstance(report, Report)
    assert seen == [["clean"], ["clean", "fgsm"]]


def test_unfinished_work_is_held_by_one_and_gone_after_success(tmp_path: Path) -> None:
    folder = tmp_path / "unfinished" / "run"
    with pytest.raises(KeyError), unfinished_work(folder) as state:
        assert state == folder
        folder.mkdir()
        with (
            pytest.raises(ValueError, match="another process is at the same evaluation"),
            unfinished_work(folder),
        ):
            pass
        raise KeyError
    assert folder.exists()  # for the same command to go on from
    with unfinished_work(folder):
        pass
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with unfinished_work(tmp_path / "file" / "run") as state:
        assert state is None


def test_names_of_any_length_are_judged(run: Path, tmp_path: Path) -> None:
    radii = [f"{number / 1000 + 1e-7:.7f}" for number in range(1, 41)]
    assert judge(run, "--attacks", "clean", "fgsm", "--eps", *radii) == 0
    assert len(load_results(run / "eval.json")) == 41
    weights = tmp_path / f"{'模' * 70}.safetensors"
    shutil.copy(find_checkpoint(run) / "model.safetensors", weights)
    words = ["eval", "--model", "small_cnn", f"--weights={weights}", "--data", "digits", *FEW]
    assert main([*words, "--attacks", "clean"]) == 0
    assert len(load_results(weights.with_name(f"{weights.name}.eval.json"))) == 1


CHILD = """
import sys, time
import fastadv.evaluation

def slow(*args, **options):
    print("attacking", flush=True)
    time.sleep(100)

sys.modules["fastadv.evaluation.rows"].autoattack = slow
from fastadv.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_keeps_what_is_done_and_says_how_to_go_on(
    signum: int, status: int, run: Path
) -> None:
    words = ["eval", str(run), "--attacks", "clean", "pgd-2", "autoattack", *FEW]
    process = Started(["-c", CHILD, *words])
    assert process.first_line() == "attacking"
    time.sleep(0.1)
    process.send_signal(signum)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status
    assert f"the results so far are in {run / 'eval.json'}" in err
    assert "the same command goes on where it was" in err
    assert names(run) == ["clean", "pgd-2"]


@pytest.mark.slow
@pytest.mark.processes
def test_two_processes_judge_one_run_at_once(run: Path) -> None:
    lines = [["eval", str(run), "--attacks", "clean", name, *FEW] for name in ("fgsm", "pgd-3")]
    processes = [Started(["-m", "fastadv", *words]) for words in lines]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    assert sorted(names(run)) == ["clean", "fgsm", "pgd-3"]


def test_a_network_of_the_users_own_code_is_named_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_network.py").write_text(
        "from fastadv.models import small_cnn\ndef make(num_classes, in_channels):\n"
        "    return small_cnn(num_classes, in_channels)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    run = tmp_path / "run"
    recipe = small_recipe("standard", epochs=1, train_images=64)
    train(
        "standard",
        recipe,
        data="digits",
        model="own_network:make",
        run_dir=run,
        device="cpu",
        progress=False,
    )
    words = ["--attacks", "clean", "--model", "own_network:make"]
    assert judge(run, *words) == 0
    assert names(run) == ["clean"]
    record = json.loads((run / "run.json").read_text())
    assert record["model"]["name"] == "own_network:make"


def test_a_root_is_refused_where_the_run_was_trained_on_a_folder(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    source = {"dataset": "folder:pictures", "root": None}
    run.begin(Description("standard", {}, {}, {}, {}), {"source": source})
    with pytest.raises(ValueError, match="root must be left out with folder:pictures, got 'x'"):
        images_of_run(run, None, "x", Reading())
