"""The settings of a PGD attack, and their checks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from fastadv.attacks.arguments import check_step
from fastadv.attacks.attack import AttackSettings
from fastadv.attacks.objectives import LossFunction, Objective
from fastadv.ops.values import integer, limit

Keep = Literal["last", "best"]


@dataclass(frozen=True)
class PGDSettings(AttackSettings):
    """The settings of a PGD attack, checked on creation. Fields as in `PGD`."""

    alpha: float = 2 / 255
    steps: int = 10
    random_start: bool = True
    restarts: int = 1
    keep: Keep = "last"
    loss: str | LossFunction = "ce"
    sparsity: float = 0.95
    _without_steps: ClassVar[str] = "the attack would stay where it begins"

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            TypeError: a field of another type.
            ValueError: a value out of range or an unknown word.
        """
        super().__post_init__()
        limit("alpha", self.step_size)
        if self.step_size == 0 < self.eps:
            raise ValueError(f"alpha must be > 0, got 0; {self._without_steps}")
        if self.norm == "linf":
            check_step(self.step_size, self.bounds)
        integer("steps", self.steps, at_least=1)
        integer("restarts", self.restarts, at_least=1)
        if self.restarts > 1 and not self.random_start:
            raise ValueError(
                "restarts must be 1 without random_start, which would repeat one run; "
                f"got {self.restarts}"
            )
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity must be in [0, 1), got {self.sparsity}")
        objective = Objective(self.loss, self.targeted)
        if objective.needs_clean_logits and not self.random_start:
            raise ValueError("random_start must be True with loss 'kl', whose gradient is 0 at x")

    @property
    def step_size(self) -> float:
        """The length of a step."""
        return self.alpha
