"""The names of attacks that ``evaluate`` takes, and their parser: names and callables become dataclasses."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from fastadv.attacks.fgsm import FGSM_RS_STEP
from fastadv.attacks.options import Configured
from fastadv.evaluation.context import Model
from fastadv.ops.values import check_takes, nearest, shown

ForeignAttack = Callable[[Model, Tensor, Tensor], Tensor]
AttackChoice = str | tuple[str, ForeignAttack]

CLEAN = "clean"
AUTOATTACK = "autoattack"

_STEPS = "([1-9][0-9]*)"
_PGD_NAME = re.compile(f"(pgd|cw|mim)-{_STEPS}(?:-{_STEPS}(runs)?)?")
_APGD_NAME = re.compile(f"apgd-(ce|dlr|t)(?:-{_STEPS})?")
_APGD_STEPS = 100
_SEARCH_NAME = re.compile(f"(fab-t|fab|square)(?:-{_STEPS})?")
_SEARCH_STEPS = {"fab-t": 100, "fab": 100, "square": 5000}
_CW_L2_NAME = re.compile(f"cwl2-{_STEPS}(?:-{_STEPS})?")
_MINIMUM_NAME = re.compile(f"min-(?:fgsm|pgd-{_STEPS})")
BUNDLES = {
    "quick": (CLEAN, "fgsm", "pgd-20"),
    "standard": (CLEAN, AUTOATTACK),
    "strong": (CLEAN, "pgd-100-10", "cw-100-10", "apgd-ce", "apgd-t", "fab-t", "square"),
}
_WITHOUT_STEPS = (CLEAN, AUTOATTACK, "fgsm", "fgsm-rs", "min-fgsm", *BUNDLES)
_WORDS = (
    *_WITHOUT_STEPS,
    *("pgd", "cw", "mim", "apgd-ce", "apgd-dlr", "apgd-t"),
    *_SEARCH_STEPS,
    *("cwl2", "min-pgd"),
)
_OTHER_WORDS = {
    "aa": AUTOATTACK,
    "auto-attack": AUTOATTACK,
    "natural": CLEAN,
    "none": CLEAN,
    "c&w": "cw",
    "apgd": "apgd-ce",
}
STOPS_EARLY = (
    "it stops where the surrogate is fooled, so that fewer of its images fool another model than of an attack "
    "that goes on, such as pgd-20"
)
_FEWEST_CLASSES = {"dlr": 3, "dlr-t": 4}  # by loss
# The names, and the attacks that they stand for: in messages, in the help of the command line, and in
# docs/evaluation.md.
NAMES = {
    "clean": "no attack",
    "fgsm, fgsm-rs": "one step; with a random start",
    "pgd-K, cw-K, mim-K": "K steps of PGD, of PGD on the margin, with momentum",
    "pgd-K-R, cw-K-R": "R restarts: an image is broken if any restart breaks it",
    "pgd-K-Rruns, cw-K-Rruns": "R whole runs: the run that leaves the fewest images counts",
    "apgd-ce, apgd-dlr, apgd-t": "Auto-PGD of 100 steps; apgd-ce-K for K",
    "fab-t, fab": "100 steps; fab-t-K for K",
    "square": "5000 queries; square-N for N",
    "autoattack": "the standard version",
    "cwl2-K, cwl2-K-S": (
        "Carlini and Wagner in l2, K steps of Adam for one c, or for each of S values of c; no ball"
    ),
    "min-fgsm, min-pgd-K": "the smallest radius at which FGSM or PGD of K steps succeeds; no ball",
    **{name: ", ".join(attacks) for name, attacks in BUNDLES.items()},
}
_KNOWN = (
    f"{', '.join(NAMES)}, or in Python a pair (name, callable(model, x, y) -> adversarial images)"
)


@dataclass(frozen=True)
class Clean:
    """No attack."""

    name: str = CLEAN


@dataclass(frozen=True)
class BallAttack:
    """An attack of this package in a ball; most of these attacks follow gradients.

    Attributes:
        name: the name that the user gave.
        steps: number of gradient steps, or of queries of Square.
        alpha: step size, in the norm; None if the attack chooses its own.
        random_start: whether to start from a random point of the ball.
        restarts: runs from different starts; an image counts as broken if any run breaks it.
        kind: ``"pgd"``, ``"mim"``, ``"apgd"``, ``"fab-t"``, ``"fab"`` or ``"square"``.
        loss: the loss to maximise, as the attack accepts it.
        runs: whole runs from different starts; the run of lowest accuracy counts.
    """

    name: str
    steps: int
    alpha: float | None
    random_start: bool
    restarts: int = 1
    kind: str = "pgd"
    loss: str = "ce"
    runs: int = 1

    @property
    def follows_gradients(self) -> bool:
        """Whether it finds too little on a model whose gradients lead nowhere."""
        return self.kind != "square"


@dataclass(frozen=True)
class Minimum:
    """An attack without a ball: it searches for the smallest perturbation of each image.

    Attributes:
        name: the name that the user gave.
        kind: ``"cwl2"``, the attack of Carlini and Wagner, or ``"fgsm"`` or ``"pgd"``, at the smallest radius at
            which it succeeds.
        steps: number of steps, of Adam for each c or of PGD.
        search_steps: number of values of c that are tried.
    """

    name: str
    kind: str
    steps: int = 1
    search_steps: int = 1


@dataclass(frozen=True)
class Ensemble:
    """AutoAttack, the standard version."""

    name: str = AUTOATTACK


@dataclass(frozen=True)
class UserAttack:
    """A callable from the user."""

    name: str
    attack: ForeignAttack


ChosenAttack = Clean | BallAttack | Minimum | Ensemble | UserAttack


def expand_bundles(attacks: AttackChoice | Sequence[AttackChoice]) -> list[AttackChoice]:
    """Replace each bundle by its attacks.

    An attack that is also asked for by name, or that is in two bundles, is run once, at its first place.

    Args:
        attacks: the argument of `parse_attacks`.
    """
    single = isinstance(attacks, str) or (
        isinstance(attacks, tuple) and len(attacks) == 2 and callable(attacks[1])
    )
    try:
        chosen: list[AttackChoice] = [attacks] if single else list(attacks)  # type: ignore[list-item,arg-type]
    except TypeError:
        raise TypeError(
            f"attacks must be names or pairs (name, callable), got {shown(attacks)}"
        ) from None
    expanded: list[AttackChoice] = []
    bundled: set[str] = set()  # names that a bundle has brought in
    for choice in chosen:
        if isinstance(choice, str) and choice in BUNDLES:
            new = [name for name in BUNDLES[choice] if name not in expanded]
            bundled.update(new)
            expanded += new
        elif isinstance(choice, str) and choice in bundled:
            bundled.discard(choice)  # a second time by name is a mistake
        else:
            expanded.append(choice)
    return expanded


def parse_attacks(
    attacks: AttackChoice | Sequence[AttackChoice], eps: float, alpha: float | None
) -> list[ChosenAttack]:
    """Turn the user's words into attacks.

    Args:
        attacks: names, bundles, or pairs of a name and a callable; or one of these.
        eps: radius of the ball.
        alpha: step size of PGD, MIM and C&W; by default eps / 4 (2/255 at 8/255).

    Raises:
        TypeError: for something that is neither a name nor a pair.
        ValueError: for an unknown name, a name given twice, an empty list, or a step size that no attack takes.
    """
    chosen = expand_bundles(attacks)
    if not chosen:
        raise ValueError(f"attacks must not be empty; known are: {_KNOWN}")
    step = eps / 4 if alpha is None else alpha
    if not step > 0 and eps > 0:
        raise ValueError(f"alpha must be > 0, got {alpha}: an attack without steps breaks nothing")
    parsed = [_parse_one(choice, eps, step) for choice in chosen]
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


def _takes_alpha(attack: ChosenAttack) -> bool:
    """Whether the attack has steps of a size that can be chosen."""
    return isinstance(attack, BallAttack) and _PGD_NAME.fullmatch(attack.name) is not None


def check_fewest_classes(attacks: Sequence[ChosenAttack], classes: int) -> None:
    """Require that the loss of every attack is defined for this number of classes.

    Raises:
        ValueError: naming the first attack whose loss needs more classes.
    """
    for attack in attacks:
        fewest = _FEWEST_CLASSES.get(attack.loss, 2) if isinstance(attack, BallAttack) else 2
        if classes < fewest:
            raise ValueError(
                f"{attack.name} needs at least {fewest} classes, the model has {classes}"
            )


def check_passes(attacks: Sequence[ChosenAttack], passes: int) -> None:
    """Require that every attack can follow the mean of several gradients, if there are several passes.

    Raises:
        ValueError: naming the attacks that cannot.
    """
    if passes == 1:
        return
    without = [a.name for a in attacks if not isinstance(a, Clean) and not averages(a)]
    if without:
        hint = ""
        if AUTOATTACK in without:
            hint = (
                "; AutoAttack has a version of its own: fastadv.AutoAttack(model, version='rand')"
            )
        raise ValueError(
            f"eot must be 1 for {', '.join(without)}, got {passes}: the mean of several gradients is for fgsm, "
            f"fgsm-rs, pgd, cw, mim and apgd{hint}"
        )


def averages(attack: ChosenAttack) -> bool:
    """Whether an attack can follow the mean of several gradients."""
    return isinstance(attack, BallAttack) and attack.kind in ("pgd", "mim", "apgd")


def stops_early(attack: ChosenAttack) -> bool:
    """Whether an attack stops at the step that breaks an image, or returns to the decision boundary."""
    kinds = ("fab", "fab-t", "square", "cwl2")
    return isinstance(attack, Ensemble) or (
        isinstance(attack, (BallAttack, Minimum)) and attack.kind in kinds
    )


def _parse_one(choice: AttackChoice, eps: float, step: float) -> ChosenAttack:
    if isinstance(choice, str):
        return _parse_name(choice, eps, step)
    if (
        isinstance(choice, (tuple, list))
        and len(choice) == 2
        and isinstance(choice[0], str)
        and callable(choice[1])
        and not _is_attack(choice[1])
    ):
        name, attack = choice
        if _is_built_in(name):
            raise ValueError(f"attacks: {name!r} is the name of a built-in attack, choose another")
        check_takes("attacks", attack, ("model", "x", "y"))
        return UserAttack(name, attack)
    attack = choice[-1] if isinstance(choice, (tuple, list)) and choice else choice
    hint = ""
    if _is_attack(attack):
        hint = "; of an attack pass (name, lambda model, x, y: attack(x, y))"
    raise TypeError(f"attacks must hold names or pairs (name, callable), got {shown(choice)}{hint}")


def _is_attack(value: object) -> bool:
    """Whether it is an attack of this package, or the class of one, which take no model with a call."""
    return isinstance(value, Configured) or (
        isinstance(value, type) and issubclass(value, Configured)
    )


def _is_built_in(name: str) -> bool:
    return name in BUNDLES or _find(name, 0.0, 0.0) is not None


def _parse_name(name: str, eps: float, step: float) -> ChosenAttack:
    found = _find(name, eps, step)
    if found is None:
        raise ValueError(
            f"attacks: unknown attack {name!r}{_suggestion(name)}; known are: {_KNOWN}"
        )
    return found


def _find(name: str, eps: float, step: float) -> ChosenAttack | None:
    """The attack of a name, None for an unknown one."""
    if name == CLEAN:
        return Clean()
    if name == AUTOATTACK:
        return Ensemble()
    if name == "fgsm":
        return BallAttack(name, steps=1, alpha=eps, random_start=False)
    if name == "fgsm-rs":
        return BallAttack(name, steps=1, alpha=FGSM_RS_STEP * eps, random_start=True)
    match = _PGD_NAME.fullmatch(name)
    if match and not (match[1] == "mim" and match[3]):
        kind, steps, repeats = match[1], int(match[2]), int(match[3] or 1)
        restarts, runs = (1, repeats) if match[4] else (repeats, 1)
        if kind == "mim":
            return BallAttack(name, steps, step, random_start=False, kind="mim")
        loss = "cw" if kind == "cw" else "ce"
        return BallAttack(name, steps, step, True, restarts=restarts, loss=loss, runs=runs)
    match = _APGD_NAME.fullmatch(name)
    if match:
        loss = "dlr-t" if match[1] == "t" else match[1]
        steps = int(match[2] or _APGD_STEPS)
        return BallAttack(name, steps, None, random_start=True, kind="apgd", loss=loss)
    match = _SEARCH_NAME.fullmatch(name)
    if match:
        kind, steps = match[1], int(match[2] or _SEARCH_STEPS[match[1]])
        if kind == "square":
            return BallAttack(name, steps, None, random_start=True, kind=kind, loss="cw")
        return BallAttack(name, steps, None, random_start=False, kind=kind)
    match = _CW_L2_NAME.fullmatch(name)
    if match:
        return Minimum(name, "cwl2", int(match[1]), int(match[2] or 1))
    match = _MINIMUM_NAME.fullmatch(name)
    if match:
        return Minimum(name, "pgd" if match[1] else "fgsm", int(match[1] or 1))
    return None


def usual_attacks() -> list[str]:
    """Return the bundles, and for each attack its most common name."""
    steps = {word: "1000" if word == "cwl2" else "20" for word in _WORDS}
    return [word if _is_built_in(word) else f"{word}-{steps[word]}" for word in _WORDS]


def _suggestion(name: str) -> str:
    """A hint at the attack that was probably meant: a similar name, or the name with its steps spelled right."""
    if "," in name:
        return "; several attacks are several words, and not one word with commas"
    word, numbers = re.match(r"(.*?)((?:[-_ ]?[0-9]+)*)$", name.lower(), re.DOTALL).groups()  # type: ignore[union-attr]
    if re.fullmatch("(cw|c&w)[-_ ]?l", word) and numbers.startswith("2"):
        word, numbers = "cwl2", numbers[1:]  # the first digit belongs to the norm
    word = _OTHER_WORDS.get(word.replace("_", "-"), word.replace("_", "-"))
    close = nearest(word, _WORDS)
    if not close:
        return ""
    steps = re.findall("[0-9]+", numbers)
    if close in _WITHOUT_STEPS:
        steps = []
    elif not steps and not _is_built_in(close):
        steps = ["1000" if close == "cwl2" else "20"]
    meant = "-".join([close, *steps])
    return f"; did you mean {meant!r}?" if _is_built_in(meant) else ""
