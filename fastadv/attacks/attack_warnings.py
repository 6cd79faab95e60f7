"""Warnings of attacks that find too little, because of their settings or of what happened in a call."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from torch import Tensor, nn

from fastadv.attacks.report import AttackReport
from fastadv.attacks.soft_labels import are_probabilities
from fastadv.engine.networks import depends_on_mode, switched_to_train_mode

if TYPE_CHECKING:
    from fastadv.attacks.attack import AttackSettings


# Each of Adam's steps moves a coordinate by about lr, and a pixel by at most half of this, in units of the range.
_REACH_OF_ADAM = 0.2


def warn_of_settings(settings: AttackSettings) -> None:
    """Warn if the radius is meant for other images, or if all steps together are too short."""
    warn_of_default_radius(settings.eps, settings.norm, settings.bounds, stacklevel=6)
    step, steps = getattr(settings, "step_size", None), getattr(settings, "steps", None)
    if step is not None and steps is not None:
        doubt = short_reach_warning(step, steps, settings.eps)
        if doubt:
            warnings.warn(doubt, stacklevel=5)
    rate = getattr(settings, "lr", None)
    doubt = "" if rate is None or steps is None else short_adam_warning(rate, steps)
    if doubt:
        warnings.warn(doubt, stacklevel=5)


def warn_of_default_radius(
    eps: float, norm: str, bounds: tuple[float, float], stacklevel: int
) -> None:
    """Warn if a radius is the default for linf and images in 0..1, but the norm or the bounds are others."""
    low, high = bounds
    if eps == 8 / 255 and (norm, low, high) != ("linf", 0, 1):
        warnings.warn(
            f"eps is 8/255, the default for linf within bounds (0, 1), in an attack in {norm} within "
            f"bounds ({low:g}, {high:g}); give the radius in this norm, in the units of the images",
            stacklevel=stacklevel,
        )


def short_adam_warning(rate: float, steps: int) -> str:
    """The warning if all steps of Adam together move a pixel by little; "" if they do not."""
    if rate * steps >= _REACH_OF_ADAM:
        return ""
    return (
        f"lr * steps is {rate * steps:.3g}: a pixel can move by about {rate * steps / 2:.2g} of the range "
        "between the bounds, and the attack finds too little; Adam needs more steps than a line search, such "
        "as in ART's CarliniL2Method; the default is 1000 steps of .01"
    )


def short_reach_warning(alpha: float, steps: int, eps: float) -> str:
    """The warning if all steps together are shorter than a tenth of the radius; "" if they are not."""
    if alpha * steps >= 0.1 * eps:
        return ""
    return (
        f"alpha * steps is {alpha * steps:.3g}, less than a tenth of eps, {eps:.3g}: the attack "
        "cannot get far from where it begins; alpha is in the units of the images, as eps is"
    )


def warn_of_modes(model: object) -> bool:
    """Warn if a layer, such as dropout, alone was put into train mode, which an attack in eval mode ends.

    A part with layers of its own may be the network that is trained. Then an attack may well end its train mode.

    Returns:
        Whether there was a warning.
    """
    for name, part in switched_to_train_mode(model) if isinstance(model, nn.Module) else ():
        if next(part.children(), None) is None and depends_on_mode(type(part)):
            warnings.warn(
                f"the attack runs the whole model in eval mode, {though_in_train_mode(name, part)}",
                stacklevel=5,
            )
            return True
    return False


def though_in_train_mode(name: str, part: nn.Module) -> str:
    """The end of a warning that a model runs in eval mode, though one of its parts is in train mode."""
    return (
        f"though its {name!r}, a {type(part).__name__}, is in train mode; where that is part of a defence, let "
        "its forward ask for it, such as by F.dropout(x, p, training=True)"
    )


# Losses with a gradient also where an image is misclassified already.
_FOLLOWED_PAST_SUCCESS = ("ce", "kl", "cw")


def warn_of_gradients(report: AttackReport, settings: AttackSettings) -> None:
    """Warn if gradients were zero, NaN or infinite, or logits NaN: then images seem robust that are not."""
    if report.nan_points and not report.nan_gradients:
        warnings.warn(nan_logits_warning(report.nan_points), stacklevel=5)
    expects_gradient = (
        getattr(settings, "loss", None) in _FOLLOWED_PAST_SUCCESS and not settings.targeted
    )
    if report.nan_gradients:
        state = f"NaN or infinite in {report.nan_gradients} of {report.elements} elements"
    elif expects_gradient and report.elements and report.zero_gradient_share == 1:
        state = "zero everywhere"
    else:
        return
    warnings.warn(
        f"the model's gradient in x is {state}. There the attack has no direction, so it may break too few "
        "images; fastadv.Square needs no gradient",
        stacklevel=5,
    )


def nan_warnings(points: int, gradients: int) -> list[str]:
    """The warnings of an attack that met NaN at some points, and useless elements of gradients; empty without."""
    return [
        *([nan_logits_warning(points)] if points else []),
        *([useless_gradients_warning(gradients)] if gradients else []),
    ]


def useless_gradients_warning(elements: int) -> str:
    """The warning that a number of elements of an attack's gradients were NaN or infinite."""
    return (
        f"{elements} elements or more of the gradients that the attack followed were NaN or infinite; they give "
        "no direction, so that it may find too little; the attack square needs no gradient"
    )


def nan_logits_warning(points: int) -> str:
    """The warning that a model returned NaN at a number of points of an attack."""
    return (
        f"the model returned NaN at {points} points that the attack tried; the attack passed over them, and an "
        "image that only such points break seems robust"
    )


def warn_of_probabilities(results: Tensor | None, settings: AttackSettings) -> None:
    """Warn if a loss of logits got probabilities: for a certain class its gradient is nearly 0."""
    of_logits = isinstance(getattr(settings, "loss", "cw"), str)
    if of_logits and results is not None and are_probabilities(results):
        warnings.warn(
            "the model returns probabilities. The losses expect logits and have other, smaller gradients in "
            "probabilities, so the attack finds too little; leave out the softmax, or return its logarithm",
            stacklevel=5,
        )
