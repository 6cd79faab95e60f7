"""The versions of AutoAttack: the attacks that each runs, and the classes that an attack needs."""

from __future__ import annotations

from collections.abc import Sequence

from fastadv.ops.values import check_choice, did_you_mean, shown

STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")
RAND = ("apgd-ce", "apgd-dlr")  # for models that draw random numbers
RAND_PASSES = 20  # passes through such a model for one gradient
# For each attack the number of classes that it needs: DLR uses the third largest logit, targeted DLR the fourth.
FEWEST_CLASSES = {"apgd-ce": 2, "apgd-dlr": 3, "apgd-t": 4, "fab": 2, "fab-t": 2, "square": 2}
_VERSIONS = {"standard": STANDARD, "rand": RAND}


def check_version(version: str | Sequence[str]) -> tuple[str, ...]:
    """Require a version of AutoAttack, and return its attacks.

    Raises:
        TypeError: it is neither a name nor a list of names.
        ValueError: a name is unknown or given twice, or the list is empty.
    """
    if isinstance(version, str):
        if version not in _VERSIONS:
            known = (*_VERSIONS, *FEWEST_CLASSES)
            hint = f"; did you mean [{version!r}]?" if version in FEWEST_CLASSES else ""
            raise ValueError(
                "version must be 'standard' or a list of attacks or 'rand', got "
                f"{version!r}{hint or did_you_mean(version, known)}"
            )
        return _VERSIONS[version]
    if not isinstance(version, Sequence) or not all(isinstance(name, str) for name in version):
        raise TypeError(
            f"version must be 'standard' or a list of attacks or 'rand', got {shown(version)}"
        )
    attacks = tuple(version)
    for attack in attacks:
        check_choice("version", attack, tuple(FEWEST_CLASSES))
    if not attacks or len(set(attacks)) < len(attacks):
        raise ValueError(
            f"version must name at least one attack and no attack twice, got {attacks}"
        )
    return attacks


def check_classes(attacks: Sequence[str], classes: int) -> None:
    """Require that every attack is defined for this number of classes.

    Raises:
        ValueError: naming the first attack that needs more classes, and the attacks that can run instead.
    """
    for attack in attacks:
        if classes < FEWEST_CLASSES[attack]:
            usable = [
                a
                for a in ("apgd-ce", "apgd-dlr", "fab-t", "square")
                if classes >= FEWEST_CLASSES[a]
            ]
            raise ValueError(
                f"{attack} needs at least {FEWEST_CLASSES[attack]} classes, the model has {classes}; "
                f"use autoattack(..., version={usable})"
            )
