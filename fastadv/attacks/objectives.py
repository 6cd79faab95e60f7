"""The objectives that an attack maximises: one value per sample from its logits, computed in float32."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastadv.attacks.soft_labels import is_soft, soft_cross_entropy, soft_divergence
from fastadv.ops.synonyms import WORDS
from fastadv.ops.values import did_you_mean

SOFT_OBJECTIVES = ("ce", "kl")
OBJECTIVES = ("ce", "cw", "dlr", "kl")
LossFunction = Callable[[Tensor, Tensor], Tensor]


class Objective:
    """A loss to be raised (or, targeted, lowered) by moving the images.

    Args:
        loss: one of `OBJECTIVES` or a callable ``(logits, y) -> [B] or scalar``.
        targeted: ``y`` holds the classes to be reached; the loss is lowered instead of raised.

    Raises:
        ValueError: if the name is unknown, or ``"kl"``, which has no target, is targeted.
        TypeError: if ``loss`` is neither a name nor callable.
    """

    def __init__(self, loss: str | LossFunction, targeted: bool = False) -> None:
        self.name = loss if isinstance(loss, str) else getattr(loss, "__name__", "callable")
        self.needs_clean_logits = loss == "kl"
        self._sign = -1.0 if targeted else 1.0
        if isinstance(loss, str):
            if loss not in OBJECTIVES:
                known = ", ".join(OBJECTIVES)
                hint = did_you_mean(loss, OBJECTIVES, WORDS)
                raise ValueError(f"loss must be one of {known} or a callable, got {loss!r}{hint}")
            if targeted and loss == "kl":
                raise ValueError("loss 'kl' has no target; targeted must be False with it")
        elif not callable(loss):
            raise TypeError(f"loss must be a name or a callable, got {type(loss).__name__}")
        else:
            _check_call(loss)
        self._loss = loss

    def __call__(self, logits: Tensor, y: Tensor, clean_logits: Tensor | None = None) -> Tensor:
        """The value to be raised.

        Args:
            logits: [B, C], any float dtype.
            y: labels, or targets, [B] int64; for ``"ce"``, ``"kl"`` and a callable also soft labels [B, C]. With
                soft labels ``"kl"`` is the divergence from them.
            clean_logits: [B, C] of the unattacked images, for ``"kl"``.

        Returns:
            Values [B] float32, or a scalar if a callable returns a scalar.

        Raises:
            TypeError: if the callable's result is no tensor.
            ValueError: if the callable's result is neither [B] nor a scalar, or has no gradient.
        """
        logits = _wide(logits)
        if not isinstance(self._loss, str):
            return self._sign * _checked_value(self._loss(logits, y), logits)
        if is_soft(y):
            return self._sign * _SOFT[self._loss](logits, y)
        if self._loss == "kl":
            assert clean_logits is not None
            return kl_objective(logits, clean_logits.to(logits.dtype))
        return self._sign * _NAMED[self._loss](logits, y)


def _check_call(loss: LossFunction) -> None:
    """Refuse a class, and a function that cannot be called with two arguments."""
    if isinstance(loss, type):
        raise TypeError(
            f"loss must be a callable of logits and labels, got the class {loss.__name__}; pass "
            f"{loss.__name__}()"
        )
    try:
        signature = inspect.signature(loss)
    except (TypeError, ValueError):  # a builtin may have no signature
        return
    try:
        signature.bind(None, None)
    except TypeError as error:
        name = getattr(loss, "__name__", type(loss).__name__)
        raise TypeError(
            f"loss must be a callable of two arguments, logits and labels, got {name}{signature}"
        ) from error


class LabelCrossEntropy:
    """The cross-entropy of one batch's labels, [B], to be raised, with its gradient by formula.

    Value and gradient have the bits of `Objective` and of its gradient by autograd.

    Args:
        y: labels, or targets, [B] int64.
        targeted: lower it instead.
    """

    def __init__(self, y: Tensor, targeted: bool) -> None:
        self._y, self._objective = y, Objective("ce", targeted)
        self._sign = -1.0 if targeted else 1.0
        self._at_logarithms = y.new_empty(0)

    def __call__(self, logits: Tensor) -> Tensor:
        """The value."""
        return self._objective(logits, self._y)

    def value_and_gradient(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The value, and the gradient of its sum at the logits [B, C] float32, both without a graph."""
        logarithms = F.log_softmax(logits, 1)
        value = F.nll_loss(logarithms, self._y, reduction="none")
        if self._at_logarithms.shape != logits.shape:  # it is the same at every step
            self._at_logarithms = _at_logarithms(logarithms, self._y, self._sign)
        gradient = torch.ops.aten._log_softmax_backward_data(
            self._at_logarithms, logarithms, 1, logits.dtype
        )
        return (value if self._sign > 0 else -value), gradient


def _at_logarithms(logarithms: Tensor, y: Tensor, sign: float) -> Tensor:
    """The gradient of the signed sum of the negative log-likelihoods at the logarithms [B, C]."""
    with torch.enable_grad():
        leaf = logarithms.detach().requires_grad_()
        value = sign * F.nll_loss(leaf, y, reduction="none")
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return gradient


def _checked_value(value: object, logits: Tensor) -> Tensor:
    batch = logits.shape[0]
    if not isinstance(value, Tensor):
        raise TypeError(f"loss must return a tensor, got {type(value).__name__}")
    if value.dim() != 0 and value.shape != (batch,):
        raise ValueError(
            f"loss must return a scalar or a tensor of shape ({batch},), got {tuple(value.shape)}"
        )
    if torch.is_grad_enabled() and logits.requires_grad and not value.requires_grad:
        raise ValueError("loss must return a value with a gradient in the logits, got one without")
    return value


def ce_objective(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of each sample, [B]."""
    return F.cross_entropy(logits, y, reduction="none")


def cw_objective(logits: Tensor, y: Tensor) -> Tensor:
    """Margin ``max_{j != y} z_j - z_y``: positive where misclassified (Carlini and Wagner 2017, f6)."""
    return _best_other(logits, y) - logits.gather(1, y[:, None])[:, 0]


def dlr_objective(logits: Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio (Croce and Hein 2020, equation 6); needs at least three classes.

    Raises:
        ValueError: fewer than three classes.
    """
    if logits.shape[1] < 3:
        raise ValueError(f"loss 'dlr' must have at least 3 classes, got {logits.shape[1]}")
    top = logits.topk(3, dim=1).values
    return cw_objective(logits, y) / (top[:, 0] - top[:, 2] + 1e-12)


def dlr_targeted_objective(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Targeted difference of logits ratio (Croce and Hein 2020, equation 7); needs at least four classes.

    ``-(z_y - z_t) / (z_1 - (z_3 + z_4) / 2)`` with z_1 >= z_2 >= ... the sorted logits: to be raised, it leads
    from class y to class t.

    Args:
        logits: [B, C].
        y: the labels [B] int64.
        target: the wrong classes aimed at, [B] int64.

    Returns:
        [B].

    Raises:
        ValueError: fewer than four classes.
    """
    if logits.shape[1] < 4:
        raise ValueError(f"loss 'dlr-t' must have at least 4 classes, got {logits.shape[1]}")
    top = logits.topk(4, dim=1).values
    return logit_difference(logits, y, target) / (top[:, 0] - 0.5 * (top[:, 2] + top[:, 3]) + 1e-12)


def targeted_value(loss: str, logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """The value that leads from the labels to one wrong class each, to be raised.

    Args:
        loss: ``"ce-t"``: minus the cross-entropy of the target; ``"dlr-t"``: `dlr_targeted_objective`.
        logits: [B, C], any float dtype.
        y: the labels [B] int64.
        target: the wrong classes aimed at, [B] int64.

    Returns:
        [B] float32, or float64 for float64 logits.
    """
    logits = _wide(logits)
    if loss == "ce-t":
        return -ce_objective(logits, target)
    return dlr_targeted_objective(logits, y, target)


def logit_difference(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """``z_t - z_y``, [B] float32, or float64 for float64 logits: positive where the target is likelier."""
    logits = _wide(logits)
    own, aim = (logits.gather(1, classes[:, None])[:, 0] for classes in (y, target))
    return aim - own


def likeliest_wrong_classes(logits: Tensor, y: Tensor, count: int) -> Tensor:
    """The wrong classes of highest logits, [B, min(count, C - 1)] int64, likeliest first."""
    others = _without_own(logits, y)
    return others.topk(min(count, logits.shape[1] - 1), dim=1).indices


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def kl_objective(logits: Tensor, clean_logits: Tensor) -> Tensor:
    """KL(softmax(clean) || softmax(adversarial)) of each sample, [B] (TRADES, equation 5)."""
    clean, log_adv = F.log_softmax(clean_logits, 1), F.log_softmax(logits, 1)
    return (clean.exp() * (clean - log_adv)).sum(1)


def _best_other(logits: Tensor, y: Tensor) -> Tensor:
    return _without_own(logits, y).amax(1)


def _without_own(logits: Tensor, y: Tensor) -> Tensor:
    """The logits [B, C], the label's own at minus infinity; unlike `F.one_hot` it reads no label on the host."""
    own = torch.arange(logits.shape[1], device=y.device) == y[:, None]
    return logits.masked_fill(own, -torch.inf)


_SOFT: dict[str, LossFunction] = {"ce": soft_cross_entropy, "kl": soft_divergence}
_NAMED: dict[str, LossFunction] = {
    "ce": ce_objective,
    "cw": cw_objective,
    "dlr": dlr_objective,
}
