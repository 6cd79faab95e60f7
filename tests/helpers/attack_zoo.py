"""Every attack of the package on digits, made in one way, for the tests that hold for all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from covering import Facts
from torch import nn

import fastadv
from fastadv.attacks import Attack

Make = Callable[..., Attack]  # (model, norm="linf", **options)
RADIUS = {"linf": 0.08, "l2": 0.6, "l1": 2.5}  # on digits
WAYS: dict[str, dict[str, Any]] = {
    "eager fp32": {"engine": "eager", "precision": "fp32"},
    "compiled fp32": {"engine": "compiled", "precision": "fp32"},
    "compiled bf16": {"engine": "compiled", "precision": "bf16"},
}


def iterated(kind: Callable[..., Attack], **fixed: Any) -> Make:
    """An attack with a step size and a number of steps."""

    def make(model: nn.Module, norm: str = "linf", **options: Any) -> Attack:
        eps = RADIUS[norm]
        return kind(
            model, **{"eps": eps, "alpha": eps / 4, "steps": 5, "norm": norm, **fixed, **options}
        )

    return make


def automatic(**fixed: Any) -> Make:
    """Auto-PGD, which chooses its step size."""

    def make(model: nn.Module, norm: str = "linf", **options: Any) -> Attack:
        given = {"eps": RADIUS[norm], "steps": 10, "norm": norm, **fixed, **options}
        return fastadv.APGD(model, **given)

    return make


def single(kind: Callable[..., Attack]) -> Make:
    """An attack of one step."""
    return lambda model, norm="linf", **options: kind(model, RADIUS[norm], norm=norm, **options)


def searching(**fixed: Any) -> Make:
    """The Square attack, which takes no gradient."""

    def make(model: nn.Module, norm: str = "linf", **options: Any) -> Attack:
        given = {"eps": RADIUS[norm], "queries": 20, "norm": norm, **fixed, **options}
        return fastadv.Square(model, **given)

    return make


BALL_ATTACKS: dict[str, Make] = {
    "pgd": iterated(fastadv.PGD),
    "pgd best": iterated(fastadv.PGD, keep="best"),
    "pgd restarts": iterated(fastadv.PGD, restarts=2),
    "pgd best restarts": iterated(fastadv.PGD, restarts=2, keep="best"),
    "fgsm": single(fastadv.FGSM),
    "fgsm-rs": single(fastadv.FGSMRS),
    "friendly": iterated(fastadv.FriendlyPGD, tau=2),
    "mim": iterated(fastadv.MIM),
    "cw": iterated(fastadv.CW),
    "apgd-ce": automatic(),
    "apgd-dlr": automatic(loss="dlr"),
    "apgd-cw restarts": automatic(loss="cw", restarts=2),
    "apgd-ce-t": automatic(loss="ce-t", target_classes=2),
    "apgd-dlr-t": automatic(loss="dlr-t", target_classes=2),
    "square": searching(),
    "square-ce restarts": searching(loss="ce", restarts=2),
}
RECORDED = [name for name in BALL_ATTACKS if not name.startswith(("apgd", "square"))]
WITHOUT_GRADIENT = ["square", "square-ce restarts"]


def _cw_l2(model: nn.Module, norm: str = "l2", **options: Any) -> Attack:
    return fastadv.CWL2(model, **{"steps": 10, "search_steps": 3, "c": 1.0, "lr": 0.1, **options})


def crossing(**fixed: Any) -> Make:
    """The fast adaptive boundary attack, whose changes are as small as it can make them, whatever the radius."""

    def make(model: nn.Module, norm: str = "linf", **options: Any) -> Attack:
        given = {"eps": 3 * RADIUS[norm], "steps": 5, "norm": norm, **fixed, **options}
        return fastadv.FAB(model, **given)

    return make


# An attack by its name, and a norm.
NAMES_AND_NORMS = [(name, norm) for name in BALL_ATTACKS for norm in RADIUS]

ATTACKS: dict[str, Make] = {
    **BALL_ATTACKS,
    "cw-l2": _cw_l2,
    "fab-t": crossing(),
    "fab": crossing(target_classes=None),
}
TARGETED = ["pgd", "pgd best", "fgsm", "fgsm-rs", "mim", "cw", "apgd-ce", "apgd-dlr", "cw-l2"]


def classes_with(*others: str) -> Callable[[Mapping[str, Any]], Facts]:
    """Facts for `pytest.mark.covering`: every attack, and every class of attacks with every value of each other.

    The attacks of a class differ in options that are dealt with above the engine and the norm.
    """

    def facts(given: Mapping[str, Any]) -> Facts:
        name = given["name"]
        kind = type(ATTACKS[name](nn.Identity())).__name__
        return {name, *((kind, other, given[other]) for other in others)}

    return facts
