"""Downloading the official archive of CIFAR, and unpacking only the files that are read."""

from __future__ import annotations

import hashlib
import http.client
import os
import shutil
import tarfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from fastadv.data.cifar_layout import CifarLayout, SplitLayout
from fastadv.data.errors import DataFormatError
from fastadv.files import naming, remove, remove_leftovers, sync_path, temporary_beside

_BLOCK = 1 << 20
_TIMEOUT = 60.0  # seconds without a byte
_SCHEMES = ("https", "http", "file")
_NETWORK_ERRORS = (
    urllib.error.URLError,
    http.client.HTTPException,
    ConnectionError,
    TimeoutError,
)


def download_cifar(
    layout: CifarLayout,
    root: Path,
    url: str | None = None,
    on_bytes: Callable[[int, int], None] | None = None,
) -> Path:
    """Download the archive of the binary layout, check it, and unpack the files that `read_cifar` reads.

    The folder appears under its name when it is complete. A process that is killed leaves hidden files, which the
    next download deletes. Only plain files of known names and sizes are taken from the archive. Its paths do not
    decide where a file is written.

    Args:
        layout: which data set.
        root: folder in which the folder of the files is made; both are made where they are missing.
        url: address of the archive, with https, http or file; by default the official one.
        on_bytes: called with the number of bytes received and the number in all, which is 0 where the server does
            not say it.

    Returns:
        The folder of the files.

    Raises:
        FileExistsError: if the folder exists; its content is not changed.
        ConnectionError: if the archive cannot be fetched.
        DataFormatError: if it is not the official archive.
        OSError: if something cannot be written.
        ValueError: for another kind of address.
    """
    source = layout.archive_url if url is None else url
    if urlsplit(source).scheme not in _SCHEMES:
        raise ValueError(f"url must begin with https:, http: or file:, got {source!r}")
    folder = root / layout.binary_folder
    if folder.exists():
        raise FileExistsError(
            f"{folder} is there already, and is left as it is; move it away, and try again"
        )
    with naming(root):
        root.mkdir(parents=True, exist_ok=True)
    remove_leftovers(root)
    archive, unpacked = temporary_beside(root / layout.archive), temporary_beside(folder)
    try:
        found = _fetch(source, archive, root / layout.archive, layout, on_bytes)
        if found != layout.archive_md5:
            raise DataFormatError(
                f"{source} is not the official archive of {layout.name}: MD5 {found}, expected "
                f"{layout.archive_md5}; nothing is kept of it"
            )
        with naming(folder):
            unpacked.mkdir()
            _unpack(archive, unpacked, layout, source)
            os.replace(unpacked, folder)
            sync_path(root)
    finally:
        remove(archive)
        remove(unpacked)
    return folder


def _fetch(
    source: str,
    archive: Path,
    final: Path,
    layout: CifarLayout,
    on_bytes: Callable[[int, int], None] | None,
) -> str:
    """Write the content of an address to a file, and return its MD5."""
    digest, done, total = hashlib.md5(usedforsecurity=False), 0, 0
    with naming(final), open(archive, "xb") as file:
        try:
            for block, total in _blocks(source):
                digest.update(block)
                file.write(block)
                done += len(block)
                if on_bytes is not None:
                    on_bytes(done, total)
        except _NETWORK_ERRORS as error:
            raise _unreachable(source, error, layout) from error
    if done < total:
        raise _unreachable(source, f"it ended after {done:,} of {total:,} bytes", layout)
    return digest.hexdigest()


def _blocks(source: str) -> Iterator[tuple[bytes, int]]:
    """The content of an address in blocks, each with the number of bytes in all, 0 where it is not known."""
    with urllib.request.urlopen(source, timeout=_TIMEOUT) as answer:
        total = int(answer.headers.get("Content-Length") or 0)
        while block := answer.read(_BLOCK):
            yield block, total


def _unreachable(source: str, why: object, layout: CifarLayout) -> ConnectionError:
    reason = why.reason if type(why) is urllib.error.URLError else why
    return ConnectionError(
        f"{source} cannot be downloaded: {reason}. Without a network, fetch {layout.archive} on another machine, "
        "copy it here, and unpack it with tar -xzf"
    )


def _unpack(archive: Path, folder: Path, layout: CifarLayout, source: str) -> None:
    """Write the files that `read_cifar` reads to a folder."""
    wanted: dict[str, SplitLayout] = {
        f"{layout.binary_folder}/{name}": split
        for split in (layout.train, layout.test)
        for name in split.binary_files
    }
    try:
        with tarfile.open(archive, "r:gz") as content:
            for member in content:
                split = wanted.get(member.name.removeprefix("./"))
                if split is None:
                    continue
                stream = content.extractfile(member) if member.isreg() else None
                if stream is None or member.size != layout.binary_size(split):
                    raise DataFormatError(
                        f"{source}: {member.name} has {member.size:,} bytes; expected a plain file of "
                        f"{layout.binary_size(split):,}"
                    )
                del wanted[member.name.removeprefix("./")]
                _write_flushed(stream, folder / member.name.rpartition("/")[2])
    except (tarfile.TarError, EOFError) as error:
        raise DataFormatError(f"{source} cannot be unpacked: {error}") from error
    if wanted:
        raise DataFormatError(f"{source} has no {', '.join(wanted)}")


def _write_flushed(stream: IO[bytes], target: Path) -> None:
    with open(target, "xb") as file:
        shutil.copyfileobj(stream, file, _BLOCK)
        file.flush()
        os.fsync(file.fileno())
