"""Writing files so that a reader, or a process killed at any moment, sees the old or the new whole."""

from __future__ import annotations

import glob
import hashlib
import os
import tempfile
from pathlib import Path

_RANDOM_CHARACTERS = 8  # at the end of the names that tempfile makes


def write_atomically(path: str | os.PathLike[str], content: bytes | str) -> Path:
    """Write a file under a temporary name in its folder, flush it to disk, then rename it.

    Args:
        path: where the file goes; missing folders are made.
        content: bytes, or text written as UTF-8 with newlines as they are.

    Returns:
        The path written.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes private files; the final one gets the usual permissions.
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return target


def remove_leftovers(path: Path) -> None:
    """Remove what processes left that were killed while they wrote a file, which nobody may be writing now."""
    for leftover in path.parent.glob(
        f".{glob.escape(path.name)}.{'[a-z0-9_]' * _RANDOM_CHARACTERS}"
    ):
        leftover.unlink(missing_ok=True)


def point_link(link: Path, target: str) -> None:
    """Make a symbolic link point to a name in its own folder, in one step.

    Args:
        link: the link, which may exist.
        target: relative name that it points to.
    """
    temporary = link.with_name(f".{link.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    os.replace(temporary, link)
    sync_path(link.parent)


def sync_path(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
