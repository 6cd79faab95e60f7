"""An attack's settings as its attributes, and messages on arguments and attributes that it does not have.

``attack.eps = 4 / 255`` changes the settings, with all of their checks, from the next call on. A name that is no
setting is refused, in construction and in assignment. The error names the likely one.
"""

from __future__ import annotations

import inspect
from abc import ABCMeta
from collections.abc import Callable, Collection, Hashable, Iterable
from dataclasses import fields, replace
from functools import cache, wraps
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast, overload

import torch

from fastadv.ops.synonyms import SYNONYMS
from fastadv.ops.values import did_you_mean

if TYPE_CHECKING:
    from fastadv.attacks.attack import Attack

T = TypeVar("T")
Function = TypeVar("Function", bound=Callable[..., Any])


class Setting(Generic[T]):
    """A field of an attack's settings as an attribute of the attack."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name
        self.__doc__ = f"The attack's setting {name}."

    @overload
    def __get__(self, attack: None, owner: type) -> Setting[T]: ...
    @overload
    def __get__(self, attack: Attack, owner: type) -> T: ...
    def __get__(self, attack: Attack | None, owner: type) -> Setting[T] | T:
        return self if attack is None else cast(T, getattr(attack.settings, self._name))

    def __set__(self, attack: Attack, value: T) -> None:
        settings = attack.settings
        if self._name not in {field.name for field in fields(settings) if field.init}:
            raise AttributeError(
                f"{self._name} of {type(attack).__name__} cannot be set: it is fixed or follows from "
                "other settings"
            )
        changes: dict[str, Any] = {self._name: value}
        attack.settings = replace(settings, **changes)


class Checked(Generic[T]):
    """An attribute of an attack whose values go through a check.

    Args:
        check: takes the value that is set and returns the value to keep.
    """

    def __init__(self, check: Callable[[Any], T]) -> None:
        self._check = check

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, attack: None, owner: type) -> Checked[T]: ...
    @overload
    def __get__(self, attack: Configured, owner: type) -> T: ...
    def __get__(self, attack: Configured | None, owner: type) -> Checked[T] | T:
        if attack is None:
            return self
        try:
            return cast(T, vars(attack)[self._name])
        except KeyError:
            raise AttributeError(self._name) from None

    def __set__(self, attack: Configured, value: T) -> None:
        vars(attack)[self._name] = self._check(value)


class AttackType(ABCMeta):
    """The metaclass of the attacks: it checks the arguments' names before an attack is made."""

    def __call__(cls: type[T], *args: Any, **kwargs: Any) -> T:
        """Make an attack.

        Raises:
            TypeError: if the attack does not have an argument, or too many are given without names.
        """
        check_arguments(cls, len(args), kwargs)
        made: T = super().__call__(*args, **kwargs)  # type: ignore[misc]
        vars(made)["_made"] = True
        return made

    @property
    def __signature__(cls) -> inspect.Signature:
        """The signature of the constructor, which `__call__` would hide from ``help`` and editors."""
        return signature_of(cls)


class Configured(metaclass=AttackType):
    """Base of the attacks: refuses attributes that it does not know, and shows its settings."""

    def __setattr__(self, name: str, value: Any) -> None:
        if vars(self).get("_made", False) and not _is_known(self, name):
            raise AttributeError(_unknown(type(self), "setting", name, _settings_of(type(self))))
        super().__setattr__(name, value)

    if not TYPE_CHECKING:  # with it, type checkers would accept any attribute

        def __getattr__(self, name: str) -> Any:
            raise AttributeError(_unknown(type(self), "attribute", name, _settings_of(type(self))))

    def __repr__(self) -> str:
        """The attack as the call that makes it, with the class of the model in place of the model."""
        shown = [
            f"{name}={getattr(self, name)!r}"
            for name in _settings_of(type(self))
            if hasattr(self, name)
        ]
        model = vars(self).get("model")
        name = type(model).__name__ if hasattr(model, "state_dict") else repr(model)
        return f"{type(self).__name__}({', '.join((name, *shown))})"


@cache
def signature_of(kind: Hashable) -> inspect.Signature:
    """The signature of a class's constructor, without self."""
    signature = inspect.signature(kind.__init__)  # type: ignore[misc]
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def check_arguments(kind: type, positional: int, named: Iterable[str]) -> None:
    """Refuse arguments that an attack does not have.

    Raises:
        TypeError: naming the first unknown name, and the likely one.
    """
    parameters, ordered, takes_any = _parameters_of(kind)
    for name in named:
        if name not in parameters and not takes_any:
            raise TypeError(_unknown(kind, "argument", name, parameters))
    if positional > len(ordered) and not takes_any:
        raise TypeError(_too_many(kind.__name__, positional, ordered, parameters))


@cache
def _parameters_of(kind: Hashable) -> tuple[tuple[str, ...], tuple[str, ...], bool]:
    """A constructor's arguments, the arguments that need no name, and whether it takes any other arguments."""
    found = signature_of(kind).parameters.values()
    ordered = tuple(p.name for p in found if p.kind is p.POSITIONAL_OR_KEYWORD)
    takes_any = any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in found)
    return tuple(p.name for p in found), ordered, takes_any


def names_checked(function: Function) -> Function:
    """Make a function refuse an unknown keyword with an error that names the likely one."""
    parameters = inspect.signature(function).parameters
    what = "a call of an attack" if function.__name__ == "__call__" else function.__name__
    known = [name for name in parameters if name != "self"]
    ordered = [n for n in known if parameters[n].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    most = len(ordered) + len(parameters) - len(known)

    @wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        for name in kwargs:
            if name not in known:
                raise TypeError(f"{what} has no argument {name!r}{_similar_or_all(name, known)}")
        if len(args) > most:
            raise TypeError(_too_many(what, len(args) - most + len(ordered), ordered, known))
        if torch.compiler.is_compiling():  # the caller's step, whose graphs need nothing of ours
            return torch.compiler.disable(function)(*args, **kwargs)
        return function(*args, **kwargs)

    return cast(Function, checked)


@cache
def _settings_of(kind: Hashable) -> tuple[str, ...]:
    """The names of an attack's arguments, without the model."""
    return tuple(name for name in signature_of(kind).parameters if name != "model")


def _is_known(attack: Configured, name: str) -> bool:
    """Whether an attribute is private, already set, or declared by a class."""
    kinds = type(attack).__mro__
    return (
        name.startswith("_")
        or name in vars(attack)
        or any(name in vars(kind) or name in inspect.get_annotations(kind) for kind in kinds)
    )


def _unknown(kind: type, role: str, name: str, known: Iterable[str]) -> str:
    known = [*known]
    hint = did_you_mean(name, known, SYNONYMS)
    # Another attack that has an argument of this very name is a better hint than a similar name. A synonym is
    # better.
    if SYNONYMS.get(name, "") not in known:
        root = [parent for parent in kind.__mro__ if isinstance(parent, AttackType)][-1]
        wanted = {name, SYNONYMS.get(name)}
        others = [k.__name__ for k in _attacks(root) if wanted & {*_settings_of(k)}]
        if others:
            hint = f"; {', '.join(others)} {'has' if len(others) == 1 else 'have'} one"
    if not hint and role == "attribute":
        hint = _instead_of_method(name)
    # An attribute may be meant as a method of another library's attacks, so a list of the settings would not help.
    if not hint and role != "attribute":
        hint = _similar_or_all(name, known)
    return f"{kind.__name__} has no {role} {name!r}{hint}"


def _instead_of_method(name: str) -> str:
    """What to call in place of a method of another library's attacks, for the end of a message."""
    if name in ("perturb", "generate", "forward", "attack", "run", "run_standard_evaluation"):
        return "; an attack is called: attack(x, y)"
    if name.startswith(("set_mode_", "set_normalization")):
        return "; the attacks of fastadv.compat have it"
    if name in ("to", "cuda", "cpu", "eval", "train"):
        return "; an attack runs where its model is: model.to(device)"
    return ""


def _similar_or_all(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: a similar name, or else all names that there are."""
    return did_you_mean(name, known, SYNONYMS) or f"; there are {', '.join(known)}"


def _too_many(what: str, got: int, ordered: Collection[str], known: Iterable[str]) -> str:
    others = ", ".join(name for name in known if name not in ordered)
    rest = f"; the others are given by name: {others}" if others else ""
    return f"{what} takes {len(ordered)} without a name ({', '.join(ordered)}), got {got}{rest}"


def _attacks(kind: type) -> list[type]:
    """The attacks of this package that a caller can make."""
    found: list[type] = []
    children: list[type] = kind.__subclasses__()
    for child in children:
        found += [child, *_attacks(child)]
    return [k for k in found if k.__module__.startswith("fastadv.") and not inspect.isabstract(k)]
