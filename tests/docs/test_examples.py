"""Every script under examples/ runs as its user runs it, and shows what it should."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

import pytest
from processes import ran, warm_python

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
# For each script the package that it needs, its arguments, and what it prints.
SCRIPTS: dict[str, tuple[str, list[str], str]] = {
    "own_loop.py": ("torch", ["--epochs", "1"], r"epoch 0: loss .*, clean .*%, robust .*%"),
    "lightning_module.py": ("lightning", ["--epochs", "1"], r"clean .*%, robust .*%"),
    "accelerate_loop.py": ("accelerate", ["--epochs", "1"], r"clean .*%, robust .*%"),
    "timm_finetuning.py": ("timm", ["--images", "128"], r"trained: .*"),
    "judge_checkpoint.py": ("torch", ["--images", "4"], r'"clean_acc": .*"autoattack_acc": .*'),
    "own_method.py": ("torch", ["--epochs", "1"], r"trained: .*"),
    "ddp.py": ("torch", ["--epochs", "1"], r"robust .*%"),
}


def run(words: list[str], folder: Path) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    with warm_python() as python:  # for torchrun
        done = ran(words, {**environment, "PYTHON_EXEC": python}, folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_all_examples_are_run_and_listed() -> None:
    names = {path.name for path in EXAMPLES.glob("*.py")}
    assert names == set(SCRIPTS)
    listed = re.findall(r"^\| `(\w+\.py)` \|", (EXAMPLES / "README.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(names)


@pytest.mark.processes
@pytest.mark.parametrize("script", SCRIPTS)
def test_an_example_runs(script: str, tmp_path: Path) -> None:
    package, words, shown = SCRIPTS[script]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    launcher = []
    if script == "ddp.py":
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    assert re.search(shown, run([*launcher, str(EXAMPLES / script), *words], tmp_path))


@pytest.mark.processes
def test_the_own_method_has_the_command_line(tmp_path: Path) -> None:
    options = "--data digits --model small_cnn --epochs 1 --train_images 64 --batch_size 32 --steps 1 --weight .1"
    words = [
        "train",
        "examples.own_method:LogitSqueezing",
        *options.split(),
        "--run",
        str(tmp_path / "run"),
    ]
    run(["-m", "fastadv", *words], EXAMPLES.parent)
    assert (tmp_path / "run" / "run.json").exists()
