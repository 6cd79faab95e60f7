"""Options of an evaluation that none of its attacks takes. They are refused, as they would have no effect."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fastadv.evaluation.attack_list import ChosenAttack, Clean, Ensemble, Minimum
from fastadv.evaluation.minimum import CarliniWagner


def check_options_used(
    attacks: Sequence[ChosenAttack],
    *,
    engine: str,
    worst_case: bool,
    constants: CarliniWagner,
    surrogate: object = None,
    eot: int = 1,
) -> None:
    """Refuse options that none of the attacks takes.

    Args:
        attacks: the attacks to run.
        engine: how AutoAttack searches.
        worst_case: whether each attack gets the images that the attacks before it have left.
        constants: the settings of Carlini and Wagner's attack in l2.
        surrogate: the surrogate, if it is for the attacks alone.
        eot: the passes for each gradient, if they are for the attacks alone.

    Raises:
        ValueError: naming the first option that would have no effect.
    """
    usual = CarliniWagner()
    options: list[tuple[str, object, object, Callable[[ChosenAttack], bool], str]] = [
        ("engine", engine, "auto", _is_ensemble, "of autoattack"),
        ("cw_c", constants.c, usual.c, _is_carlini_wagner, "of cwl2-K and cwl2-K-S"),
        ("cw_lr", constants.lr, usual.lr, _is_carlini_wagner, "of cwl2-K and cwl2-K-S"),
        ("worst_case", worst_case, False, _is_in_ball, "of attacks in a ball"),
        ("surrogate", surrogate, None, _is_attack, "of attacks"),
        ("eot", eot, 1, _is_attack, "of attacks"),
    ]
    for name, value, default, takes, users in options:
        if value != default and not any(map(takes, attacks)):
            raise ValueError(
                f"{name} must be left out, got {value!r}: it is an option {users}, and the attacks are "
                f"{' '.join(attack.name for attack in attacks)}"
            )


def _is_ensemble(attack: ChosenAttack) -> bool:
    return isinstance(attack, Ensemble)


def _is_carlini_wagner(attack: ChosenAttack) -> bool:
    return isinstance(attack, Minimum) and attack.kind == "cwl2"


def _is_in_ball(attack: ChosenAttack) -> bool:
    return not isinstance(attack, Clean | Minimum)


def _is_attack(attack: ChosenAttack) -> bool:
    return not isinstance(attack, Clean)
