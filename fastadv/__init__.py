"""fastadv: fast adversarial training for PyTorch.

Fused kernels (`fastadv.ops`), an attack engine (`fastadv.attacks`), training objectives
(`fastadv.losses`), thin trainers (`fastadv.trainers`) and evaluation (`fastadv.evaluate`).

The ops come with the package; everything else is imported on first use, so that code which calls the ops alone
loads nothing else.
"""

from __future__ import annotations

import importlib
from pkgutil import extend_path
from typing import TYPE_CHECKING, Any

# Where Python runs in the checkout and the package is installed as well, the checkout's modules are taken. The
# compiled part and the kernels lie in the installed package alone.
__path__ = extend_path(__path__, __name__)

from fastadv import ops
from fastadv.ops import backend

if TYPE_CHECKING:
    from fastadv import losses
    from fastadv.attacks import (
        APGD,
        CW,
        CWL2,
        FAB,
        FGSM,
        FGSMRS,
        MIM,
        PGD,
        FriendlyPGD,
        Square,
        pgd_fused,
    )
    from fastadv.attacks.minimum_perturbation import minimum_perturbation
    from fastadv.evaluation.ensemble import AutoAttack
    from fastadv.evaluation.evaluate import evaluate

__version__ = "0.1.0"

__all__ = [
    "APGD",
    "CW",
    "CWL2",
    "FAB",
    "FGSM",
    "FGSMRS",
    "MIM",
    "PGD",
    "AutoAttack",
    "FriendlyPGD",
    "Square",
    "__version__",
    "backend",
    "evaluate",
    "losses",
    "minimum_perturbation",
    "ops",
    "pgd_fused",
]

_SUBPACKAGES = ("attacks", "compat", "data", "evaluation", "losses", "models", "sweeps", "trainers")
# Subpackages in which names are looked up that fastadv itself does not have.
_SEARCHED = ("trainers", "evaluation", "models", "data", "losses")
_ATTACKS = (
    "APGD",
    "CW",
    "CWL2",
    "FAB",
    "FGSM",
    "FGSMRS",
    "MIM",
    "PGD",
    "FriendlyPGD",
    "Square",
    "minimum_perturbation",
    "pgd_fused",
)
_HOMES = {
    **dict.fromkeys(_ATTACKS, "attacks"),
    "AutoAttack": "evaluation",
    "evaluate": "evaluation",
}


def __getattr__(name: str) -> Any:
    if name in _SUBPACKAGES:
        return importlib.import_module(f"fastadv.{name}")
    if name in _HOMES:
        value = getattr(importlib.import_module(f"fastadv.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    hint = "" if name.startswith("_") else _hint_of(name)
    raise AttributeError(f"module 'fastadv' has no attribute {name!r}{hint}")


def _hint_of(name: str) -> str:
    """The hint for an unknown name: the same name in a subpackage, or else a similar name of fastadv itself."""
    for part in _SEARCHED:
        names = importlib.import_module(f"fastadv.{part}").__all__
        found = [one for one in names if one.lower() == name.lower()]
        if found:
            return f"; did you mean fastadv.{part}.{found[0]}?"
    return ops.values.did_you_mean(name, __all__, ops.synonyms.ATTACKS)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBPACKAGES})
