"""The help of a command in plain words: the values that an option takes, and its default as one would type it."""

from __future__ import annotations

import math
import shutil
import textwrap
from argparse import SUPPRESS, Action, _HelpAction
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, Literal, get_args, get_origin

from jsonargparse import DefaultHelpFormatter

from fastadv.cli.flags import as_switch, is_flag, spellings
from fastadv.trainers.number import Number
from fastadv.trainers.schedules import Schedule

# jsonargparse's own options, in the words of the other options.
_HELP_OF_OPTIONS = {
    "--print_config": "Print all options and their values as YAML, which --config takes, and exit. With "
    "=skip_default only those that differ from the defaults.",
    "--schedule.help": "Explain the options of a schedule, or list all schedules, and exit.",
}
_NUMBERS = {int: ("a whole number", "whole numbers"), Number: ("a number", "numbers")}
_NUMBERS[float] = _NUMBERS[Number]


class HelpFormatter(DefaultHelpFormatter):
    """Formats the help. The paragraphs of a description are kept, and a flag has no value."""

    def start_section(self, heading: str | None) -> None:
        """Begin a group of options; a long heading, a docstring's first line, is wrapped."""
        super().start_section(heading and textwrap.fill(heading, self._width))

    def _format_usage(self, usage: str | None, actions: Any, *args: Any, **kwargs: Any) -> str:
        switches = [as_switch(action) for action in actions]
        return super()._format_usage(usage, switches, *args, **kwargs)

    def _format_action_invocation(self, action: Action) -> str:
        if is_flag(action):
            return ", ".join(spellings(action))
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        # jsonargparse's --NAME+, which adds to a list, is left out, as several values may follow --NAME.
        names = [name for name in action.option_strings if not name.endswith("+")]
        values = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(names)} {values}"

    def _format_args(self, action: Action, default_metavar: str) -> str:
        if action.option_strings[:1] == ["--schedule.help"]:
            return "[NAME]"
        hint = _hint_of(action)
        if (parts := _parts_of(hint)) and action.option_strings:
            return f"[{','.join('...' if part is Ellipsis else 'VALUE' for part in parts)}]"
        text = super()._format_args(action, default_metavar)
        return f"{text} [{text} ...]" if _takes_lists(hint) else text

    def _get_default_metavar_for_optional(self, action: Action) -> str:
        words = _words_of(_hint_of(action))
        return (
            f"{{{','.join(words)}}}" if words else super()._get_default_metavar_for_optional(action)
        )

    def _get_help_string(self, action: Action) -> str:
        text = next(
            (_HELP_OF_OPTIONS[name] for name in action.option_strings if name in _HELP_OF_OPTIONS),
            action.help or "",
        )
        if isinstance(action, _HelpAction):
            return "Show this help message and exit."
        if action.default is SUPPRESS:  # options that print something and exit
            return text
        facts = _facts_of(action)
        return f"{text} ({'; '.join(facts)})" if facts else text

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = (textwrap.fill(part, width) for part in text.split("\n\n"))
        return textwrap.indent("\n\n".join(paragraphs), indent)


def table_line(name: str, text: str, width: int) -> str:
    """Return a line of a list of names, wrapped for the terminal.

    Args:
        name: the name.
        text: its description.
        width: the width of the column of names.
    """
    return textwrap.fill(
        text,
        max(shutil.get_terminal_size().columns, width + 30),
        initial_indent=f"  {name:<{width}}  ",
        subsequent_indent=" " * (width + 4),
        break_on_hyphens=False,
    )


def as_typed(value: Any) -> str:
    """Return a value as the command line takes it.

    Args:
        value: a value of an option, or a schedule as its class and its arguments.

    Returns:
        The text, such as `8/255` for the float that equals it, `[75,90]` for a tuple, and `MultiStep` with the
        options of this schedule for a schedule.
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, tuple | list):
        return f"[{','.join(map(as_typed, value))}]"
    if "class_path" in (entries := _entries(value)):
        name = str(entries["class_path"]).rpartition(".")[2]
        options = _entries(entries.get("init_args") or {})
        return " ".join(
            [name, *(f"--schedule.{k} {as_typed(v)}" for k, v in options.items() if v is not None)]
        )
    return str(value)


def _number(value: float) -> str:
    """A number without a needless point; a fraction such as 8/255 if it is shorter than the digits, and equal."""
    if not math.isfinite(value):
        return str(value)
    if value.is_integer():
        return str(int(value))
    fraction = Fraction(value).limit_denominator(255)
    is_shorter = len(str(fraction)) < len(str(value))
    return str(fraction) if is_shorter and float(fraction) == value else str(value)


def _facts_of(action: Action) -> list[str]:
    """The end of an option's help: the kind of its values, where its name does not show it, and its default."""
    facts = ["required"] if action.required else []
    kind = "" if is_flag(action) else _kind_of(_hint_of(action), action.nargs)
    facts += [kind] if kind else []
    if not (action.option_strings or action.nargs in ("?", "*")):
        return facts
    if action.default is not None:
        several = action.nargs in ("+", "*", 2) and isinstance(action.default, Sequence)
        default = " ".join(map(as_typed, action.default)) if several else as_typed(action.default)
        facts += [f"default: {default}"] if default else []
    elif kind and not action.required and "default" not in (action.help or ""):
        facts += ["not set by default"]
    return facts


def _hint_of(action: Action) -> Any:
    return getattr(action, "_typehint", None) or action.type


def _kinds(hint: Any) -> list[Any]:
    """The types of a union without None; another type alone."""
    if hint is None or get_origin(hint) is Literal or isinstance(hint, type):
        return [hint]
    parts = get_args(hint)
    if get_origin(hint) in (tuple, list) or not parts:
        return [hint]
    return [kind for kind in parts if kind is not type(None)]


def _words_of(hint: Any) -> list[str]:
    """The words from which the user chooses; empty for other types."""
    kinds = _kinds(hint)
    is_choice = len(kinds) == 1 and get_origin(kinds[0]) is Literal
    return [str(word) for word in get_args(kinds[0]) if word is not None] if is_choice else []


def _takes_lists(hint: Any) -> bool:
    return any(get_origin(kind) is list for kind in _kinds(hint))


def _parts_of(hint: Any) -> tuple[Any, ...]:
    """The types of the values in a tuple, and ... if there can be more; empty for other types."""
    kinds = _kinds(hint)
    return get_args(kinds[0]) if len(kinds) == 1 and get_origin(kinds[0]) is tuple else ()


def _kind_of(hint: Any, count: int | str | None) -> str:
    """The kind of an option's values in words; empty for text, and for a choice that the option's name shows."""
    kinds = _kinds(hint)
    if any(isinstance(kind, type) and issubclass(kind, Schedule) for kind in kinds):
        return "the name of a schedule, and its options; --schedule.help lists them"
    if _takes_lists(hint):
        return f"one or more {_plural(kinds)}"
    if parts := _parts_of(hint):
        length = "" if Ellipsis in parts else f"{len(parts)} "
        return f"{length}{_plural([kind for part in parts for kind in _kinds(part)])} in brackets"
    if isinstance(count, int) and hint is not None:
        return f"{count} {_plural(kinds)}"
    numbers = [kind for kind in kinds if kind in _NUMBERS]
    return _NUMBERS[Number if Number in numbers else numbers[0]][0] if numbers else ""


def _plural(kinds: Sequence[Any]) -> str:
    """The name of several values that all have one of the types."""
    numbers = {kind for kind in kinds if kind in _NUMBERS}
    if not numbers:
        return "values"
    return _NUMBERS[int][1] if numbers == {int} else _NUMBERS[Number][1]


def _entries(value: Any) -> dict[str, Any]:
    """The entries of a mapping or of jsonargparse's namespace; empty for another value."""
    found = value if isinstance(value, Mapping) else getattr(value, "__dict__", {})
    return dict(found)
