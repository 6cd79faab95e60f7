"""The lock of a run directory, which lets only one process write. It ends with the process."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
import time
import warnings
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from fastadv.files import is_running
from fastadv.locks import NO_LOCKS

_TIMEOUT = 2.0  # seconds to wait: a process that was killed may take a moment to end
_held: dict[Path, dict[str, Any]] = {}  # the locks of this process
_taking = threading.Lock()


class RunInUseError(OSError):
    """Another process trains in the run directory; the message names it."""


class RunLock:
    """The lock of a run directory; only the process that holds it writes there.

    It is a lock of the operating system on a file. The system releases it when the process ends for any reason.
    Network file systems share it between machines. Child processes, such as those that read data ahead, do not
    inherit it. The file names the holder.

    Leaving the `with` statement releases the lock, if it was taken.

    Args:
        folder: the run directory.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / ".lock"
        self._descriptor: int | None = None

    def __enter__(self) -> RunLock:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def check(self) -> None:
        """Check that no process holds the lock, without taking it.

        Raises:
            RunInUseError: if a process holds it.
        """
        self._check_own()
        try:
            os.close(self._open(os.O_RDWR))
        except RunInUseError:
            raise
        except OSError:  # there is no lock file, or it cannot be locked; `take` reports this
            return

    def take(self) -> None:
        """Take the lock; the folder must exist.

        Raises:
            RunInUseError: if another process holds it, or another object of this process.
            OSError: if the folder cannot be written.
        """
        with _taking:
            self._check_own()
            descriptor = self._open(os.O_RDWR | os.O_CREAT)
            while not self._is_current(
                descriptor
            ):  # the last holder has deleted the file meanwhile
                os.close(descriptor)
                descriptor = self._open(os.O_RDWR | os.O_CREAT)
            since = time.strftime("%Y-%m-%d %H:%M:%S %z")
            holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
            try:
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(holder).encode() + b"\n", 0)
            except OSError:  # such as on a full disk
                self._path.unlink(missing_ok=True)
                os.close(descriptor)
                raise
            self._descriptor = descriptor
            _held[self._key] = holder

    def keep(self) -> None:
        """Hold the lock also from now on, if this process has taken it.

        The system gives it back when this process closes any descriptor of the file, such as code that copies the
        whole directory. Then it is taken again.

        Raises:
            RunInUseError: if another process has taken it meanwhile.
            OSError: if the folder cannot be written.
        """
        if self._descriptor is None:
            return
        if self._is_current(self._descriptor):
            self._lock(self._descriptor)
            return
        os.close(self._descriptor)
        self._descriptor = None
        del _held[self._key]
        self.take()

    def release(self) -> None:
        """Release the lock and delete its file, if this process holds it."""
        if self._descriptor is None or _held.get(self._key, {}).get("pid") != os.getpid():
            return
        with suppress(OSError):
            self._path.unlink()
        os.close(self._descriptor)
        self._descriptor = None
        del _held[self._key]

    @property
    def _key(self) -> Path:
        return self._path.parent.resolve() / self._path.name

    def _check_own(self) -> None:
        """Refuse a second lock of this process, which the operating system would allow."""
        if self._key in _held:
            raise self._in_use(_held[self._key])

    def _open(self, flags: int) -> int:
        """Open the file with a lock on it."""
        descriptor = os.open(self._path, flags, 0o666)
        try:
            self._lock(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _lock(self, descriptor: int) -> None:
        deadline = time.monotonic() + _TIMEOUT
        while True:
            try:
                # Not `flock`, which child processes would inherit.
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError as error:
                if error.errno in NO_LOCKS:
                    return self._go_by_name(descriptor)
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise
            if time.monotonic() > deadline:
                raise self._in_use(_holder(descriptor))
            time.sleep(0.05)

    def _go_by_name(self, descriptor: int) -> None:
        """Check the holder that the file names, as the file system has no locks. Elsewhere it gives a warning."""
        holder = _holder(descriptor)
        pid = holder.get("pid")
        if holder.get("host") == socket.gethostname():
            if isinstance(pid, int) and pid != os.getpid() and is_running(pid):
                raise self._in_use(holder)
        elif holder:
            warnings.warn(
                f"{self._path}: this file system has no locks; make sure that {_described(holder)} does not use "
                f"{self._folder} any more",
                stacklevel=2,
            )

    def _is_current(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self._path))
        except FileNotFoundError:
            return False

    def _in_use(self, holder: dict[str, Any]) -> RunInUseError:
        return RunInUseError(
            f"run_dir {self._folder} is in use by {_described(holder)}; wait for its end, or choose "
            "another directory"
        )


def _holder(descriptor: int) -> dict[str, Any]:
    """The holder of the lock that the file names; empty if it names no holder."""
    try:
        content = json.loads(os.pread(descriptor, 4096, 0))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _described(holder: dict[str, Any]) -> str:
    if not holder:
        return "another process"
    return f"process {holder.get('pid')} on host {holder.get('host')} since {holder.get('since')}"
