"""The attacks under torchattacks' names and with its habits: ``import fastadv.compat as torchattacks``.

The calling differs from `fastadv`'s own attacks, and nothing else. Labels may be left out. Images may be NumPy
arrays or bytes, or normalised. Targets are chosen by modes. Each class names the attack in `fastadv` that does the
work. A call draws its random numbers anew, from torch's default generator, unless ``seed`` is set.
"""

from __future__ import annotations

from typing import NoReturn

from fastadv.compat.attack import Attack
from fastadv.compat.attacks import (
    APGD,
    APGDT,
    BIM,
    CW,
    EOTPGD,
    FAB,
    FFGSM,
    FGSM,
    MIFGSM,
    PGD,
    PGDL2,
    TPGD,
    Square,
)
from fastadv.compat.multi import MultiAttack
from fastadv.ops.values import did_you_mean

__all__ = [
    "APGD",
    "APGDT",
    "BIM",
    "CW",
    "EOTPGD",
    "FAB",
    "FFGSM",
    "FGSM",
    "MIFGSM",
    "PGD",
    "PGDL2",
    "TPGD",
    "Attack",
    "MultiAttack",
    "Square",
]


def __getattr__(name: str) -> NoReturn:
    hint = "; fastadv.AutoAttack is one" if name == "AutoAttack" else did_you_mean(name, __all__)
    raise AttributeError(f"module 'fastadv.compat' has no attribute {name!r}{hint}")
