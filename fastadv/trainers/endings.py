"""The exceptions that end a run before its last epoch, and the file with a batch whose loss is not finite."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastadv.files import write_atomically
from fastadv.interruption import Interrupted, signal_name
from fastadv.trainers.checkpoint import checkpoint_name
from fastadv.trainers.run_directory import RunDirectory


class NonFiniteLossError(ArithmeticError):
    """Several iterations in a row had a loss or a gradient that is not finite."""


@contextmanager
def failed_writes_explained() -> Iterator[None]:
    """Let the error of a file that cannot be written during a run say how the run goes on."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.strerror is not None:  # it is not about a file to write
            raise
        explained = type(error)(
            f"{error}; once it can be, resume=True (--resume) goes on with the run"
        )
        explained.errno = error.errno
        raise explained from error


def write_nonfinite(file: Path, content: dict[str, Any]) -> None:
    """Write the batch of a failed iteration, its loss and the weights before it, into a file for `torch.load`."""
    written = io.BytesIO()
    torch.save(content, written)
    write_atomically(file, written.getvalue())


class TrainingInterrupted(Interrupted):
    """SIGTERM or Ctrl-C ended a run, after a step and with a checkpoint; see `Interrupted`.

    Attributes:
        run_dir: the run directory. A resumed run goes on bit for bit.
        checkpoint: the checkpoint that was written.
    """

    def __init__(self, signum: int, run: RunDirectory, step: int) -> None:
        self.run_dir = run.path
        self.checkpoint = run.checkpoints / checkpoint_name(step)
        super().__init__(
            f"stopped by {signal_name(signum)} after step {step}; all of it is in {self.checkpoint}, "
            "from which resuming goes on",
            signum,
        )
