"""Fused operations of adversarial training, each usable alone in plain PyTorch code."""

from __future__ import annotations

import fastadv
from fastadv.ops import native
from fastadv.ops import softmax_losses as _softmax_losses  # registers the losses of fastadv.losses
from fastadv.ops.angular_distance import angular_distance, replay_mask
from fastadv.ops.attention_map_distance import attention_map_distance
from fastadv.ops.backend import backend
from fastadv.ops.crop_flip import crop_flip
from fastadv.ops.euclidean_distance import euclidean_distance
from fastadv.ops.linear_merger import linear_merger
from fastadv.ops.momentum_update import momentum_update_
from fastadv.ops.noisy_replay import noisy_replay
from fastadv.ops.pgd_step import pgd_step, pgd_step_
from fastadv.ops.random_start import random_start
from fastadv.ops.registry import REGISTRY, claim_cuda_for_triton
from fastadv.ops.vanilla_feature_distillation import vanilla_feature_distillation

__all__ = [
    "REGISTRY",
    "angular_distance",
    "attention_map_distance",
    "backend",
    "crop_flip",
    "euclidean_distance",
    "linear_merger",
    "momentum_update_",
    "noisy_replay",
    "pgd_step",
    "pgd_step_",
    "random_start",
    "replay_mask",
    "vanilla_feature_distillation",
]


# The schemas exist by now.
NATIVE = native.load(fastadv.__path__)
if NATIVE.library is None:
    _softmax_losses.register_python_gradient()
claim_cuda_for_triton()
