"""Warnings about networks in train mode where the caller may expect eval mode, or the other way round."""

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


def check_modes(model: Model, argument: str = "model") -> str:
    """Warn where evaluation leaves a network in train mode, or ends a train mode that seems to be intended.

    This must be called before the model is put into evaluation mode.

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
                stacklevel=4,
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
        stacklevel=4,
    )
    return doubt
