"""What ``evaluate`` is asked to run: names and callables, checked and turned into dataclasses."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from fastadv.attacks.fgsm import FGSM_RS_STEP
from fastadv.evaluation.context import Model
from fastadv.ops.values import shown

ForeignAttack = Callable[[Model, Tensor, Tensor], Tensor]
AttackChoice = str | tuple[str, ForeignAttack]

CLEAN = "clean"
AUTOATTACK = "autoattack"

_STEPS = "([1-9][0-9]*)"
_PGD_NAME = re.compile(f"(pgd|cw|mim)-{_STEPS}(?:-{_STEPS})?")
_APGD_NAME = re.compile(f"apgd-(ce|dlr|t)(?:-{_STEPS})?")
_APGD_STEPS = 100
_SEARCH_NAME = re.compile(f"(fab-t|fab|square)(?:-{_STEPS})?")
_SEARCH_STEPS = {"fab-t": 100, "fab": 100, "square": 5000}
_WITHOUT_STEPS = (CLEAN, AUTOATTACK, "fgsm", "fgsm-rs")
_WORDS = (*_WITHOUT_STEPS, "pgd", "cw", "mim", "apgd-ce", "apgd-dlr", "apgd-t", *_SEARCH_STEPS)
_OTHER_WORDS = {
    "aa": AUTOATTACK,
    "auto-attack": AUTOATTACK,
    "natural": CLEAN,
    "none": CLEAN,
    "c&w": "cw",
    "apgd": "apgd-ce",
}
_FEWEST_CLASSES = {"dlr": 3, "dlr-t": 4}  # by loss
_KNOWN = (
    "clean, fgsm, fgsm-rs, pgd-K for any K >= 1 (pgd-20, say), pgd-K-R with R restarts, mim-K, cw-K, cw-K-R, "
    "apgd-ce, apgd-dlr, apgd-t (each also with steps: apgd-ce-50), fab-t, fab, square (each also with steps or "
    "queries: square-1000), autoattack, "
    "or a pair (name, callable(model, x, y) -> adversarial images)"
)


@dataclass(frozen=True)
class Clean:
    """No attack."""

    name: str = CLEAN


@dataclass(frozen=True)
class Gradient:
    """An attack of this package, most of which follow gradients.

    Attributes:
        name: as asked for.
        steps: number of gradient steps, or of queries of Square.
        alpha: step size, in the norm; None where the attack chooses its own.
        random_start: whether to start from a random point of the ball.
        restarts: runs from different starts; an image counts as broken when one of them breaks it.
        kind: ``"pgd"``, ``"mim"``, ``"apgd"``, ``"fab-t"``, ``"fab"`` or ``"square"``.
        loss: what is raised, as the attack takes it.
    """

    name: str
    steps: int
    alpha: float | None
    random_start: bool
    restarts: int = 1
    kind: str = "pgd"
    loss: str = "ce"


@dataclass(frozen=True)
class Ensemble:
    """AutoAttack, the standard version."""

    name: str = AUTOATTACK


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
        alpha: step size of PGD, MIM and C&W; by default eps / 4 (2/255 at 8/255).

    Raises:
        TypeError: for something that is neither a name nor a pair.
        ValueError: for an unknown name, a name given twice, an empty list, or a step size that no attack takes.
    """
    single = isinstance(attacks, str) or (
        isinstance(attacks, tuple) and len(attacks) == 2 and callable(attacks[1])
    )
    try:
        chosen = [attacks] if single else list(attacks)
    except TypeError:
        raise TypeError(
            f"attacks must be names or pairs (name, callable), got {shown(attacks)}"
        ) from None
    if not chosen:
        raise ValueError(f"attacks must not be empty; known are: {_KNOWN}")
    step = eps / 4 if alpha is None else alpha
    parsed = [_parse_one(choice, eps, step) for choice in chosen]  # type: ignore[arg-type]
    names = [attack.name for attack in parsed]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"attacks must have different names, {name!r} appears twice")
    if alpha is not None and not any(_takes_alpha(attack) for attack in parsed):
        raise ValueError(
            "alpha must be left out: it is the step size of PGD, C&W and MIM, and the attacks are "
            f"{' '.join(names)}"
        )
    return parsed


def _takes_alpha(attack: Attack) -> bool:
    """Whether the attack has steps of a size that can be chosen."""
    return isinstance(attack, Gradient) and _PGD_NAME.fullmatch(attack.name) is not None


def check_ensemble_asked_for(attacks: Sequence[Attack], name: str, given: bool) -> bool:
    """Refuse an option of AutoAttack's where there is none.

    Args:
        attacks: what is to run.
        name: of the option.
        given: whether the caller has chosen it.

    Returns:
        Whether AutoAttack is among the attacks.

    Raises:
        ValueError: the option would be dropped.
    """
    asked = any(isinstance(attack, Ensemble) for attack in attacks)
    if given and not asked:
        raise ValueError(
            f"{name} must be left out: it is an option of autoattack, and the attacks are "
            f"{' '.join(attack.name for attack in attacks)}"
        )
    return asked


def check_fewest_classes(attacks: Sequence[Attack], classes: int) -> None:
    """Require that the loss of every attack is defined for this number of classes.

    Raises:
        ValueError: naming the first whose loss is not.
    """
    for attack in attacks:
        fewest = _FEWEST_CLASSES.get(attack.loss, 2) if isinstance(attack, Gradient) else 2
        if classes < fewest:
            raise ValueError(
                f"{attack.name} needs at least {fewest} classes, the model has {classes}"
            )


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
        if _is_built_in(name):
            raise ValueError(f"attacks: {name!r} is the name of a built-in attack, choose another")
        return Foreign(name, attack)
    raise TypeError(f"attacks must hold names or pairs (name, callable), got {choice!r}")


def _is_built_in(name: str) -> bool:
    return _find(name, 0.0, 0.0) is not None


def _parse_name(name: str, eps: float, step: float) -> Attack:
    found = _find(name, eps, step)
    if found is None:
        raise ValueError(
            f"attacks: unknown attack {name!r}{_suggestion(name)}; known are: {_KNOWN}"
        )
    return found


def _find(name: str, eps: float, step: float) -> Attack | None:
    """The attack of a name, None for an unknown one."""
    if name == CLEAN:
        return Clean()
    if name == AUTOATTACK:
        return Ensemble()
    if name == "fgsm":
        return Gradient(name, steps=1, alpha=eps, random_start=False)
    if name == "fgsm-rs":
        return Gradient(name, steps=1, alpha=FGSM_RS_STEP * eps, random_start=True)
    match = _PGD_NAME.fullmatch(name)
    if match and not (match[1] == "mim" and match[3]):
        kind, steps, restarts = match[1], int(match[2]), int(match[3] or 1)
        if kind == "mim":
            return Gradient(name, steps, step, random_start=False, kind="mim")
        loss = "cw" if kind == "cw" else "ce"
        return Gradient(name, steps, step, random_start=True, restarts=restarts, loss=loss)
    match = _APGD_NAME.fullmatch(name)
    if match:
        loss = "dlr-t" if match[1] == "t" else match[1]
        steps = int(match[2] or _APGD_STEPS)
        return Gradient(name, steps, None, random_start=True, kind="apgd", loss=loss)
    match = _SEARCH_NAME.fullmatch(name)
    if match:
        kind, steps = match[1], int(match[2] or _SEARCH_STEPS[match[1]])
        if kind == "square":
            return Gradient(name, steps, None, random_start=True, kind=kind, loss="cw")
        return Gradient(name, steps, None, random_start=False, kind=kind)
    return None


def _suggestion(name: str) -> str:
    """Say what may have been meant: a name with its steps set off otherwise, or one that looks like it."""
    word, numbers = re.match(r"(.*?)((?:[-_ ]?[0-9]+)*)$", name.lower(), re.DOTALL).groups()  # type: ignore[union-attr]
    word = _OTHER_WORDS.get(word.replace("_", "-"), word.replace("_", "-"))
    close = difflib.get_close_matches(word, _WORDS, n=1)
    if not close:
        return ""
    steps = re.findall("[0-9]+", numbers)
    if close[0] in _WITHOUT_STEPS:
        steps = []
    elif not steps and not _is_built_in(close[0]):
        steps = ["20"]
    meant = "-".join([close[0], *steps])
    return f"; did you mean {meant!r}?" if _is_built_in(meant) else ""
