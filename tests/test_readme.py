"""The README's Python runs as printed, and what it names exists."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_python_block_runs(number: int, tmp_path: Path) -> None:
    script = tmp_path / "block.py"
    script.write_text(BLOCKS[number])
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def test_there_is_code_to_run() -> None:
    assert len(BLOCKS) >= 4


def test_named_files_exist() -> None:
    # `NAME` stands for a file to come, `demo_run` for what a command writes.
    names = re.findall(r"`((?:bench|csrc|docs|fastadv|kernels|tests)/[\w./]+)`", README)
    missing = [name for name in names if "NAME" not in name and not (ROOT / name).exists()]
    assert names
    assert not missing
