"""What ``evaluate`` is asked to run: names and callables, checked and turned into dataclasses."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from fastadv.evaluation.context import Model

ForeignAttack = Callable[[Model, Tensor, Tensor], Tensor]
AttackChoice = str | tuple[str, ForeignAttack]

_PGD_NAME = re.compile(r"pgd-([1-9][0-9]*)")
_KNOWN = (
    "clean, fgsm, pgd-K for any K >= 1 (pgd-20, say), autoattack, "
    "or a pair (name, callable(model, x, y) -> adversarial images)"
)


@dataclass(frozen=True)
class Clean:
    """No attack."""

    name: str = "clean"


@dataclass(frozen=True)
class Gradient:
    """FGSM or PGD of this package.

    Attributes:
        name: as asked for.
        steps: number of gradient steps.
        alpha: step size, in the norm.
        random_start: whether to start from a random point of the ball.
    """

    name: str
    steps: int
    alpha: float
    random_start: bool


@dataclass(frozen=True)
class Ensemble:
    """AutoAttack, the standard version."""

    name: str = "autoattack"


@dataclass(frozen=True)
class Foreign:
    """A callable of the user's."""

    name: str
    attack: ForeignAttack


Attack = Clean | Gradient | Ensemble | Foreign


def parse_attacks(
    attacks: AttackChoice | Sequence[AttackChoice], eps: float, alpha: float | None
) -> list[Attack]:
    """Turn what the user asked for into attacks.

    Args:
        attacks: names, or pairs of a name and a callable; one alone is taken as a list of one.
        eps: radius of the ball.
        alpha: step size of PGD; by default eps / 4 (2/255 at 8/255).

    Raises:
        TypeError: for something that is neither a name nor a pair.
        ValueError: for an unknown name, a name given twice, or an empty list.
    """
    single = isinstance(attacks, str) or (
        isinstance(attacks, tuple) and len(attacks) == 2 and callable(attacks[1])
    )
    chosen = [attacks] if single else list(attacks)
    if not chosen:
        raise ValueError(f"attacks must not be empty; known are: {_KNOWN}")
    step = eps / 4 if alpha is None else alpha
    parsed = [_parse_one(choice, eps, step) for choice in chosen]  # type: ignore[arg-type]
    names = [attack.name for attack in parsed]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"attacks must have different names, {name!r} appears twice")
    return parsed


def _parse_one(choice: AttackChoice, eps: float, step: float) -> Attack:
    if isinstance(choice, str):
        return _parse_name(choice, eps, step)
    if (
        isinstance(choice, (tuple, list))
        and len(choice) == 2
        and isinstance(choice[0], str)
        and callable(choice[1])
    ):
        name, attack = choice
        if name in ("clean", "fgsm", "autoattack") or _PGD_NAME.fullmatch(name):
            raise ValueError(f"attacks: {name!r} is the name of a built-in attack, choose another")
        return Foreign(name, attack)
    raise TypeError(f"attacks must hold names or pairs (name, callable), got {choice!r}")


def _parse_name(name: str, eps: float, step: float) -> Attack:
    if name == "clean":
        return Clean()
    if name == "autoattack":
        return Ensemble()
    if name == "fgsm":
        return Gradient(name, steps=1, alpha=eps, random_start=False)
    match = _PGD_NAME.fullmatch(name)
    if match:
        return Gradient(name, steps=int(match.group(1)), alpha=step, random_start=True)
    raise ValueError(f"unknown attack {name!r}; known are: {_KNOWN}")
