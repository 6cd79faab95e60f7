"""fastadv: fast adversarial training for PyTorch.

Fused kernels (`fastadv.ops`), an attack engine (`fastadv.attacks`) and thin trainers
(`fastadv.trainers`).
"""

from __future__ import annotations

from fastadv.attacks import FGSM, PGD, pgd_fused
from fastadv.ops import backend

__version__ = "0.1.0"

__all__ = ["FGSM", "PGD", "__version__", "backend", "pgd_fused"]
