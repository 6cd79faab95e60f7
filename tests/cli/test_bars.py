"""Bars of progress on narrow terminals, and what is written where there is none."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import termios
from pathlib import Path

import pytest
from processes import Started

from fastadv.bars import columns, fitted

# A bar of a training and two of an evaluation, drawn as the library draws them, at three widths.
PROGRAM = r"""
import os, time
from fastadv.evaluation.progress import ProgressDisplay
from fastadv.trainers.console import Console

def draw():
    console = Console(True, 1200, 0, 128)
    for step in range(40):
        console.step_done()
        if step == 30:
            console.show(100, 100, {"lr": 0.1, "loss": 1.2345, "distance": 0.25, "replayed": 0.125})
    console.close()
    with ProgressDisplay().count("autoattack apgd-t", 1000) as advance:
        advance(10, right="45.2 %")
        time.sleep(0.2)  # the bar is drawn again
        ProgressDisplay().line("a line that stays")
        advance(200, right="44.0 %")
    for _ in ProgressDisplay().bar(range(3), "pgd-20", 3):
        pass

if __name__ == "__main__":
    for width in (None, 40, 120):  # first that of the terminal
        if width is not None:
            os.environ["COLUMNS"] = str(width)
        print("=====")
        draw()
"""


@pytest.fixture(scope="module")
def drawn() -> dict[int, list[str]]:
    """What the program writes to a terminal of 60 columns, piece by piece, by the width it took."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k != "COLUMNS"}
    process = Started(["-c", PROGRAM], environment, stdout=slave, merged=True)
    os.close(slave)
    written = b""
    try:
        while part := os.read(master, 4096):
            written += part
    except OSError:  # so Linux says that the other end is closed
        pass
    assert process.wait() == 0, written.decode()
    os.close(master)
    parts = written.decode().split("=====")[1:]
    return {
        width: [piece.strip() for piece in re.split("[\r\n]+", part) if piece.strip()]
        for width, part in zip((60, 40, 120), parts, strict=True)
    }


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("width", [60, 40, 120])
def test_the_figures_stay_on_a_narrow_terminal(drawn: dict[int, list[str]], width: int) -> None:
    assert "a line that stays" in drawn[width]  # not behind a bar
    bars = [piece for piece in drawn[width] if "%" in piece]
    assert bars and all(len(bar) < width for bar in bars)
    last = [bar for bar in bars if bar.startswith("epoch 100/100, loss 1.23")][-1]
    assert re.search(r" 3%", last)
    judging = [bar for bar in bars if bar.startswith("autoattack apgd-t, ")]
    assert "right 44.0 %" in judging[-1] and " 21%" in judging[-1]
    if width == 60:
        assert "loss 1.234, distance 0.250" in last or "loss 1.235, distance 0.250" in last
    if width == 120:
        assert "replayed 0.125" in last and " left, " in last and "images/s" in last


def test_what_does_not_fit_is_left_out_as_a_whole() -> None:
    parts = ["epoch 1/2", "loss 1.000", "lr 0.100"]
    assert fitted(parts, 80) == "epoch 1/2, loss 1.000, lr 0.100"
    assert fitted(parts, 30) == "epoch 1/2, loss 1.000"
    assert fitted(parts, 5) == "epoch" and fitted([], 5) == "" and fitted(parts, -1) == ""


def test_the_width_is_that_of_columns_or_the_terminal(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for given, expected in (("33", 33), ("0", 80), ("wide", 80), ("", 80)):
        monkeypatch.setenv("COLUMNS", given)
        with open(tmp_path / "file", "w") as file:
            assert columns(file) == expected


def test_nothing_but_lines_where_there_is_no_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    exec(PROGRAM.partition("if __name__")[0] + "draw()", {"__name__": "drawing"})
    out, err = capfd.readouterr()
    assert out == "" and "expected: about" in err
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f]", err)
