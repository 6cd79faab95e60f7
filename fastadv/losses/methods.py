"""The training losses of published methods, as functions of logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastadv.losses.common import Reduction, at_least_float32, check_pair, reduced
from fastadv.ops import checks
from fastadv.ops.softmax_formulas import LOWEST
from fastadv.ops.softmax_losses import Names, softmax_losses
from fastadv.ops.traced import changes


def trades(
    clean_logits: Tensor,
    adv_logits: Tensor,
    y: Tensor,
    beta: float = 6.0,
    *,
    reduction: Reduction = "mean",
) -> Tensor:
    """`CE(f(x), y) + beta KL(f(x) || f(x'))`, with gradients through both sides of the divergence.

    Source: Zhang et al. 2019 (TRADES), equation 5.

    Args:
        clean_logits: f(x), [B, C].
        adv_logits: f(x'), [B, C].
        y: labels [B], int64 or another integer dtype.
        beta: weight of the divergence, 1 / lambda in the paper.
        reduction: "mean" over the batch or "none".

    Returns:
        As `cross_entropy`.

    Raises:
        TypeError, ValueError, IndexError: as `cross_entropy`; beta is negative or not finite.
    """
    names = Names("clean_logits", "adv_logits", "beta")
    return softmax_losses(
        "trades", clean_logits, adv_logits, y, weight=beta, reduction=reduction, names=names
    )


def mart(
    clean_logits: Tensor,
    adv_logits: Tensor,
    y: Tensor,
    beta: float = 5.0,
    *,
    code_constants: bool = False,
    reduction: Reduction = "mean",
) -> Tensor:
    """`BCE(f(x'), y) + beta KL(f(x) || f(x')) (1 - p_y(x))`, with gradients through every factor.

    Source: Wang et al. 2020 (MART), section 3; BCE is `boosted_cross_entropy`. The authors' code (YisenWang/MART)
    adds small constants, which bound the gradient of images that are misclassified with confidence: with p and q
    the probabilities of x and x', and j the likeliest wrong class of q, it computes
    `CE(f(x'), y) - log(1.0001 - q_j + 1e-12) + beta (1.0000001 - p_y) sum_k p_k (log p_k - log(q_k + 1e-12))`.

    Args:
        clean_logits: f(x), [B, C], C >= 2.
        adv_logits: f(x'), [B, C].
        y: labels [B], int64 or another integer dtype.
        beta: weight of the divergence; 5 or 6 in the authors' code.
        code_constants: add the constants of the authors' code.
        reduction: "mean" over the batch or "none".

    Returns:
        As `cross_entropy`.

    Raises:
        TypeError, ValueError, IndexError: as `cross_entropy`; beta is negative or not finite.
    """
    checks.check_bool("code_constants", code_constants)
    if code_constants:
        return _mart_of_the_code(clean_logits, adv_logits, y, beta, reduction)
    names = Names("clean_logits", "adv_logits", "beta")
    return softmax_losses(
        "mart", clean_logits, adv_logits, y, weight=beta, reduction=reduction, names=names
    )


def _mart_of_the_code(
    clean_logits: Tensor, adv_logits: Tensor, y: Tensor, beta: float, reduction: Reduction
) -> Tensor:
    beta = checks.limit("beta", beta)
    hard = softmax_losses(
        "cross_entropy", adv_logits, y=y, reduction="none", names=Names("adv_logits")
    )
    checks.check_float("clean_logits", clean_logits)
    checks.check_same_shape("clean_logits", clean_logits, "adv_logits", adv_logits)
    if clean_logits.shape[1] < 2:
        shape = tuple(clean_logits.shape)
        raise ValueError(f"clean_logits must have shape [B, C] with C >= 2, got {shape}")
    log_p, log_q = _log_probabilities(clean_logits), _log_probabilities(adv_logits)
    p, q = log_p.exp(), log_q.exp()
    labelled = y[:, None] == torch.arange(p.shape[1], device=y.device)
    likeliest = q.masked_fill(labelled, -1).argmax(1, keepdim=True)
    # 1 - q_j and 1 - p_y as sums of the other probabilities, which have no cancellation.
    others = q.scatter(1, likeliest, 0).sum(1)
    doubt = p.masked_fill(labelled, 0).sum(1)
    divergence = (p * (log_p - (q + 1e-12).log())).sum(1)
    boost = -(others + 1e-4 + 1e-12).log()
    return reduced(hard + boost + beta * (doubt + 1e-7) * divergence, reduction)


def _batch_of(name: str, logits: Tensor) -> int:
    checks.check_float(name, logits)
    if logits.dim() != 2:
        raise ValueError(f"{name} must have shape (B, C), got {tuple(logits.shape)}")
    return logits.shape[0]


def _log_probabilities(logits: Tensor) -> Tensor:
    """Logarithms of the softmax in the dtype of computation, all finite."""
    log_p = at_least_float32(logits).log_softmax(1)
    return log_p.clamp(min=LOWEST[log_p.dtype])


def alp(
    clean_logits: Tensor,
    adv_logits: Tensor,
    y: Tensor,
    weight: float = 0.5,
    *,
    reduction: Reduction = "mean",
) -> Tensor:
    """Adversarial logit pairing, `(CE(f(x), y) + CE(f(x'), y)) / 2 + weight mean_k (f_k(x) - f_k(x'))^2`.

    Source: Kannan et al. 2018, section 3. The cross-entropies are averaged over the 2B images, the squares over
    all B * C logits.

    Args:
        clean_logits: f(x), [B, C].
        adv_logits: f(x'), [B, C].
        y: labels [B], int64 or another integer dtype.
        weight: weight of the pairing.
        reduction: "mean" over the batch or "none".

    Returns:
        As `cross_entropy`.

    Raises:
        TypeError, ValueError, IndexError: as `cross_entropy`; the weight is negative or not finite.
    """
    names = Names("clean_logits", "adv_logits", "weight")
    return softmax_losses(
        "alp", clean_logits, adv_logits, y, weight=weight, reduction=reduction, names=names
    )


class ActLosses(NamedTuple):
    """The losses of ACT's two models, scalars or [B].

    Attributes:
        robust: L_G, of the model trained on adversarial images.
        natural: L_F, of the model trained on clean images.
    """

    robust: Tensor
    natural: Tensor


def act(
    robust_logits: Tensor,
    natural_logits: Tensor,
    y: Tensor,
    alpha: float = 0.9,
    temperature: float = 1.0,
    *,
    reduction: Reduction = "mean",
) -> ActLosses:
    """ACT's pair of losses, each with the other model as its fixed teacher.

    `L_G = (1 - alpha) CE(G(x'), y) + alpha T^2 KL(F(x) || G(x'))` and
    `L_F = (1 - alpha) CE(F(x), y) + alpha T^2 KL(G(x') || F(x))`, the divergences at temperature T. Each has a
    gradient in its own model's logits alone, so that their sum may be differentiated in one backward pass.

    Source: Arani et al. 2020 (ACT), algorithm 1; T is 1 in the paper, 4 in the authors' code.

    Args:
        robust_logits: G(x'), [B, C].
        natural_logits: F(x), [B, C].
        y: labels [B], int64 or another integer dtype.
        alpha: weight of the divergence, in 0..1.
        temperature: T, above 0.
        reduction: "mean" over the batch or "none".

    Returns:
        L_G and L_F.

    Raises:
        TypeError, ValueError, IndexError: as `cross_entropy`; alpha or the temperature out of range.
    """
    checks.share("alpha", alpha)
    both = softmax_losses(
        "act",
        robust_logits,
        natural_logits,
        y,
        weight=alpha,
        temperature=temperature,
        reduction=reduction,
        names=Names("robust_logits", "natural_logits", "alpha"),
    )
    return ActLosses(*both.unbind(-1))


def hat(
    clean_logits: Tensor,
    adv_logits: Tensor,
    helper_logits: Tensor,
    y: Tensor,
    helper_y: Tensor,
    beta: float = 2.5,
    gamma: float = 0.5,
    *,
    reduction: Reduction = "mean",
) -> Tensor:
    """`trades(f(x), f(x'), y, beta) + gamma CE(f(x_h), y_h)`.

    Source: Rade and Moosavi-Dezfooli 2022 (HAT).

    Args:
        clean_logits: f(x), [B, C].
        adv_logits: f(x'), [B, C].
        helper_logits: f(x_h) of the helper examples `x_h = x + 2 (x' - x)`, [B, C].
        y: labels [B], int64 or another integer dtype.
        helper_y: y_h, the standard model's predictions for x', [B], int64.
        beta: weight of the divergence.
        gamma: weight of the helper examples.
        reduction: "mean" over the batch or "none".

    Returns:
        As `cross_entropy`.

    Raises:
        TypeError, ValueError, IndexError: as `cross_entropy`; a weight is negative or not finite.
    """
    gamma = checks.limit("gamma", gamma)
    base = trades(clean_logits, adv_logits, y, beta, reduction=reduction)
    helper_y = checks.class_labels("helper_y", helper_y, _batch_of("helper_logits", helper_logits))
    names = Names("helper_logits")
    helper = softmax_losses(
        "cross_entropy", helper_logits, y=helper_y, reduction=reduction, names=names
    )
    return base + gamma * helper


def lbgat(
    adv_logits: Tensor,
    natural_logits: Tensor,
    y: Tensor,
    clean_logits: Tensor | None = None,
    beta: float = 0.0,
    *,
    reduction: Reduction = "mean",
) -> Tensor:
    """`mean_k (f_k(x') - T_k(x))^2 + CE(T(x), y) + beta KL(f(x) || f(x'))`, gradients to both models.

    Source: Cui et al. 2021 (LBGAT). With a fixed T, whose logits are detached, it is BGAT up to a constant.

    Args:
        adv_logits: f(x'), [B, C].
        natural_logits: T(x), [B, C].
        y: labels [B], int64 or another integer dtype.
        clean_logits: f(x), [B, C]; needed where beta is not 0.
        beta: weight of the divergence.
        reduction: "mean" over the batch or "none".

    Returns:
        As `cross_entropy`.

    Raises:
        TypeError, ValueError, IndexError: as `cross_entropy`; beta is negative or not finite, or it is not 0 and
            there are no clean logits.
    """
    beta = checks.limit("beta", beta)
    check_pair("adv_logits", adv_logits, "natural_logits", natural_logits)
    natural = softmax_losses(
        "cross_entropy", natural_logits, y=y, reduction=reduction, names=Names("natural_logits")
    )
    apart = at_least_float32(adv_logits) - at_least_float32(natural_logits)
    loss = natural + reduced(apart.square().mean(1), reduction)
    # torch.compile makes one graph for all values of a number that changes, if no branch depends on it.
    if not changes(beta) and beta == 0:
        return loss
    if clean_logits is None:
        raise ValueError("clean_logits must be given where beta is not 0, got None")
    names = Names("clean_logits", "adv_logits")
    return loss + beta * softmax_losses(
        "kl", clean_logits, adv_logits, reduction=reduction, names=names
    )
