"""Damaged logs stop no run, and damaged archives of images are named."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_helpers import Interruption, SharedRuns, assert_same_end, run

from fastadv.data import DataFormatError, load_npz
from fastadv.trainers.logs import MetricsLog, read_records

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

LINES = {
    "bytes that are no text": b'{"kind": "step", "st\xa2p": 1}',
    "half a record": b'{"kind": "epoch", "step": 4, "lo',
    "another kind of value": b'["step", 1]',
    "a step that is text": b'{"kind": "step", "step": "one"}',
    "a step that is none": b'{"kind": "step", "step": NaN}',
    "a step without bounds": b'{"kind": "step", "step": 1' + b"0" * 400 + b"}",
    "more digits than are read": b'{"kind": "step", "step": 1' + b"0" * 5000 + b"}",
    "brackets without end": b"[" * 100_000,
    "zeros, as a crash leaves them": bytes(512),
    "a mark of another encoding": b'\xff\xfe{"kind": "step"}',
}


@pytest.mark.parametrize("name", LINES)
def test_damaged_lines_are_left_out_and_stop_no_resume(
    name: str, shared_runs: SharedRuns, tmp_path: Path
) -> None:
    whole = shared_runs.whole("standard")
    shared_runs.copy_of_cut("standard", 5, tmp_path / "cut")
    log = tmp_path / "cut" / "metrics.jsonl"
    first, *others = log.read_bytes().splitlines()
    good = [json.loads(line) for line in (first, *others)]
    log.write_bytes(b"\n".join([first, LINES[name], *others]))
    with pytest.warns(UserWarning, match=rf"metrics\.jsonl: 1 damaged of {len(good) + 1} lines"):
        assert read_records(log) == good
    with pytest.warns(UserWarning, match=r"metrics\.jsonl: 1 damaged"):
        assert run("standard", tmp_path / "cut", resume=True).progress.step == 8
    assert_same_end(whole, tmp_path / "cut")
    steps = [record["step"] for record in read_records(log)]
    assert steps == [record["step"] for record in read_records(whole / log.name)]


def test_a_last_line_that_was_cut_off_goes_without_a_word(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"kind": "step", "step": 1}\n{"kind": "st')
    assert read_records(tmp_path / "metrics.jsonl") == [{"kind": "step", "step": 1}]
    assert not recwarn.list


def test_separators_of_unicode_end_no_line(tmp_path: Path) -> None:
    record = {"kind": "step", "step": 1, "note": "a\u2028b\x85c"}
    text = json.dumps(record, ensure_ascii=False)
    (tmp_path / "metrics.jsonl").write_text(text + "\n", encoding="utf-8")
    assert read_records(tmp_path / "metrics.jsonl") == [record]


def test_a_log_that_cannot_be_read_is_kept_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: Path) -> bytes:
        raise OSError(5, "Input/output error")

    (tmp_path / "metrics.jsonl").write_text("before")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", broken)
        with pytest.warns(UserWarning, match=r"cannot be read \(Input/output error\); kept as"):
            log = MetricsLog(tmp_path)
    log.step(step=1)
    assert read_records(tmp_path / "metrics.jsonl") == [{"kind": "step", "step": 1}]
    assert (tmp_path / "metrics.unreadable").read_text() == "before"


def test_other_logs_are_written_anew(tmp_path: Path) -> None:
    with pytest.raises(Interruption):
        run("standard", tmp_path, 5)
    (tmp_path / "summary.csv").write_bytes(b"\xff\x00")
    run("standard", tmp_path, resume=True)
    assert (tmp_path / "summary.csv").read_text().startswith("epoch,step,")
    (tmp_path / "metrics.jsonl").unlink()
    run("standard", tmp_path, resume=True)


# Archives of images

Save = Callable[..., Any]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_any_damage_to_an_archive_is_named(save: Save, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 6, 5, 3), dtype=np.uint8)
    labels = np.arange(40) % 10
    save(tmp_path / "whole.npz", image=pixels, label=labels)
    content, file = (tmp_path / "whole.npz").read_bytes(), tmp_path / "damaged.npz"
    random.seed(1)
    near_the_ends = [*range(300), *range(len(content) - 300, len(content))]
    for case in range(900):
        damaged = bytearray(content)
        places = near_the_ends if case % 2 else range(len(content))
        damaged[random.choice(places)] ^= 1 << random.randrange(8)
        if case % 9 == 0:
            del damaged[random.randrange(len(damaged)) :]
        file.write_bytes(damaged)
        try:
            read = load_npz(file)
        except DataFormatError as error:
            assert str(file) in str(error)
        else:  # what was hit says nothing of the images, such as a date
            assert np.array_equal(read.images.permute(0, 2, 3, 1).numpy(), pixels)
            assert read.labels.tolist() == labels.tolist()


def test_an_array_that_its_header_shortens_is_noticed(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", image=np.ones((9, 4, 4, 1), np.uint8), label=np.arange(9))
    content = (tmp_path / "a.npz").read_bytes()
    shorter = content.replace(b"(9, 4, 4, 1)", b"(8, 4, 4, 1)").replace(b"(9,)", b"(8,)")
    assert shorter != content
    (tmp_path / "a.npz").write_bytes(shorter)
    with pytest.raises(DataFormatError, match=r"checksum|CRC"):
        load_npz(tmp_path / "a.npz")


@pytest.mark.parametrize("dtype", ["u1", "<u2", ">i4", ">i8", "u8"])
def test_labels_of_any_integer_type_are_read(dtype: str, tmp_path: Path) -> None:
    labels = np.array([3, 0, 1], dtype)
    np.savez(tmp_path / "a.npz", image=np.zeros((3, 4, 4, 1), np.uint8), label=labels)
    assert load_npz(tmp_path / "a.npz").labels.tolist() == [3, 0, 1]


def test_other_things_in_place_of_an_archive_are_named(tmp_path: Path) -> None:
    np.save(tmp_path / "array.npy", np.zeros(3))
    for path in (tmp_path / "array.npy", tmp_path):
        with pytest.raises(DataFormatError, match=f"{path}: not a .npz archive"):
            load_npz(path)
