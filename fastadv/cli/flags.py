"""Options that are true or false. They stand alone (`--quiet`, `--no_flip`) or have a value (`--flip false`)."""

from __future__ import annotations

import copy
from argparse import Action
from collections.abc import Callable, Iterable, Sequence

TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
_OFF = "--no_"


def is_flag(action: Action) -> bool:
    """Return whether an option is true or false."""
    return getattr(action, "_typehint", None) is bool and bool(action.option_strings)


def spellings(action: Action) -> list[str]:
    """Return a flag's names in the help: the option, and its opposite if the flag is true by default."""
    names = list(action.option_strings)
    return [*names, *map(opposite, names)] if action.default is True else names


def opposite(option: str) -> str:
    """Return the option that turns a flag off: `--no_flip` for `--flip`."""
    return _OFF + option.removeprefix("--")


def turned_off(option: str) -> str:
    """Return the flag that an option turns off: `--flip` for `--no_flip`; empty for any other option."""
    return f"--{option.removeprefix(_OFF)}" if option.startswith(_OFF) else ""


def as_switch(action: Action) -> Action:
    """Return an option as the usage shows it. A flag is shown in the form that changes its default."""
    if not is_flag(action):
        return action
    shown = copy.copy(action)
    shown.nargs, shown.option_strings = 0, spellings(action)[-1:]
    return shown


def with_values(
    words: Sequence[str],
    actions: Iterable[Action],
    refuse: Callable[[str], object],
) -> list[str]:
    """Write every flag of a command line with its value: `--quiet` is `--quiet=true`, `--no_flip` `--flip=false`.

    Args:
        words: the command line.
        actions: the parser's options.
        refuse: called with a message when a value is wrong.
    """
    known = list(actions)
    flags = {option for action in known if is_flag(action) for option in action.option_strings}
    takes_words = any(not action.option_strings for action in known)
    spelled: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if turned_off(name) in flags:
            if equals:
                refuse(f"option {name!r} takes no value, got {value!r}")
            word = f"{turned_off(name)}=false"
        elif name in flags:
            if not equals and rest and _is_value(rest[0], takes_words):
                value = rest.pop(0)
            elif not equals:
                value = "true"
            if value.lower() not in TRUE + FALSE:
                refuse(f'option "{name[2:]}" must be true or false, got {value!r}')
            word = f"{name}={'true' if value.lower() in TRUE else 'false'}"
        spelled.append(word)
    return spelled


def _is_value(word: str, takes_words: bool) -> bool:
    """Whether the word after a flag is its value: true or false, or any word that can be nothing else."""
    return word.lower() in TRUE + FALSE or not (word.startswith("-") or takes_words)
