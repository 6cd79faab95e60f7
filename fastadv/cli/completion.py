"""Tab completion by argcomplete. It reads the parsers of the commands, so that it is never out of date."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, _HelpAction
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NoReturn, get_args, get_origin

from fastadv.cli.flags import is_flag, spellings
from fastadv.data.datasets import dataset_names
from fastadv.evaluation.analyses import ANALYSES
from fastadv.evaluation.attack_list import usual_attacks
from fastadv.models.registry import model_names
from fastadv.reproduction import all_items

_START = "_ARGCOMPLETE"  # set by the shell: the position of the program among the words, from 1

# The values of options whose type does not list them. Some of these options take files, too.
_VALUES: dict[str, Callable[[], Iterable[str]]] = {
    "data": dataset_names,
    "name": dataset_names,
    "model": model_names,
    "teacher_model": model_names,
    "surrogate_model": model_names,
    "network": model_names,
    "attacks": usual_attacks,
    "attack": usual_attacks,
    "what": lambda: ANALYSES,
    "item": all_items,
}
_NUMBERS = (int, float, bool)


def is_completing() -> bool:
    """Return whether the shell asks for the words that may follow."""
    return _START in os.environ


def typed_words() -> list[str]:
    """Return the words before the one that is completed, without the program's name."""
    from argcomplete.lexers import split_line

    words = split_line(os.environ["COMP_LINE"], int(os.environ["COMP_POINT"]))[3]
    return list(words[int(os.environ[_START]) :])


def offer(prog: str, words: Iterable[str]) -> NoReturn:
    """Hand words to the shell, and end the process.

    Args:
        prog: the words of the command line so far.
        words: the words that may follow.
    """
    parser = ArgumentParser(prog=prog, add_help=False)
    parser.add_argument("word", choices=list(words))
    _hand_over(parser, [])


def offer_options(prog: str, actions: Iterable[Any]) -> NoReturn:
    """Hand the options of a command, or their values, to the shell, and end the process.

    Args:
        prog: the words that name the command.
        actions: the options of the command's parser. If several have one name, the first counts.
    """
    parser = ArgumentParser(prog=prog, add_help=False, allow_abbrev=False)
    dashed = "-" in _word_under_cursor()[2:]
    known: set[str] = set()
    hidden: list[str] = []
    for action in actions:
        names = spellings(action) if is_flag(action) else list(action.option_strings)
        names = [name for name in names if not name.endswith("+")]  # --NAME+ adds to a list
        if known & set(names):
            continue
        known |= set(names)
        others = [_dashed(name) for name in names if _dashed(name) != name]
        hidden += [name for name in names if _dashed(name) != name] if dashed else others
        _add(parser, action, [*names, *others])
    _hand_over(parser, hidden)


def _add(parser: ArgumentParser, action: Any, names: Sequence[str]) -> None:
    """Add an option of ours to a plain parser, with the same number of words as its value."""
    if is_flag(action) or isinstance(action, _HelpAction) or action.nargs == 0:
        parser.add_argument(*names, action="store_true")
        return
    added = parser.add_argument(*(names or [action.dest]), nargs=action.nargs)
    values = _values_of(action)
    if values is not None:
        added.completer = lambda **kwargs: values  # type: ignore[attr-defined]


def _values_of(action: Any) -> list[str] | None:
    """The possible values of an option; None for a file, or text of any kind."""
    if action.choices is not None:
        return [str(choice) for choice in action.choices]
    name = action.dest.removeprefix("eval_")
    if name in _VALUES:
        return list(_VALUES[name]())
    kinds = _kinds(getattr(action, "_typehint", None))
    literals = [
        str(word) for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)
    ]
    if literals:
        return literals
    is_number = any(isinstance(kind, type) and issubclass(kind, _NUMBERS) for kind in kinds)
    return [] if is_number else None


def _kinds(hint: Any) -> Sequence[Any]:
    """The types of a union; another type alone."""
    is_union = hint is not None and get_origin(hint) is not Literal and get_args(hint)
    return get_args(hint) if is_union else [hint]


def _dashed(name: str) -> str:
    return "--" + name.removeprefix("--").replace("_", "-") if name.startswith("--") else name


def _word_under_cursor() -> str:
    from argcomplete.lexers import split_line

    return str(split_line(os.environ["COMP_LINE"], int(os.environ["COMP_POINT"]))[1])


def _hand_over(parser: ArgumentParser, hidden: Sequence[str]) -> NoReturn:
    import argcomplete

    # The parser's name of the program includes the words that name the command.
    start = int(os.environ[_START]) + len(parser.prog.split()) - 1
    os.environ[_START] = str(start)
    argcomplete.autocomplete(
        parser, always_complete_options="long", exclude=hidden, exit_method=sys.exit
    )
    sys.exit(1)  # argcomplete ends the process itself, except where it has no answer
