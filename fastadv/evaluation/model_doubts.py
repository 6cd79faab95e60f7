"""Doubts about a model: networks in the other mode than the caller may expect, and a lost normalisation."""

from __future__ import annotations

import warnings

from torch import nn

from fastadv.attacks.attack_warnings import though_in_train_mode
from fastadv.engine.networks import (
    depends_on_mode,
    modules_of,
    networks_of,
    switched_to_train_mode,
)
from fastadv.evaluation.context import Model
from fastadv.models.lost_normalization import doubt_about_normalization


def doubts_about(model: Model, argument: str = "model") -> list[str]:
    """Warn of a wrong mode, and return the notes for every row of attacks; empty where no figure is in doubt.

    This must be called before the model is put into evaluation mode.

    Args:
        model: a module or another callable.
        argument: the model's name in the warning.
    """
    lost = doubt_about_normalization(model)
    named = f"the {argument}: {lost}" if lost and argument != "model" else lost
    return [doubt for doubt in (_check_modes(model, argument), named) if doubt]


def _check_modes(model: Model, argument: str = "model") -> str:
    """Warn where evaluation leaves a network in train mode, or ends a train mode that seems to be intended.

    Args:
        model: a module or another callable.
        argument: the model's name in the warning.

    Returns:
        The note for every row; empty where no figure is in doubt.
    """
    for name, part in switched_to_train_mode(model) if isinstance(model, nn.Module) else ():
        if any(depends_on_mode(type(layer)) for layer in modules_of(part)):
            warnings.warn(
                f"{argument} is judged in eval mode as a whole, {though_in_train_mode(name, part)}",
                stacklevel=5,
            )
            break
    hidden = [network for network in networks_of(model) if network is not model]
    training = [network for network in hidden if any(part.training for part in modules_of(network))]
    if not training:
        return ""
    doubt = (
        f"the {argument} runs a {type(training[0]).__name__} that is in train mode, where BatchNorm goes by the "
        "batch and dropout is on"
    )
    warnings.warn(
        f"{doubt}; evaluation does not reach a network in a closure or a plain list, so call its eval() before",
        stacklevel=5,
    )
    return doubt
