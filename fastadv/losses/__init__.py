"""Training objectives on logits and features.

All are means over the batch unless ``reduction="none"``, which returns one value per sample. They are computed in
at least float32, whatever the dtype of their inputs, and from log-probabilities: finite logits give finite losses
and gradients (logits further apart than 1e30 count as 1e30 apart). There are no second derivatives.
"""

from __future__ import annotations

from fastadv.losses.features import FeatureDistance, arrest, feature_distance, vfd
from fastadv.losses.logits import boosted_cross_entropy, cross_entropy, cw, dlr, kd, kl
from fastadv.losses.methods import ActLosses, act, alp, hat, lbgat, mart, trades

__all__ = [
    "ActLosses",
    "FeatureDistance",
    "act",
    "alp",
    "arrest",
    "boosted_cross_entropy",
    "cross_entropy",
    "cw",
    "dlr",
    "feature_distance",
    "hat",
    "kd",
    "kl",
    "lbgat",
    "mart",
    "trades",
    "vfd",
]
