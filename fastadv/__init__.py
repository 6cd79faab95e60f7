"""fastadv: fast adversarial training for PyTorch.

Fused kernels (`fastadv.ops`), an attack engine (`fastadv.attacks`), training objectives
(`fastadv.losses`), thin trainers (`fastadv.trainers`) and evaluation (`fastadv.evaluate`).
"""

from __future__ import annotations

from fastadv import losses, ops
from fastadv.attacks import (
    APGD,
    CW,
    CWL2,
    FGSM,
    FGSMRS,
    MIM,
    PGD,
    minimum_perturbation,
    pgd_fused,
)
from fastadv.evaluation import evaluate
from fastadv.ops import backend

__version__ = "0.1.0"

__all__ = [
    "APGD",
    "CW",
    "CWL2",
    "FGSM",
    "FGSMRS",
    "MIM",
    "PGD",
    "__version__",
    "backend",
    "evaluate",
    "losses",
    "minimum_perturbation",
    "ops",
    "pgd_fused",
]
