"""fastadv: fast adversarial training for PyTorch.

Fused kernels (`fastadv.ops`), an attack engine (`fastadv.attacks`), training objectives
(`fastadv.losses`), thin trainers (`fastadv.trainers`) and evaluation (`fastadv.evaluate`).
"""

from __future__ import annotations

from fastadv import losses, ops
from fastadv.attacks import FGSM, PGD, pgd_fused
from fastadv.evaluation import evaluate
from fastadv.ops import backend

__version__ = "0.1.0"

__all__ = [
    "FGSM",
    "PGD",
    "__version__",
    "backend",
    "evaluate",
    "losses",
    "ops",
    "pgd_fused",
]
