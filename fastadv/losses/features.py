"""Objectives on features: ARREST's and VFD's losses, and the distances of features that they use."""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor

from fastadv.losses.common import Reduction, check_pair, reduced
from fastadv.ops import checks
from fastadv.ops.angular_distance import angular_distance
from fastadv.ops.attention_map_distance import attention_map_distance
from fastadv.ops.euclidean_distance import euclidean_distance
from fastadv.ops.softmax_losses import Names, softmax_losses
from fastadv.ops.vanilla_feature_distillation import vanilla_feature_distillation

FeatureDistance = Literal["angular", "mse", "attention"]
_FEATURE_DISTANCES = ("angular", "mse", "attention")


def feature_distance(
    features: Tensor, teacher_features: Tensor, kind: FeatureDistance = "angular"
) -> Tensor:
    """Distance of features from the features of a frozen model, for ARREST and the variants in its table 4.

    "angular" is `1 - |u.v| / (|u| |v|)` (ARREST, equation 3). "mse" is the mean over all features of `(u - v)^2`.
    "attention" is the distance of normalised attention maps (Zagoruyko and Komodakis 2017), for u [B, C, ...].

    Args:
        features: u, the trained model's features [B, ...].
        teacher_features: v, the frozen model's features [B, ...]; no gradient flows to them.
        kind: which distance.

    Returns:
        Distances [B], float32 (float64 if an argument is float64).

    Raises:
        TypeError: if a tensor is not floating point.
        ValueError: if shapes or devices do not agree, or the kind is unknown.
    """
    checks.check_choice("kind", kind, _FEATURE_DISTANCES)
    check_pair("features", features, "teacher_features", teacher_features)
    teacher_features = teacher_features.detach()
    if kind == "angular":
        return angular_distance(features, teacher_features)
    if kind == "attention":
        return attention_map_distance(features, teacher_features)
    squares = euclidean_distance(features, teacher_features, squared=True)
    return squares / math.prod(features.shape[1:])


def arrest(
    adv_logits: Tensor,
    y: Tensor,
    adv_features: Tensor,
    teacher_features: Tensor,
    lam: float,
    *,
    reduction: Reduction = "mean",
) -> Tensor:
    """ARREST's objective: cross-entropy plus representation-guided knowledge distillation.

    `CE(f(x'), y) + lam * (1 - |h(x').h_std(x)| / (|h(x')| |h_std(x)|))`.

    Source: ARREST, equations 3 and 4.

    Args:
        adv_logits: f(x'), logits of the attacked (or replayed) images [B, K].
        y: labels [B], int64.
        adv_features: h(x'), the same images' features [B, ...].
        teacher_features: h_std(x), the frozen standard model's features of the clean images
            [B, ...]; no gradient flows to them.
        lam: weight of the distillation; 50 in the paper.
        reduction: "mean" over the batch or "none".

    Returns:
        A scalar, or [B] with reduction "none".

    Raises:
        TypeError: if a tensor is not floating point, `y` holds no integers, or lam is no number.
        ValueError: if shapes do not agree, lam is negative or not finite, or the reduction is unknown.
    """
    lam = checks.limit("lam", lam)
    check_pair("adv_features", adv_features, "teacher_features", teacher_features)
    names = Names("adv_logits")
    hard = softmax_losses("cross_entropy", adv_logits, y=y, reduction="none", names=names)
    return reduced(hard + lam * feature_distance(adv_features, teacher_features), reduction)


def vfd(
    adv_features: Tensor,
    clean_features: Tensor,
    vanilla_features: Tensor,
    *,
    reduction: Reduction = "mean",
) -> Tensor:
    """Vanilla feature distillation: attacked and clean images are to have the features of a vanilla model.

    `|h(x') - h_vanilla(x)|_2 + |h(x) - h_vanilla(x)|_2`, norms per sample over all features.

    Source: VFD-Adv, equation 5. The paper adds it to the loss of its base method with a weight lambda of 0 to .04;
    h is the output of the last block.

    Args:
        adv_features: h(x'), the trained model's features of the attacked images [B, ...].
        clean_features: h(x), the trained model's features of the clean images [B, ...].
        vanilla_features: h_vanilla(x), the frozen vanilla model's features of the clean images [B, ...]; no
            gradient flows to them.
        reduction: "mean" over the batch or "none".

    Returns:
        A scalar, or [B] with reduction "none".

    Raises:
        TypeError: if a tensor is not floating point.
        ValueError: if shapes or devices do not agree or the reduction is unknown.
    """
    check_pair("adv_features", adv_features, "vanilla_features", vanilla_features)
    check_pair("clean_features", clean_features, "vanilla_features", vanilla_features)
    return vanilla_feature_distillation(
        adv_features, clean_features, vanilla_features, reduction=reduction
    )
