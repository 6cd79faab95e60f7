"""docs/command_line.md names options that exist, and prints what the program prints."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from test_command_line import fails

from fastadv.cli import main

DOCUMENT = (Path(__file__).resolve().parents[2] / "docs" / "command_line.md").read_text()
FOREIGN = {"shell"}  # of register-python-argcomplete


def test_the_options_exist(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("train arrest", "eval", "data", "reproduce", "transfer"):
        with pytest.raises(SystemExit):
            main([*command.split(), "--help"])
    known = set(re.findall(r"--([\w.]+)", capsys.readouterr().out)) | FOREIGN
    named = {name.replace("-", "_") for name in re.findall(r"--([a-z][a-z_.-]+\b)", DOCUMENT)}
    assert named and named <= known, named - known


def test_the_example_of_what_is_missing_is_what_is_said(capfd: pytest.CaptureFixture[str]) -> None:
    told = fails(["train", "arrest"], capfd)
    (example,) = re.findall(r"\$ fastadv train arrest\n(.*?)\n```", DOCUMENT, re.DOTALL)
    assert told.startswith(" ".join(example.split()))
