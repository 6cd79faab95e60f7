"""Warnings about networks in train mode where the caller may expect eval mode, or the other way round."""

from __future__ import annotations

import warnings

from torch import nn

from fastadv.engine.networks import modules_of, networks_of
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
    if isinstance(model, nn.Module) and not model.training:
        inside = next((name for name, part in model.named_modules() if part.training), None)
        if inside is not None:
            warnings.warn(
                f"{argument} is judged in eval mode as a whole, though its {inside!r} is in train mode; where "
                "that is part of a defence, let its forward ask for it, such as by F.dropout(x, p, training=True)",
                stacklevel=4,
            )
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
