"""Starting the processes of a sweep's runs, and the report on failed runs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_SHOWN_LINES = 8  # of a log


@dataclass(frozen=True)
class Failure:
    """A run that failed.

    Attributes:
        name: the run's name.
        reason: the reason, in words.
        log: the file with everything that its processes printed.
    """

    name: str
    reason: str
    log: Path

    def text(self) -> str:
        """Return the run, the reason and the last lines of the log, as text."""
        lines = [f"{self.name}: {self.reason}; the end of {self.log}:"]
        return "\n".join([*lines, *(f"  {line}" for line in last_lines(self.log))])


def command_of(folder: Path, name: str) -> list[str]:
    """Return the command that trains and judges a run.

    Args:
        folder: the sweep's directory.
        name: the run's name.
    """
    return [sys.executable, "-m", "fastadv.sweeps.work", str(folder), name]


def start(
    folder: Path,
    name: str,
    log: Path,
    *,
    environment: Mapping[str, str] | None = None,
    directory: str | None = None,
) -> subprocess.Popen[bytes]:
    """Start the process of a run. It gets SIGTERM when the thread that starts it ends.

    Args:
        folder: the sweep's directory.
        name: the run's name.
        log: the file to which its output is appended.
        environment: variables to set in addition to this process's variables.
        directory: its working directory; by default the current directory.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as output:
        return subprocess.Popen(
            [*command_of(folder, name), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            cwd=directory,
            # So that Ctrl-C reaches it once, from the sweep, and not from the terminal as well.
            start_new_session=True,
        )


def reason_of(status: int) -> str:
    """Return in words how a process ended whose status is not 0."""
    return f"ended by signal {-status}" if status < 0 else f"exit status {status}"


def last_lines(log: Path) -> list[str]:
    """Return the last lines of a log; an empty list where there is no log."""
    try:
        with open(log, "rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - 4096, 0))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return []
    # A progress bar rewrites its line after a carriage return.
    lines = [line.rpartition("\r")[2].rstrip() for line in text.replace("\r\n", "\n").split("\n")]
    return [line for line in lines if line][-_SHOWN_LINES:]
