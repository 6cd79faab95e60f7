"""The attacks: PGD and its variants, Auto-PGD, C&W, FAB, Square."""

from __future__ import annotations

from fastadv.attacks.apgd import APGD, APGDSettings
from fastadv.attacks.attack import Attack, AttackSettings
from fastadv.attacks.cw import CW, CWL2, CWL2Settings
from fastadv.attacks.fab import FAB, FABSettings
from fastadv.attacks.fgsm import FGSM, FGSMRS
from fastadv.attacks.friendly import FriendlyPGD
from fastadv.attacks.mim import MIM
from fastadv.attacks.minimum_perturbation import minimum_perturbation
from fastadv.attacks.pgd import PGD
from fastadv.attacks.pgd_function import pgd_fused
from fastadv.attacks.pgd_settings import PGDSettings
from fastadv.attacks.report import AttackReport
from fastadv.attacks.square import Square, SquareSettings
from fastadv.attacks.starts import uniform_radius_start

__all__ = [
    "APGD",
    "CW",
    "CWL2",
    "FAB",
    "FGSM",
    "FGSMRS",
    "MIM",
    "PGD",
    "APGDSettings",
    "Attack",
    "AttackReport",
    "AttackSettings",
    "CWL2Settings",
    "FABSettings",
    "FriendlyPGD",
    "PGDSettings",
    "Square",
    "SquareSettings",
    "minimum_perturbation",
    "pgd_fused",
    "uniform_radius_start",
]
