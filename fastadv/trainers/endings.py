"""The exceptions that end a run before its last epoch."""

from __future__ import annotations

from fastadv.interruption import Interrupted, signal_name
from fastadv.trainers.checkpoint import checkpoint_name
from fastadv.trainers.run_directory import RunDirectory


class NonFiniteLossError(ArithmeticError):
    """Several iterations in a row had a loss or a gradient that is not finite."""


class TrainingInterrupted(Interrupted):
    """SIGTERM or Ctrl-C ended a run, after a step and with a checkpoint; see `Interrupted`.

    Attributes:
        run_dir: the run, which resuming continues bit for bit.
        checkpoint: the checkpoint.
    """

    def __init__(self, signum: int, run: RunDirectory, step: int) -> None:
        self.run_dir = run.path
        self.checkpoint = run.checkpoints / checkpoint_name(step)
        super().__init__(
            f"stopped by {signal_name(signum)} after step {step}; all of it is in {self.checkpoint}, "
            "from which resuming goes on",
            signum,
        )
