"""Atomic writing of files: a reader finds the old file or the new one, even if the writing process was killed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
import socket
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# A file that is being written has a name that begins so, until it is whole.
TEMPORARY = ".writing-"
_BEGINNING = 100_000  # characters that are read of a file that may be replaced
_MAX_NAME_LENGTH = 100  # bytes; file systems take 255
_MAX_KEY_LENGTH = 150  # bytes of a key beside its hash
_KEY_DIGITS = 12  # of a key's hash
_DAY = 24 * 60 * 60
_FREE_SPACE = "free some space there and try again; files written before are whole"
_ADVICE = {
    errno.ENOSPC: _FREE_SPACE,
    errno.EDQUOT: _FREE_SPACE,
    errno.EFBIG: "the file system or a limit of the process (ulimit -f) allows no file so large",
    errno.EROFS: "choose a folder that can be written",
    errno.EACCES: "choose a folder that can be written",
    errno.EPERM: "choose a folder that can be written",
    errno.EEXIST: "a folder of its path is a file, or a link to nothing",
    errno.ENOTDIR: "a folder of its path is a file",
}
_NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


def write_atomically(path: str | os.PathLike[str], content: bytes | str) -> Path:
    """Write a file under a temporary name in its folder, flush it to disk, then rename it.

    Args:
        path: where the file goes; missing folders are made.
        content: bytes, or text written as UTF-8 with newlines as they are.

    Returns:
        The path written.

    Raises:
        OSError: if it cannot be written; the message names the file, the reason and a remedy.
    """
    target = followed(path)  # so that the link stays
    with naming(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_beside(target)
        try:
            data = content.encode() if isinstance(content, str) else content
            write_through(temporary, data, target)
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    return target


def followed(path: str | os.PathLike[str]) -> Path:
    """Return the file to which a link leads in the end; the path itself where it is no link."""
    return Path(os.path.realpath(path)) if os.path.islink(path) else Path(path)


def check_replaceable(path: str | os.PathLike[str], mark: str, writer: str) -> None:
    """Refuse to replace a file that somebody else has written. An empty file may be replaced.

    Args:
        path: the file, which need not exist.
        mark: text near the beginning of the files that may be replaced.
        writer: the command that writes such files, for the message.

    Raises:
        FileExistsError: if the file has other content.
    """
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            start = file.read(_BEGINNING)
    except OSError:  # it is not there; or the writing will say why it cannot be written
        return
    if start.strip() and mark not in start:
        raise FileExistsError(
            f"{os.fspath(path)} is there and was not written by `{writer}`; name another file or folder, or take "
            "it away"
        )


def write_through(path: Path, content: bytes, final: Path) -> None:
    """Write a new file and flush it to disk.

    Args:
        path: the file.
        content: its bytes.
        final: where it will be, for the message.

    Raises:
        OSError: if it cannot be written, or exists already. The message names ``final``.
    """
    with naming(final), open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def naming(path: object) -> Iterator[None]:
    """Raise errors of the operating system again with the name of the file that was to be written and a remedy."""
    try:
        yield
    except OSError as error:
        if error.strerror is None:  # it says all this already
            raise
        advice = _ADVICE.get(error.errno or 0)
        hint = f"; {advice}" if advice else ""
        explained = type(error)(f"{path} cannot be written: {error.strerror}{hint}")
        explained.errno = error.errno
        raise explained from error


def point_link(link: Path, target: str) -> None:
    """Make a symbolic link point to a name in its own folder, in one step.

    A folder in its place is removed: tools that copy the targets of links leave one. Where the file system has no
    links, a file that contains the name is written.

    Args:
        link: the link, which may exist.
        target: relative name that it points to.
    """
    with naming(link):
        temporary = temporary_beside(link)
        try:
            temporary.symlink_to(target)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            write_through(temporary, target.encode(), link)
        if link.is_dir() and not link.is_symlink():
            aside = temporary_beside(link)
            os.replace(link, aside)
            os.replace(temporary, link)
            remove(aside)
        else:
            os.replace(temporary, link)
        sync_path(link.parent)


def temporary_beside(path: Path) -> Path:
    """Return a new name beside a path, which names the future file and the process that writes it."""
    owner = f"{socket.gethostname()}@{os.getpid()}"
    return path.with_name(
        f"{TEMPORARY}{shortened(path.name, _MAX_NAME_LENGTH)}@{owner}@{secrets.token_hex(4)}"
    )


def shortened(name: str, max_length: int) -> str:
    """Return the beginning of a file's name that has at most a number of bytes, in which file systems count."""
    return os.fsencode(name)[:max_length].decode(errors="ignore")


def file_key(name: str, *facts: object) -> str:
    """Return a name for files whose content depends on these facts: a text and a hash.

    Args:
        name: the text, of which characters other than letters, digits, "-" and "." are replaced.
        facts: their repr must show their value.
    """
    plain = "".join(letter if letter.isalnum() or letter in "-." else "_" for letter in name)
    kept = shortened(plain, _MAX_KEY_LENGTH)
    if kept != plain:  # for example of an evaluation at many radii
        facts = (*facts, name)
    digest = hashlib.sha256(repr(facts).encode()).hexdigest()
    return f"{kept}-{digest[:_KEY_DIGITS]}"


def remove_leftovers(folder: Path) -> None:
    """Delete files that killed processes have left half written in a folder.

    The file of a process on another machine counts as left when it is a day old.
    """
    for path in folder.glob(f"{TEMPORARY}*"):
        *_, host, pid, _ = ("", "", *path.name.split("@"))
        if host == socket.gethostname() and pid.isdecimal():
            left = not is_running(int(pid))
        else:
            left = time.time() - _modified(path) > _DAY
        if left:
            remove(path)


def is_running(pid: int) -> bool:
    """Return whether this machine has a process of that number."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it is another user's
        return True
    return True


def remove(path: Path) -> None:
    """Delete a file, a link or a folder with all that is in it, as far as that is possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync_path(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def text_of(path: str | os.PathLike[str]) -> str:
    """Return the text of a file in UTF-8, with or without the mark that Windows puts in front of it.

    Raises:
        OSError: if it cannot be read, or is a pipe or a device, whose end may never come.
        UnicodeDecodeError: if it is no UTF-8; a ValueError.
    """
    file = Path(path)
    if file.exists() and not file.is_file() and not file.is_dir():
        raise OSError(errno.EINVAL, "it is a pipe or a device, and must be a file", os.fspath(path))
    return file.read_text(encoding="utf-8-sig")


def json_of(path: str | os.PathLike[str]) -> Any:
    """Return the content of a JSON file.

    Raises:
        OSError: as in `text_of`.
        ValueError: if it is no JSON; the message says so, and does not name the file.
    """
    text = ""
    try:
        text = text_of(path)
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        merge = any(line.startswith("<<<<<<< ") for line in text.splitlines())
        hint = (
            "; it has the marks of a merge, '<<<<<<<', which must be finished first"
            if merge
            else ""
        )
        raise ValueError(f"it is not valid JSON ({error}){hint}") from error


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_archive(path: Path) -> None:
    """Check the content of a file that `torch.save` wrote by its checksums, at which `torch.load` does not look.

    Args:
        path: a file that `torch.load` can read. A file without checksums is accepted as it is.

    Raises:
        ValueError: an entry is damaged.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        has_checksums = any(entry.CRC for entry in archive.infolist())
        damaged = archive.testzip() if has_checksums else None
    if damaged is not None:
        raise ValueError(f"its entry {damaged!r} is damaged: the checksum is another")


def read_npz(path: str | os.PathLike[str], names: Sequence[str]) -> dict[str, Any]:
    """Read arrays of a .npz file by their names, and check the checksums of the file; nothing is unpickled.

    Args:
        path: the file.
        names: names of the arrays to read.

    Returns:
        The arrays by name, in the order of ``names``.

    Raises:
        FileNotFoundError: if there is no such file.
        Exception: if the file is damaged, or lacks an array. A damaged archive can raise nearly any exception.
    """
    import numpy as np  # the other functions here need no numpy

    if os.path.isfile(path) and not zipfile.is_zipfile(path):
        raise ValueError("it is no zip archive")
    with np.load(path, allow_pickle=False) as archive:
        # Where a damaged header shortens an array, numpy stops reading before the checksum.
        damaged = archive.zip.testzip()
        if damaged is not None:
            raise ValueError(f"the checksum of {damaged} is wrong")
        absent = [name for name in names if name not in archive.files]
        if absent:
            there = ", ".join(archive.files) or "no array"
            raise ValueError(f"it has no array {absent[0]!r}; it has {there}")
        arrays = {name: archive[name] for name in names}
        for name, array in arrays.items():
            if not isinstance(array, np.ndarray):  # numpy returns a file that is no array as bytes
                raise ValueError(f"its file {name!r} is no array")
        return arrays


def _modified(path: Path) -> float:
    """When a file was changed last; now, if it is gone."""
    try:
        return path.lstat().st_mtime
    except OSError:
        return time.time()
