"""The Python of the README and of docs/training.md runs as printed; what the README names exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from processes import ran

from fastadv.cli import training_parser
from fastadv.trainers import find_method, method_names

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
TRAINING = (ROOT / "docs" / "training.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README + TRAINING, re.DOTALL)


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_python_block_runs(number: int, tmp_path: Path) -> None:
    script = tmp_path / "block.py"
    script.write_text(BLOCKS[number])
    done = ran([str(script)], cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_there_is_code_to_run() -> None:
    assert len(BLOCKS) >= 2


def test_every_method_is_in_the_table() -> None:
    table = re.findall(r"^\| `(\w+)` \|", TRAINING, re.MULTILINE)
    assert table == [name for name in table if name in method_names()]
    assert set(table) == set(method_names())


@pytest.mark.slow
def test_named_options_exist() -> None:
    helps = [training_parser(find_method(method)).format_help() for method in method_names()]
    for name in re.findall(r"`--(\w+)", TRAINING):
        ours = name not in ("standalone", "rdzv", "signal")  # torchrun's, and Slurm's
        assert not ours or any(f"--{name}" in text for text in helps), name


def test_named_files_exist() -> None:
    # `NAME` stands for a file to come.
    text = README + (ROOT / "CONTRIBUTING.md").read_text()
    names = re.findall(r"`((?:bench|csrc|docs|fastadv|kernels|tests)/[\w./]+)`", text)
    names += re.findall(r"\]\(([\w./]+)\)", text)
    missing = [name for name in names if "NAME" not in name and not (ROOT / name).exists()]
    assert names
    assert not missing
