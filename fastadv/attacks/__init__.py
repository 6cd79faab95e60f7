"""First-order attacks on one engine."""

from __future__ import annotations

from fastadv.attacks.fgsm import FGSM
from fastadv.attacks.pgd import PGD, PGDSettings, pgd_fused

__all__ = ["FGSM", "PGD", "PGDSettings", "pgd_fused"]
