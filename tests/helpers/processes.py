"""Processes as `python` starts them, without the seconds in which a new interpreter imports torch and fastadv.

They are forked from a server that has imported both and has used nothing of them. Each is a process of its own,
with its own signals, environment and death. What only a new interpreter shows is tested with `subprocess`: which
modules are imported, a variable of the environment that a library reads once, the status after an exception.
"""

from __future__ import annotations

import contextlib
import functools
import json
import multiprocessing
import multiprocessing.connection
import os
import runpy
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import reduction
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import IO, Any

import pytest
import torch.multiprocessing
from paths import HELPERS, environment

_PRELOADED = [
    *("torch._dynamo", "torch.distributed", "torch.utils.data", "fastadv.cli", "fastadv.sweeps"),
    *("fastadv.trainers", "fastadv.evaluation", "fastadv.engine", "fastadv.reproduction"),
    *(
        "sklearn.datasets",
        "torch.distributed.run",
    ),  # which take a process over a second where it needs them
]


@functools.cache
def _server() -> ForkServerContext:
    """The server; its libraries read the number of threads when they are loaded."""
    from multiprocessing import forkserver

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        forkserver.ensure_running()
    return context


def warm_context() -> ForkServerContext:
    """A context of `multiprocessing` whose processes are forked from the server."""
    return _server()


def spawn(function: Callable[..., None], arguments: tuple[Any, ...], count: int) -> None:
    """`torch.multiprocessing.spawn`, forked from the server.

    Args:
        function: called with the number of its process and the arguments.
        arguments: what follows the number.
        count: how many processes; all must end well.
    """
    _server()
    torch.multiprocessing.start_processes(
        function, arguments, nprocs=count, start_method="forkserver"
    )


class Started:
    """A process that runs what `python` would run for some words, with the interface of `subprocess.Popen`.

    Args:
        words: "-m" and a module, "-c" and code, or a script; then its arguments.
        env: its environment; None for this process's.
        cwd: its working directory; None for this process's.
        merged: whether errors go where the output goes.
        stdout: a file descriptor for its output; None keeps the output for `communicate`.
        stderr: the same for its errors.
    """

    def __init__(
        self,
        words: Sequence[str],
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        merged: bool = False,
        stdout: int | None = None,
        stderr: int | None = None,
    ) -> None:
        self.args = [str(word) for word in words]
        self._out, self._err = (tempfile.TemporaryFile() for _ in range(2))  # noqa: SIM115  as long as it
        out = self._out.fileno() if stdout is None else stdout
        err = self._err.fileno() if stderr is None else stderr
        err = out if merged else err
        where = dict(os.environ if env is None else env), str(cwd or Path.cwd())
        self._process = _server().Process(target=_run, args=(self.args, *where, _Files(out, err)))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """As `subprocess` has it: a signal's number, negative, for a process that it ended."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end and return its status."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return self.returncode

    def wait_or(self, connection: socket.socket) -> None:
        """Wait for its end, or until a connection has something to read or is closed."""
        multiprocessing.connection.wait([self._process.sentinel, connection])

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end and return what it has written as output and as errors."""
        self.wait(timeout)
        return self.output(), _text_of(self._err)

    def output(self) -> str:
        """Return the output so far."""
        return _text_of(self._out)

    def first_line(self, seconds: float = 120.0) -> str:
        """Wait until a line of output is whole, and return it."""
        deadline = time.monotonic() + seconds
        while "\n" not in self.output():
            told = f"status {self.returncode}: {self.output()}\n{_text_of(self._err)}"
            assert self.poll() is None and time.monotonic() < deadline, told
            time.sleep(0.01)
        return self.output().partition("\n")[0]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class _Files:
    """The output and the errors of a process, as file descriptors that are handed to the server."""

    def __init__(self, *descriptors: int) -> None:
        self.descriptors = descriptors

    def __reduce__(self) -> Any:
        return _Handed, tuple(map(reduction.DupFd, self.descriptors))


class _Handed:
    """The same in the process."""

    def __init__(self, *handed: Any) -> None:
        self.descriptors = [one.detach() for one in handed]


def _text_of(file: IO[bytes]) -> str:
    """The content of a file whose position belongs to the process that writes."""
    return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode()


@contextlib.contextmanager
def warm_python() -> Iterator[str]:
    """A program that does what `python` does, by a process that is forked from the server.

    It is for programs that start an interpreter by its path, such as torchrun, which takes the path from the
    variable PYTHON_EXEC. It hands on the signals that it gets, and ends as the forked process ends. If it is
    killed, the forked process is killed too. The forked process has another number and another parent.
    """
    _server()
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        address, program = Path(folder, "server"), Path(folder, "python")
        listener.bind(str(address))
        listener.listen()
        words = [sys.executable, "-IS", str(HELPERS / "warm_client.py"), str(address)]
        program.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
        program.chmod(0o755)
        server = threading.Thread(target=_attend_all, args=(listener,), daemon=True)
        server.start()
        try:
            yield str(program)
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            server.join()


def _attend_all(listener: socket.socket) -> None:
    """Give each client a thread, until nobody listens any more."""
    with contextlib.suppress(OSError):
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=_attend, args=(connection,), daemon=True).start()


def _attend(connection: socket.socket) -> None:
    """Start the process that a client asks for; tell its number and its status, or kill it after the client."""
    with connection:
        length, files, _, _ = socket.recv_fds(connection, 4, 2)
        asked = connection.makefile("rb").read(int.from_bytes(length, "little"))
        words, variables, folder = json.loads(asked)
        process = Started(words, variables, folder, stdout=files[0], stderr=files[1])
        for file in files:
            os.close(file)
        with contextlib.suppress(ConnectionError):  # of a client that was killed
            connection.sendall(process.pid.to_bytes(4, "little"))
            process.wait_or(connection)
            if process.returncode is not None:
                connection.sendall(process.returncode.to_bytes(4, "little", signed=True))
        process.kill()
        process.wait()


def rank_environments(count: int) -> list[dict[str, str]]:
    """The environments in which torchrun starts so many processes of one machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    size = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    launcher = {"TORCHELASTIC_RUN_ID": "job", "TORCHELASTIC_RESTART_COUNT": "0"}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        environment(RANK=str(rank), LOCAL_RANK=str(rank), **size, **launcher, **meeting)
        for rank in range(count)
    ]


def ran(
    words: Sequence[str],
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout: float = 300.0,
) -> subprocess.CompletedProcess[str]:
    """`subprocess.run` for a `Started` process, with its output and errors as text."""
    process = Started(words, env, cwd)
    try:
        out, err = process.communicate(timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode is not None
    return subprocess.CompletedProcess(words, process.returncode, out, err)


def _run(words: list[str], variables: dict[str, str], folder: str, files: _Handed) -> None:
    """What the process does; its status is that of the `SystemExit` that this raises, if any."""
    for number, file in enumerate(files.descriptors, 1):
        os.dup2(file, number)
    for file in files.descriptors:
        os.close(file)
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    words = (
        words[1:] if words[0] == "-u" else words
    )  # what is written is read when the process has ended
    kind, *rest = words
    first = str(Path(kind).resolve().parent) if kind not in ("-m", "-c") else folder
    asked = [path for path in variables.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:0] = [first, *asked]
    if kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = words
        runpy.run_path(kind, run_name="__main__")
