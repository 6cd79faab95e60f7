"""Objectives on logits. Each computes its value and its gradients in one pass over the logits."""

from __future__ import annotations

from torch import Tensor

from fastadv.losses.common import Reduction, check_pair
from fastadv.ops import checks
from fastadv.ops.softmax_losses import Names, softmax_losses


def cross_entropy(
    logits: Tensor, y: Tensor, *, label_smoothing: float = 0.0, reduction: Reduction = "mean"
) -> Tensor:
    """Cross-entropy, `-log p_y`.

    Args:
        logits: [B, C], float32, float64, bfloat16 or float16.
        y: labels [B], int64 or another integer dtype.
        label_smoothing: share of the target spread evenly over all classes, in 0..1.
        reduction: "mean" over the batch or "none".

    Returns:
        A scalar, or [B] with reduction "none"; float32, or float64 for float64 logits.

    Raises:
        TypeError: the logits are not floating point, or `y` is no tensor of integers.
        ValueError: shapes do not agree, or the reduction is unknown.
        IndexError: on the CPU, a label is no class. On a GPU its sample's loss is NaN.
    """
    checks.share("label_smoothing", label_smoothing)
    return softmax_losses(
        "cross_entropy",
        logits,
        y=y,
        weight=label_smoothing,
        reduction=reduction,
        names=Names(weight="label_smoothing"),
    )


def boosted_cross_entropy(logits: Tensor, y: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    """MART's boosted cross-entropy, `-log p_y - log(1 - max_{k != y} p_k)`.

    Source: Wang et al. 2020 (MART), section 3. The small constants of the authors' code, which keep its logarithms
    finite, are not needed in log space and are left out.

    Args:
        logits: [B, C], C >= 2.
        y: labels [B], int64 or another integer dtype.
        reduction: "mean" over the batch or "none".

    Returns:
        As `cross_entropy`.

    Raises:
        TypeError, ValueError, IndexError: as `cross_entropy`, or fewer than two classes.
    """
    return softmax_losses("boosted_cross_entropy", logits, y=y, reduction=reduction)


def cw(logits: Tensor, y: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    """The margin `max_{k != y} z_k - z_y`: positive where misclassified.

    Source: Carlini and Wagner 2017, section V-A, f6 without its lower bound. Of equal logits the first counts.

    Args:
        logits: z, [B, C], C >= 2.
        y: labels [B], int64 or another integer dtype.
        reduction: "mean" over the batch or "none".

    Returns:
        As `cross_entropy`.

    Raises:
        TypeError, ValueError, IndexError: as `cross_entropy`, or fewer than two classes.
    """
    return softmax_losses("cw", logits, y=y, reduction=reduction)


def dlr(logits: Tensor, y: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    """Difference of logits ratio, `(max_{k != y} z_k - z_y) / (z_(1) - z_(3))`, z_(i) the i-th largest logit.

    Source: Croce and Hein 2020, equation 6; 1e-12 is added to the denominator. A scaling of the logits does not
    change it.

    Args:
        logits: z, [B, C], C >= 3.
        y: labels [B], int64 or another integer dtype.
        reduction: "mean" over the batch or "none".

    Returns:
        As `cross_entropy`.

    Raises:
        TypeError, ValueError, IndexError: as `cross_entropy`, or fewer than three classes.
    """
    return softmax_losses("dlr", logits, y=y, reduction=reduction)


def kl(
    p_logits: Tensor,
    q_logits: Tensor,
    temperature: float = 1.0,
    *,
    reduction: Reduction = "mean",
) -> Tensor:
    """`T^2 KL(p || q)`, p and q the softmax of the logits over T, with gradients to both.

    Source: Hinton et al. 2015, section 2, for the factor T^2, which keeps gradients of the same size over
    temperatures. Detach the logits of a teacher.

    Args:
        p_logits: [B, C].
        q_logits: [B, C]; the dtype may differ.
        temperature: T, above 0.
        reduction: "mean" over the batch or "none".

    Returns:
        As `cross_entropy`.

    Raises:
        TypeError: logits are not floating point, or the temperature is no number.
        ValueError: shapes or devices differ, or the temperature is not above 0.
    """
    return softmax_losses(
        "kl",
        p_logits,
        q_logits,
        temperature=temperature,
        reduction=reduction,
        names=Names("p_logits", "q_logits"),
    )


def kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    *,
    reduction: Reduction = "mean",
) -> Tensor:
    """Distillation of logits, `T^2 KL(teacher || student)` at temperature T; no gradient to the teacher.

    Source: Hinton et al. 2015, section 2. The cross-entropy with softened targets, which some code uses, differs
    by the teacher's entropy and has the same gradient.

    Args:
        student_logits: [B, C].
        teacher_logits: [B, C].
        temperature: T, above 0.
        reduction: "mean" over the batch or "none".

    Returns:
        As `cross_entropy`.

    Raises:
        TypeError, ValueError: as `kl`.
    """
    check_pair("student_logits", student_logits, "teacher_logits", teacher_logits)
    return softmax_losses(
        "kl",
        teacher_logits.detach(),
        student_logits,
        temperature=temperature,
        reduction=reduction,
        names=Names("teacher_logits", "student_logits"),
    )
