"""`fastadv data`: what it says of files that are there, damaged or missing, and what it downloads."""

from __future__ import annotations

import dataclasses
import hashlib
import http.server
import io
import json
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from fastadv.cli import main
from fastadv.data import DataFormatError, datasets
from fastadv.data.cifar_content import content_digest
from fastadv.data.cifar_download import download_cifar
from fastadv.data.cifar_layout import CIFAR10, CIFAR100, PIXEL_BYTES, CifarLayout, Records

RECORDS = 20  # of each file
NAMES = CIFAR10.train.binary_files + CIFAR10.test.binary_files
FOLDER = CIFAR10.binary_folder


@pytest.fixture(scope="module")
def contents() -> dict[str, bytes]:
    """Six small files as the official archive has them."""
    random = np.random.default_rng(0)
    found = {}
    for name in NAMES:
        labels = random.permutation(RECORDS).astype(np.uint8)[:, None] % 10
        pixels = random.integers(0, 256, (RECORDS, PIXEL_BYTES), dtype=np.uint8)
        found[name] = np.concatenate([labels, pixels], axis=1).tobytes()
    return found


def archive_of(files: dict[str, bytes]) -> bytes:
    """A .tar.gz, with a file that nobody reads, and one that would land elsewhere."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        others = {f"{FOLDER}/readme.html": b"x", "../outside.bin": b"x", "/tmp/outside.bin": b"x"}
        for name, content in {**others, **files}.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def digest_of(parts: list[bytes]) -> str:
    rows = np.frombuffer(b"".join(parts), np.uint8).reshape(-1, 1 + PIXEL_BYTES)
    return content_digest(Records(rows[:, 0], None, rows[:, 1:]))


@pytest.fixture
def official(contents: dict[str, bytes]) -> bytes:
    return archive_of({f"{FOLDER}/{name}": content for name, content in contents.items()})


@pytest.fixture
def layout(
    contents: dict[str, bytes], official: bytes, monkeypatch: pytest.MonkeyPatch
) -> CifarLayout:
    """CIFAR-10's layout with few records a file, which the command takes for the official one."""
    train, test = CIFAR10.train, CIFAR10.test
    small = dataclasses.replace(
        CIFAR10,
        train=dataclasses.replace(
            train, records=RECORDS, digest=digest_of([contents[n] for n in train.binary_files])
        ),
        test=dataclasses.replace(
            test, records=RECORDS, digest=digest_of([contents[n] for n in test.binary_files])
        ),
        archive_md5=hashlib.md5(official).hexdigest(),
    )
    monkeypatch.setitem(datasets._FROM_FILES, "cifar10", small)
    return small


@pytest.fixture
def server(tmp_path: Path, official: bytes) -> Iterator[str]:
    """An address on this machine, below which the archive is."""
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / CIFAR10.archive).write_bytes(official)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            if not self.path.startswith("/short"):
                return super().do_GET()
            self.send_response(200)
            self.send_header("Content-Length", str(len(official)))
            self.end_headers()
            self.wfile.write(official[:100])  # and the connection ends

    handler = partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()
        thread.join()


def said(words: list[str], status: int, capfd: pytest.CaptureFixture[str]) -> str:
    """What a command prints where it prints nothing else."""
    capfd.readouterr()
    assert main(["data", *words]) == status
    out, err = capfd.readouterr()
    assert not (out and err)
    return str(out + err)


def test_where_the_files_are_to_be_had(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = said(["cifar10"], 2, capfd)
    assert "https://www.cs.toronto.edu/~kriz/cifar.html as cifar-10-binary.tar.gz" in text
    text = said(["cifar100", "--root", str(tmp_path / "no")], 2, capfd)
    assert "there is no such folder" in text and "train.bin" in text
    assert f"`fastadv data cifar100 --root {tmp_path / 'no'} --download`" in text
    assert CIFAR100.archive_url == "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz"
    assert "scikit-learn, which is installed" in said(["digits"], 0, capfd)


def test_a_download_is_checked_unpacked_and_used(
    layout: CifarLayout, server: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "new" / "root"
    words = ["cifar10", "--root", str(root), "--download", "--url", f"{server}/{layout.archive}"]
    text = said(words, 0, capfd)
    assert f"All is as it should be: --data cifar10 --root {root}" in text
    assert [path.name for path in root.iterdir()] == [FOLDER]
    assert sorted(path.name for path in (root / FOLDER).iterdir()) == sorted(NAMES)
    assert not (tmp_path / "new" / "outside.bin").exists()
    assert len(datasets.load_dataset("cifar10", root).train) == 5 * RECORDS
    # What is there is not downloaded again, and stays as it is.
    assert said([*words[:-1], "http://127.0.0.1:1/none"], 0, capfd) == text
    found = json.loads(said(["cifar10", "--root", str(root), "--json"], 0, capfd))
    assert found["good"] and [file["size"] for file in found["files"]] == [RECORDS * 3073] * 6


def test_all_that_is_wrong_is_told_at_once(
    layout: CifarLayout,
    contents: dict[str, bytes],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / FOLDER
    folder.mkdir()
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    words = ["cifar10", "--root", str(tmp_path)]
    assert "All is as it should be" in said(words, 0, capfd)
    (folder / "data_batch_1.bin").unlink()
    (folder / "data_batch_2.bin").write_bytes(contents["data_batch_2.bin"][:-1])
    (folder / "data_batch_3.bin").write_bytes(b"\x0a" + contents["data_batch_3.bin"][1:])
    (folder / "test_batch.bin").write_bytes(contents["test_batch.bin"][:-1] + b"\x00")
    text = said(words, 2, capfd)
    assert "data_batch_1.bin is missing" in text
    assert "data_batch_2.bin has 61,459 bytes; expected 20 records" in text
    assert "label of record 0 is 10, must be in 0 .. 9" in text
    assert "the test records are not those of cifar10" in text
    assert text.count(" good\n") == 3  # of test_batch.bin the bytes are in order
    found = json.loads(said([*words, "--json"], 2, capfd))
    assert not found["good"] and found["files"][0]["size"] is None and len(found["problems"]) == 1
    # A folder that is there is never written to.
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    said([*words, "--download"], 2, capfd)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("http://127.0.0.1:1/none.tar.gz", "cannot be downloaded: [Errno 111] Connection refused"),
        ("SERVER/none.tar.gz", "404"),
        ("SERVER/short.tar.gz", "100 of"),
        ("file:///nowhere/none.tar.gz", "No such file"),
        ("ftp://127.0.0.1/none.tar.gz", "url must begin with https:, http: or file:"),
    ],
)
def test_what_cannot_be_downloaded_leaves_nothing(
    address: str,
    message: str,
    layout: CifarLayout,
    server: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    root = tmp_path / "root"
    words = ["cifar10", "--root", str(root), "--download", "--url"]
    text = said([*words, address.replace("SERVER", server)], 2, capfd)
    assert message in text and len(text.splitlines()) == 1
    assert "another machine" in text or "url must" in text
    assert not root.exists() or list(root.iterdir()) == []


def test_another_archive_is_refused(
    layout: CifarLayout, contents: dict[str, bytes], official: bytes, tmp_path: Path
) -> None:
    names = {f"{FOLDER}/{name}": content for name, content in contents.items()}
    last = f"{FOLDER}/{NAMES[-1]}"
    fewer = {name: content for name, content in names.items() if name != last}
    for number, (archive, message, expected) in enumerate(
        [
            (official + b"\x00", "MD5", None),
            (archive_of({**names, last: b"short"}), "has 5 bytes; expected a plain file", ""),
            (archive_of(fewer), f"has no {last}", ""),
            (official[:-500], "cannot be unpacked", ""),
        ]
    ):
        file = tmp_path / f"{number}.tar.gz"
        file.write_bytes(archive)
        md5 = layout.archive_md5 if expected is None else hashlib.md5(archive).hexdigest()
        taken = dataclasses.replace(layout, archive_md5=md5)
        with pytest.raises(DataFormatError, match=message):
            download_cifar(taken, tmp_path / "root", file.as_uri())
        assert list((tmp_path / "root").iterdir()) == []


def test_words_that_do_not_fit(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for words, message in (
        (["cifar1"], "did you mean 'cifar10'?"),
        (["digits", "--root", "x"], "root must be left out with digits"),
        (["digits", "--download"], "download must be left out with digits"),
        (["cifar10", "--download"], "root must be given with download"),
        (["cifar10", "--root", "x", "--url", "file:///x"], "url must come with download"),
    ):
        assert message in said(words, 2, capfd)


def test_commands_that_are_advised_can_be_pasted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "my data"
    folder.mkdir()
    assert main(["data", "cifar10", "--root", str(folder)]) == 2
    assert f"fastadv data cifar10 --root '{folder}' --download" in capsys.readouterr().out
    assert main(["report", str(folder)]) == 2
    assert f"run `fastadv eval '{folder}'` first" in capsys.readouterr().err
