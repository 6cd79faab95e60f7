"""Samples of every op, from which the op tests and the op benchmark are driven.

A new op adds a file with its `OpCase` records here, and a line to each of the two lists below.
"""

from __future__ import annotations

from op_cases import (
    angular_distance,
    attention_map_distance,
    crop_flip,
    euclidean_distance,
    linear_merger,
    momentum_update,
    noisy_replay,
    pgd_step,
    pgd_step_per_channel,
    random_start,
    softmax_losses,
    vanilla_feature_distillation,
)
from op_cases.case import OpCase

_FILES = (
    angular_distance,
    attention_map_distance,
    crop_flip,
    euclidean_distance,
    linear_merger,
    momentum_update,
    noisy_replay,
    pgd_step,
    pgd_step_per_channel,
    random_start,
    softmax_losses,
    vanilla_feature_distillation,
)

CASES: dict[str, OpCase] = {case.name: case for file in _FILES for case in file.CASES}
