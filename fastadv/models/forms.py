"""Forms of a network: networks with equal names and shapes in their state dicts but different functions.

A state dict does not say of which form it is. Here are the forms of a network, and the check that the caller has
said which form is meant.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from torch import nn

from fastadv.fields import arguments_checked
from fastadv.models.registry import create_model
from fastadv.models.split import without_normalization


@arguments_checked
def forms_of(model: nn.Module) -> Mapping[str, str]:
    """Return the registered networks that a state dict of a model fits, where there are several.

    Args:
        model: the model, possibly inside `Normalized`.

    Returns:
        A description of each form, by its name for `create_model`, the usual form first; empty if the model has
        one form only.
    """
    return getattr(without_normalization(model), "forms", {})


@arguments_checked
def form_of(model: nn.Module) -> str | None:
    """Return the name of a model's form, a key of `forms_of`; None if there are no forms.

    Args:
        model: the model, possibly inside `Normalized`.
    """
    return getattr(without_normalization(model), "form", None) if forms_of(model) else None


@arguments_checked
def usual_form(model: nn.Module) -> bool:
    """Return whether a model is the form that its architecture's plain name means.

    Args:
        model: the model, possibly inside `Normalized`.
    """
    return form_of(model) == next(iter(forms_of(model)), None)


def check_form_named(model: nn.Module, form: str | None, built_by_caller: bool = False) -> None:
    """Check that the caller has said of which form a state dict is.

    The caller has said so by `form`, or by building a model of another form than the usual one.

    Args:
        model: the model that the state dict fits.
        form: the form that the caller names.
        built_by_caller: the caller chose the model for this state dict. Then a warning is enough where nearly all
            published files are of the usual form (`usual_form_prevails` of the network).

    Raises:
        ValueError: if there are several forms and the caller names no form, or another one than the model's.
    """
    forms, own = forms_of(model), form_of(model)
    if form is not None and form != own:
        kinds = f"be {own!r}, what the model is" if forms else "be None for a model of one form"
        raise ValueError(f"form must {kinds}, got {form!r}; create_model(form) builds another one")
    if form is not None or not forms or not usual_form(model):
        return
    if built_by_caller and getattr(without_normalization(model), "usual_form_prevails", False):
        warnings.warn(
            f"the state dict fits several networks, which compute different functions, and is taken as one of "
            f"{own}, the usual one: {described(forms)}. Pass form={own!r} where that is right, else build the "
            "other one with create_model(name)",
            stacklevel=3,
        )
    else:
        raise ValueError(
            "form must be named, because the state dict fits several networks, which compute different functions: "
            f"{described(forms)}. Build the right one with create_model(name) and pass form=name "
            "(on the command line --teacher_model name)"
        )


def described(forms: Mapping[str, str]) -> str:
    """Return the names and the descriptions of forms, for a message."""
    return "; ".join(f"{name} ({what})" for name, what in forms.items())


@arguments_checked
def in_form(model: nn.Module, form: str) -> nn.Module:
    """Return a network of a model's size in another of its forms, with fresh weights.

    Args:
        model: the model, possibly inside `Normalized`.
        form: the name of the other form, a key of `forms_of`.

    Returns:
        The network, with random weights.

    Raises:
        ValueError: if the model has one form only, or not this one.
    """
    network = without_normalization(model)
    if not forms_of(network):
        raise ValueError(f"model must be a network of several forms, got {type(network).__name__}")
    if form not in forms_of(network):
        raise ValueError(f"form must be one of {', '.join(forms_of(network))}, got {form!r}")
    return create_model(form, network.num_classes, network.conv1.in_channels)  # type: ignore[arg-type, union-attr]


@arguments_checked
def copy_weights(target: nn.Module, source: nn.Module) -> None:
    """Load a model's state dict into another model.

    Args:
        target: the model that gets the weights and buffers.
        source: the model that has them.

    Raises:
        ValueError: if the two models are of different forms.
        RuntimeError: if the state dict does not fit.
    """
    forms = form_of(target), form_of(source)
    if None not in forms and forms[0] != forms[1]:
        raise ValueError(
            f"model must be {forms[1]!r}, the form of its starting weights, got {forms[0]!r}, which computes "
            "another function of them"
        )
    target.load_state_dict(source.state_dict())
