"""The formulas of the losses on logits, value and gradients in plain torch, and the table of their kinds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

# Shifted logits are kept above this, so that differences of finite logits stay finite: [dtype of computation].
LOWEST = {torch.float32: -1e30, torch.float64: -1e300}
TINY = 1e-12  # keeps DLR's quotient finite where the three largest logits are equal
Result = tuple[Tensor, Tensor | None, Tensor | None]  # losses [B] or [B, 2], gradients [B, C]


class _Rows:
    """Softmax of logits [B, C], by way of its logarithm.

    Attributes:
        log_p: logarithm of the probabilities.
        p: probabilities.
    """

    def __init__(self, logits: Tensor, temperature: float = 1.0) -> None:
        shifted = (logits - logits.amax(1, keepdim=True)) / temperature
        shifted = torch.where(shifted < LOWEST[logits.dtype], LOWEST[logits.dtype], shifted)
        self.log_p = shifted - shifted.exp().sum(1, keepdim=True).log()
        self.p = self.log_p.exp()

    def cross_entropy(self, y: Tensor) -> Tensor:
        """-log p_y, [B]."""
        return -_at(self.log_p, y)

    def cross_entropy_gradient(self, y: Tensor) -> Tensor:
        """The gradient of `cross_entropy`, p - onehot(y), [B, C]."""
        return self.p - _one_hot(y, self.p)


def _at(values: Tensor, y: Tensor) -> Tensor:
    return values.gather(1, y[:, None])[:, 0]


def _one_hot(y: Tensor, like: Tensor) -> Tensor:
    return F.one_hot(y, like.shape[1]).to(like.dtype)


def _divergence(p: _Rows, q: _Rows) -> Tensor:
    """KL(p || q) of each row, [B]."""
    return (p.p * (p.log_p - q.log_p)).sum(1)


def _divergence_gradient(p: _Rows, q: _Rows, divergence: Tensor) -> Tensor:
    """The gradient of KL(p || q) in p's logits; in q's it is q - p."""
    return p.p * (p.log_p - q.log_p - divergence[:, None])


def _best_other(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The largest logit of a wrong class and that class, [B] each."""
    values, classes = logits.masked_fill(_one_hot(y, logits).bool(), -torch.inf).max(1)
    return values, classes


def _cross_entropy(
    logits: Tensor, other: Tensor, y: Tensor, weight: float, temperature: float
) -> Result:
    """``-log p_y``, its target smoothed by ``weight``."""
    rows, classes = _Rows(logits), logits.shape[1]
    losses = rows.cross_entropy(y)
    gradient = rows.cross_entropy_gradient(y)
    if weight:
        losses = (1 - weight) * losses - weight / classes * rows.log_p.sum(1)
        gradient = rows.p - (1 - weight) * _one_hot(y, rows.p) - weight / classes
    return losses, gradient, None


def _boosted(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """MART's boosted cross-entropy, -log q_y - log(1 - q_j), j the likeliest wrong class, and its gradient."""
    rows = _Rows(logits)
    _, best = _best_other(logits, y)
    is_best = _one_hot(best, logits)
    rest = _Rows(logits.masked_fill(is_best.bool(), -torch.inf))  # the softmax without class j
    # For every class k but j, log(1 - q_j) = log q_k - log rest_k. The likeliest such class is taken.
    at = rest.log_p.argmax(1)
    log_rest = _at(rows.log_p, at) - _at(rest.log_p, at)
    losses = rows.cross_entropy(y) - log_rest
    q_best = _at(rows.p, best)[:, None]
    return losses, rows.cross_entropy_gradient(y) + q_best * (is_best - rest.p * (1 - is_best))


def _boosted_cross_entropy(
    logits: Tensor, other: Tensor, y: Tensor, weight: float, temperature: float
) -> Result:
    """``-log p_y - log(1 - max_{k != y} p_k)``."""
    return *_boosted(logits, y), None


def _cw(logits: Tensor, other: Tensor, y: Tensor, weight: float, temperature: float) -> Result:
    """``max_{k != y} z_k - z_y``."""
    value, best = _best_other(logits, y)
    losses = value - _at(logits, y)
    gradient = _one_hot(best, logits) - _one_hot(y, logits)
    return losses, gradient.masked_fill(losses.isnan()[:, None], torch.nan), None


def _dlr(logits: Tensor, other: Tensor, y: Tensor, weight: float, temperature: float) -> Result:
    """The margin of ``"cw"`` over the largest less the third largest logit."""
    value, best = _best_other(logits, y)
    margin, toward = value - _at(logits, y), _one_hot(best, logits) - _one_hot(y, logits)
    order = torch.argsort(logits, dim=1, descending=True, stable=True)
    largest, third = order[:, 0], order[:, 2]
    span = _at(logits, largest) - _at(logits, third) + TINY
    losses = margin / span
    steps = _one_hot(largest, logits) - _one_hot(third, logits)
    return losses, (toward - losses[:, None] * steps) / span[:, None], None


def _kl(logits: Tensor, other: Tensor, y: Tensor, weight: float, temperature: float) -> Result:
    """``T^2 KL(p || q)``, both at the temperature T."""
    p, q = _Rows(logits, temperature), _Rows(other, temperature)
    divergence = _divergence(p, q)
    gradient = temperature * _divergence_gradient(p, q, divergence)
    return temperature**2 * divergence, gradient, temperature * (q.p - p.p)


def _trades(logits: Tensor, other: Tensor, y: Tensor, weight: float, temperature: float) -> Result:
    """``-log p_y + weight KL(p || q)``."""
    p, q = _Rows(logits), _Rows(other)
    divergence = _divergence(p, q)
    gradient = p.cross_entropy_gradient(y) + weight * _divergence_gradient(p, q, divergence)
    return p.cross_entropy(y) + weight * divergence, gradient, weight * (q.p - p.p)


def _mart(logits: Tensor, other: Tensor, y: Tensor, weight: float, temperature: float) -> Result:
    """Boosted cross-entropy of q ``+ weight KL(p || q) (1 - p_y)``."""
    p, q = _Rows(logits), _Rows(other)
    boosted, other_gradient = _boosted(other, y)
    divergence = _divergence(p, q)
    own = _one_hot(y, p.p)
    doubt = (p.p * (1 - own)).sum(1, keepdim=True)  # 1 - p_y, without its cancellation
    slope = p.p * (1 - own) - doubt * own  # of the doubt in the logits, over p_y
    gradient = doubt * _divergence_gradient(p, q, divergence)
    gradient = gradient + (divergence * _at(p.p, y))[:, None] * slope
    losses = boosted + weight * divergence * doubt[:, 0]
    return losses, weight * gradient, other_gradient + weight * doubt * (q.p - p.p)


def _alp(logits: Tensor, other: Tensor, y: Tensor, weight: float, temperature: float) -> Result:
    """``(-log p_y - log q_y) / 2 + weight mean_k (z_k - z'_k)^2``."""
    p, q = _Rows(logits), _Rows(other)
    apart = logits - other
    pairing = apart.square().mean(1)
    losses = (p.cross_entropy(y) + q.cross_entropy(y)) / 2 + weight * pairing
    pull = (2 * weight / logits.shape[1]) * apart
    gradient, other_gradient = p.cross_entropy_gradient(y) / 2, q.cross_entropy_gradient(y) / 2
    return losses, gradient + pull, other_gradient - pull


def _act(logits: Tensor, other: Tensor, y: Tensor, weight: float, temperature: float) -> Result:
    """``(1 - weight) (-log p_y) + weight T^2 KL(q || p)``, and the same with p and q exchanged."""
    pairs = []
    soft = _Rows(logits, temperature), _Rows(other, temperature)
    for student, (own, teacher) in zip((logits, other), (soft, soft[::-1]), strict=True):
        rows = _Rows(student)
        divergence = temperature**2 * _divergence(teacher, own)
        losses = (1 - weight) * rows.cross_entropy(y) + weight * divergence
        gradient = (1 - weight) * rows.cross_entropy_gradient(y)
        pairs.append((losses, gradient + weight * temperature * (own.p - teacher.p)))
    (losses, gradient), (other_losses, other_gradient) = pairs
    return torch.stack((losses, other_losses), 1), gradient, other_gradient


@dataclass(frozen=True)
class Kind:
    """One kind of loss, and the arguments that it takes.

    Attributes:
        formula: losses and gradients in plain torch, from both kinds of logits, labels, weight and temperature.
        takes_other: whether the loss takes a second kind of logits.
        takes_labels: whether the loss takes labels.
        fewest_classes: the number of classes that the loss needs at least.
        losses: the number of losses of a sample. Where it is 2, each has a gradient in its own kind of logits
            alone.
    """

    formula: Callable[[Tensor, Tensor, Tensor, float, float], Result]
    takes_other: bool = False
    takes_labels: bool = True
    fewest_classes: int = 1
    losses: int = 1

    @property
    def per_sample(self) -> tuple[int, ...]:
        """The shape of a sample's losses."""
        return () if self.losses == 1 else (self.losses,)


# All kinds. csrc/cpu/softmax_losses.cpp and kernels/softmax_losses.py have the same. Tests and benchmarks run over
# this table.
KINDS = {
    "cross_entropy": Kind(_cross_entropy),
    "boosted_cross_entropy": Kind(_boosted_cross_entropy, fewest_classes=2),
    "cw": Kind(_cw, fewest_classes=2),
    "dlr": Kind(_dlr, fewest_classes=3),
    "kl": Kind(_kl, takes_other=True, takes_labels=False),
    "trades": Kind(_trades, takes_other=True),
    "mart": Kind(_mart, takes_other=True, fewest_classes=2),
    "alp": Kind(_alp, takes_other=True),
    "act": Kind(_act, takes_other=True, losses=2),
}
