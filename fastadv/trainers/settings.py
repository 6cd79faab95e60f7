"""Settings of checkpoints and logs, which change no result."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastadv.fields import check_fields
from fastadv.ranks import TIMEOUT
from fastadv.trainers.number import Number
from fastadv.trainers.trackers import tracker_names


@dataclass(frozen=True)
class Settings:
    """Settings of checkpoints and logs, which change no result.

    Attributes:
        checkpoint_every: iterations between two checkpoints. A checkpoint is also written after each epoch.
        checkpoint_minutes: minutes between two checkpoints.
        keep: number of newest checkpoints to keep, besides the best checkpoint.
        log_every: iterations between two records in metrics.jsonl.
        tensorboard: also write TensorBoard events; short for log tensorboard.
        log: programs that also get the metrics, joined by commas: tensorboard, wandb, mlflow.
        timeout: with several processes under torchrun, seconds that a process waits for another process. After
            that time it ends with an error.
    """

    checkpoint_every: int | None = None
    checkpoint_minutes: Number | None = 10.0
    keep: int = 2
    log_every: int = 20
    tensorboard: bool = False
    log: str | None = None
    timeout: Number = TIMEOUT

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("checkpoint_every", "keep", "log_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        for name in ("checkpoint_minutes", "timeout"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be > 0, got {value}")
        tracker_names(self.log)

    @property
    def trackers(self) -> list[str]:
        """Names of the programs that get the metrics."""
        names = tracker_names(self.log)
        return names if "tensorboard" in names or not self.tensorboard else ["tensorboard", *names]
