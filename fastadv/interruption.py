"""Signals that end a process, such as SIGTERM: a request to stop at the next good moment, and an exception."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType
from typing import Any

_DEFAULTS = {
    signal.SIGINT: (signal.default_int_handler, signal.SIG_DFL),
    signal.SIGTERM: (signal.SIG_DFL,),
    signal.SIGHUP: (signal.SIG_DFL,),  # the terminal is gone; under nohup it is ignored
    signal.SIGUSR1: (signal.SIG_DFL,),  # of Slurm's --signal=USR1@SECONDS
}
_ours: list[Any] = []  # handlers set by this module; with statements may be nested


class Interrupted(KeyboardInterrupt, SystemExit):
    """SIGTERM, Ctrl-C, SIGHUP or SIGUSR1 ended the work. The message says which work is kept, and how to go on.

    It is a `KeyboardInterrupt`, so that no `except Exception` takes it for a fault, and a `SystemExit`: a script
    that does not catch it ends with the status that a shell gives, 128 and the signal's number.

    Attributes:
        signal: the signal, SIGTERM, SIGINT, SIGHUP or SIGUSR1.
        code: the exit status.
    """

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signal = signal.Signals(signum)
        self.code: int = 128 + signum


class StopRequest:
    """Takes SIGTERM, SIGINT, SIGHUP and SIGUSR1 as a request to stop soon, while a with statement lasts.

    A second signal raises `Interrupted` at once. Handlers are set in the main thread only, and only where a signal
    has its default handler: a caller's own handler decides for itself, and an ignored signal stays ignored.

    Args:
        notice: text to write on standard error at the first signal; None for silence.
        repeats_within: seconds in which further signals belong to the first one. A launcher may forward what the
            terminal has sent to its processes already.
    """

    def __init__(self, notice: str | None = None, repeats_within: float = 0.0) -> None:
        self._notice = notice
        self._repeats_within = repeats_within
        self._since = 0.0
        self._process = os.getpid()
        self._handlers = ExitStack()
        self.signal: int | None = None

    def __enter__(self) -> StopRequest:
        self._handlers.enter_context(_handled_by(self._receive))
        return self

    def __exit__(self, *exception: object) -> None:
        self._handlers.close()

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            _in_child(signum)
            return
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._since = signum, now
            if self._notice is not None:
                _write_error(f"{signal_name(signum)}: {self._notice}\n")
        elif now - self._since >= self._repeats_within:
            self._handlers.close()  # so that a third one has its default effect
            raise Interrupted(f"stopped at once by {signal_name(signum)}", signum)


@contextmanager
def stopped_by_signals(message: str) -> Iterator[None]:
    """Let SIGTERM, SIGINT, SIGHUP and SIGUSR1 raise `Interrupted` with a message while a with statement lasts."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise Interrupted(message, signum)

    with _handled_by(stop):
        yield


@contextmanager
def _handled_by(handler: Any) -> Iterator[None]:
    """Set a handler in place of the default ones or an outer one of ours, and put these back."""
    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number, defaults in _DEFAULTS.items():
            if signal.getsignal(number) in (*defaults, *_ours):
                before[number] = signal.signal(number, handler)
        _ours.append(handler)
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)
        if handler in _ours:
            _ours.remove(handler)


def _in_child(signum: int) -> None:
    """Handle a signal in a forked process, which has the handler from its parent: the parent decides on Ctrl-C."""
    if signum != signal.SIGINT:
        signal.signal(signum, signal.SIG_DFL)
        signal.raise_signal(signum)


def signal_name(signum: int) -> str:
    """Return the common name of a signal."""
    return "Ctrl-C" if signum == signal.SIGINT else signal.Signals(signum).name


def _write_error(text: str) -> None:
    """Write from within a signal handler, where Python's own streams may be in use."""
    with suppress(OSError, ValueError):  # nobody may be there to read
        descriptor = sys.__stderr__.fileno() if sys.__stderr__ else 2
        below_bar = "\n" if os.isatty(descriptor) else ""
        os.write(descriptor, (below_bar + text).encode())
