"""Locks between processes that write one file."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fastadv.files import followed, naming, remove_leftovers

# The errors of file systems that have no locks.
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
_POLL_SECONDS = 0.02  # seconds between two tries


@contextmanager
def locked(path: str | os.PathLike[str], wait: float = 60.0) -> Iterator[None]:
    """Hold the lock of a file: one process or thread at a time is inside the with statement.

    The lock is on `.NAME.lock` in the file's folder; a link stands for its file. The kernel releases
    it when its holder ends, however that happens. The lock's file is removed at the end of the with statement.

    Some file systems, such as Lustre by default, have no locks. There the holder makes the file `.NAME.held`. A
    file that a killed process has left is taken over when the time to wait is over. Without a time to wait it is
    taken over if it names a process of this machine that has ended.

    Args:
        path: the file, which need not exist; its folder must.
        wait: seconds to wait for another holder.

    Raises:
        TimeoutError: when another holder has it for longer than that.
        OSError: when the folder cannot be written.
    """
    target = followed(path)  # so that all links to a file share its lock
    lock = target.with_name(f".{target.name}.lock")
    with naming(target):
        lock, descriptor = _acquire(lock, wait)
    try:
        yield
    finally:
        # Removed while the lock is held: a process that has opened the file already gets its lock, finds it
        # removed, and opens a new one. In a folder that is gone or read-only, closing the file gives the lock
        # back. An error of the removal would hide the error of the with statement.
        with suppress(OSError):
            if _is_still(lock, descriptor):
                lock.unlink(missing_ok=True)
        os.close(descriptor)


@contextmanager
def rewriting(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Read a file and write it anew while no other process does so.

    Missing folders are made, and files that killed processes have left in the folder are deleted.

    Args:
        path: the file, which need not exist.

    Yields:
        The same path; of a link the file to which it leads.

    Raises:
        TimeoutError: as `locked`.
        OSError: when the file cannot be written; the message names it.
    """
    target = followed(path)
    with naming(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target), naming(target):
        remove_leftovers(target.parent)
        yield target


def _acquire(lock: Path, wait: float) -> tuple[Path, int]:
    """Return the lock's file, locked, and its descriptor."""
    deadline = time.monotonic() + wait
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_still(lock, descriptor):
                return lock, descriptor
        except BlockingIOError:
            if time.monotonic() >= deadline:
                os.close(descriptor)
                raise TimeoutError(f"{lock}: another process holds this lock") from None
            time.sleep(_POLL_SECONDS)
        except OSError as error:
            os.close(descriptor)
            if error.errno not in NO_LOCKS:
                raise
            lock.unlink(missing_ok=True)
            return _make(lock.with_suffix(".held"), wait)
        os.close(descriptor)


def _make(file: Path, wait: float) -> tuple[Path, int]:
    """Return a file that this process alone has made, and its descriptor.

    Of several processes that wait, one takes over the file that a killed process has left. The others see a new
    file, and wait for its holder.

    Raises:
        TimeoutError: there is no time to wait, and its holder may be at work.
    """
    seen, deadline = None, 0.0
    while True:
        try:
            held = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            with suppress(OSError):  # such as on a full disk
                os.write(held, f"{os.getpid()} {socket.gethostname()}\n".encode())
            return file, held
        except FileExistsError:
            there = _identity(file)
            if there is None:  # its holder has just removed it
                continue
            if there != seen:
                seen, deadline = there, time.monotonic() + wait
            elif wait == 0 and not _has_ended(file):
                raise TimeoutError(
                    f"{file}: another process holds this lock, or was killed while it held it; delete this file "
                    "if no process is at work here"
                ) from None
            elif time.monotonic() >= deadline:
                file.unlink(missing_ok=True)
            time.sleep(_POLL_SECONDS)


def _has_ended(file: Path) -> bool:
    """Whether a file names a process of this machine that is no more."""
    try:
        pid, host = file.read_text(encoding="utf-8").split()
        if host == socket.gethostname():
            os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError):  # its holder has just removed it, or belongs to somebody else
        return False
    return False


def _identity(file: Path) -> tuple[int, int] | None:
    """A value that another file in the same place does not have; None if there is no file."""
    try:
        found = file.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_ctime_ns


def _is_still(lock: Path, descriptor: int) -> bool:
    """Whether the path still names the file that was opened."""
    try:
        return os.path.samestat(os.stat(lock), os.fstat(descriptor))
    except FileNotFoundError:
        return False
