"""The parser that all commands use: its flags, its error messages, and the reading of words before parsing."""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

import yaml
from jsonargparse import ArgumentParser
from jsonargparse.typing import register_type

from fastadv.cli.completion import is_completing, offer_options
from fastadv.cli.flags import is_flag, spellings, turned_off, with_values
from fastadv.cli.help_format import HelpFormatter
from fastadv.cli.yaml_values import MODE, is_base_60, load_yaml
from fastadv.ops.synonyms import SYNONYMS
from fastadv.ops.values import did_you_mean, nearest, norm_name_if_known
from fastadv.trainers import schedules
from fastadv.trainers.number import Number, parse_number
from fastadv.trainers.schedules import Schedule

FAILED = 2  # exit status after an error that the user can put right
_PROGRAM = "fastadv"
_KINDS = {
    "int": "a whole number",
    "bool": "true or false",
    "float": "a number",
    "str": "text",
    "tuple": "a list such as [75,90]",
}
# On the command line every word is text. In a config YAML reads 007, on and no otherwise.
_QUOTES = "; a config has text in quotes where it looks like a number, or like true or false"

register_type(
    Number,
    serializer=float,
    deserializer=parse_number,
    type_check=lambda value, _: isinstance(value, float),
)


class Parser(ArgumentParser):
    """A parser that takes a flag with and without a value, and whose error messages are one line.

    Args:
        args: as for `ArgumentParser`.
        needs: the description of each argument that cannot be left out, by its name without dashes. One message
            names all missing arguments.
        kwargs: as for `ArgumentParser`.
    """

    def __init__(self, *args: Any, needs: dict[str, str] | None = None, **kwargs: Any) -> None:
        self._help = f"{kwargs['prog']} --help" if "prog" in kwargs else "--schedule.help"
        # jsonargparse makes a parser without a name for the fields of a schedule's class.
        if "prog" not in kwargs:
            schedule = str(kwargs.get("description") or "").rpartition(".")[2]
            kwargs["description"] = f"The options of --schedule {schedule}."
            kwargs.setdefault("usage", "fastadv train METHOD --schedule NAME ...")
        kwargs.setdefault("prog", _PROGRAM)
        kwargs.setdefault("formatter_class", HelpFormatter)
        kwargs.setdefault("allow_abbrev", False)
        kwargs["parser_mode"] = MODE
        super().__init__(*args, **kwargs)
        self.color = False  # Python 3.14 would colour the help
        self._needs = needs or {}
        self._explained: dict[str, str] = {}
        self._words: Sequence[str] = ()

    def add_flag(self, name: str, text: str, group: Any = None) -> None:
        """Add an option that is false by default, and true where it stands without a value."""
        (group or self).add_argument(f"--{name}", type=bool, default=False, help=text)

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, *others: Any, **options: Any
    ) -> Any:
        """Parse a command line, as `ArgumentParser` does."""
        if is_completing():
            offer_options(self.prog, self._actions)
        words = None if args is None else with_values(args, self._actions, self.error)
        self._words = words or ()
        for config in _configs_in(self._words):
            repeated = _repeated_name(config)
            if repeated is not None:
                self.error(f'option "config" must have each name once, got {repeated!r} twice')
        self._refuse_base_60(self._words)
        found = super().parse_args(words, *others, **options)
        for name, value in vars(found).items():  # also those of a config
            if isinstance(value, str):
                found[name] = home_expanded(value)
        return found

    def _refuse_base_60(self, words: Sequence[str]) -> None:
        """Refuse 1:30 as a whole number, which jsonargparse reads as 90 whatever the loader of configs says.

        The fields of a schedule are not among this parser's arguments. They are all numbers.
        """
        whole = [a.dest for a in self._actions if _holds_int(getattr(a, "_typehint", None))]
        if "--schedule" in self:
            typed = (word.partition("=")[0].removeprefix("--") for word in words)
            whole += ["schedule", *(name for name in typed if name.startswith("schedule."))]
        for name, value in given_options(words, whole).items():
            found = next(filter(is_base_60, _texts_of(value)), None)
            if found is not None:
                kind = "be a whole number" if found == value else "have whole numbers"
                self.error(f'option "{name}" must {kind}, got {found!r}')

    def dump(self, *args: Any, **options: Any) -> str:
        """Write options as YAML, as `ArgumentParser` does.

        jsonargparse warns of each tuple, which YAML holds as a list. The options' types make it a tuple again.
        """
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"\s*Dump of a value that does not round-trip")
            return str(super().dump(*args, **options))

    def check_given(self, options: Any) -> None:
        """Require the arguments in `needs`, also options that the parser itself does not require."""
        missing = [name for name in self._needs if options[name] is None]
        if missing:
            self.error(self._missing(missing))

    def explain(self, option: str, text: str) -> None:
        """Add an explanation for an option that does not exist, but which people type."""
        self._explained[option] = text

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message on one line and exit with status 2."""
        text = self._in_words(" ".join(message.split()))
        self.exit(FAILED, f"{self.prog}: error: {text} (see {self._help})\n")

    def _in_words(self, text: str) -> str:
        """Return jsonargparse's message in the words of a command line."""
        text = text.replace('Parser key "', 'option "')
        if found := re.match("unrecognized arguments: (.*)", text):
            return f"unrecognized arguments: {found[1]}{self._hint(found[1].split())}"
        if found := re.match("(?:the following )?arguments are required: (.*)", text):
            return self._missing(found[1].split(", "))
        if found := re.match("Unexpected config: ?(.*)", text):
            return f'option "config" must be a file of options, NAME: VALUE in each line, got {found[1]!r}'
        if found := re.match("Option '(.*)' is not accepted", text):
            names = (option[2:].rpartition(".")[2] for option in self.options())
            known = sorted({*names} - {"help"})
            return f"there is no option {found[1]!r}{did_you_mean(found[1], known) or _list(known)}"
        if found := re.match('(option ".*?"|argument --[a-z_.]+|--[a-z_.]+): (.*)', text):
            return found[1] + _expectation(found[2])
        return text

    def _missing(self, names: Sequence[str]) -> str:
        """Return the missing arguments, with a description of each."""
        given = given_options(self._words, tuple(self._needs))
        wanted = [n for n in self._needs if n not in given and (n in names or f"--{n}" in self)]
        missing = [*wanted, *(name for name in names if name not in wanted)]
        spelled = [self._spelled(name) for name in missing]
        first = ", ".join(spelled[:-1])
        text = f"needs {first} and {spelled[-1]}" if first else f"needs {spelled[-1]}"
        explained = [f"{self._spelled(name)} is {self._needs[name]}" for name in wanted]
        return "; ".join([text, *explained])

    def __contains__(self, option: object) -> bool:
        """Whether there is an option with this name."""
        return any(option in action.option_strings for action in self._actions)

    def options(self) -> Iterable[str]:
        """Return all options, also those that turn a flag off."""
        for action in self._actions:
            names = spellings(action) if is_flag(action) else action.option_strings
            yield from (name for name in names if name.startswith("--"))

    def _spelled(self, name: str) -> str:
        """The name of an argument on the command line: an option has dashes, another argument capitals."""
        return f"--{name}" if f"--{name}" in self else name.upper()

    def _hint(self, words: Sequence[str]) -> str:
        """The end of a message about unknown words: an explanation or a similar name for the first option."""
        options = [word.partition("=")[0] for word in words if word.startswith("--")]
        if options and options[0] in self._explained:
            return f"; {self._explained[options[0]]}"
        return closest_option(options[0], self.options()) if options else ""


def closest_option(option: str, known: Iterable[str]) -> str:
    """Return the end of a message about an unknown option: a similar option. The leading dashes are not compared.

    Args:
        option: the unknown option, with its dashes.
        known: the existing options, with their dashes.
    """
    names = [name.removeprefix("--") for name in known]
    meant = nearest(option.removeprefix("--"), names, SYNONYMS)
    return f"; did you mean '--{meant}'?" if meant else ""


def _list(known: Sequence[str]) -> str:
    return f"; there are {', '.join(known)}" if 0 < len(known) < 10 else ""


def _expectation(text: str) -> str:
    """Return the allowed values that jsonargparse's message names; the message itself if it is not understood."""
    if "import path" in text.lower() and (
        found := re.search(r"(?:string: |Import path )(\S+)", text)
    ):
        names = list(schedule_classes())
        return (
            f" must be one of {', '.join(names)}, got {found[1]!r}{did_you_mean(found[1], names)}"
        )
    if found := re.match(r"Does not validate against any of the Union.*?Errors: - (.*)", text):
        errors, _, value = found[1].partition(" Given value type:")
        value = value.partition("Given value: ")[2]
        kinds = [_kind(error) for error in re.split(" - (?=Expected|Not of)", errors)]
        kinds += ["null"] if value.lower() == "none" and "<class 'NoneType'>" in errors else []
        kinds = [
            kind for kind in dict.fromkeys(kinds) if kind
        ]  # a list's error is its values' error
        hint = did_you_mean(
            value, re.findall("'(.*?)'", "".join(re.findall(r"Literal\[.*?\]", errors)))
        )
        hint = hint or (_QUOTES if _KINDS["str"] in kinds else "")
        return f" must be {' or '.join(kinds)}, got {value!r}{hint}" if kinds else f": {text}"
    if found := re.match(r"Expected a (.*)\. Got value: (.*)", text):
        kind = _kind(text)
        words = re.findall("'(.*?)'", found[1]) if "Literal" in found[1] else []
        hint = _QUOTES if kind == _KINDS["str"] else did_you_mean(found[2], words)
        return f" must be {kind}, got {found[2]!r}{hint}" if kind else f": {text}"
    return f": {text.removeprefix('Not of type Number: ')}"


def _kind(error: str) -> str:
    """The values that a type expects, by its message; empty for None, which nobody can type."""
    if found := re.match(r"Expected a typing\.Literal\[(.*?)\]", error):
        return "one of " + found[1].replace("'", "")
    if found := re.match("Expected a <class '(.*?)'>", error):
        return _KINDS.get(found[1], "")
    return "a number or a fraction such as 8/255" if error.startswith("Not of type Number") else ""


def with_lists(words: Sequence[str], option: str) -> list[str]:
    """Take several numbers after an option as a list: `--eps 2/255 4/255` is `--eps=[2/255, 4/255]`.

    Args:
        words: a command line.
        option: the option. Words after it that are not numbers stay where they are.
    """
    spelled: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word != option:
            spelled.append(word)
            continue
        values: list[str] = []
        while rest and _is_number(rest[0]):
            values.append(rest.pop(0))
        if len(values) > 1:
            spelled.append(f"{option}=[{', '.join(values)}]")
        else:
            spelled += [option, *values]
    return spelled


def _is_number(word: str) -> bool:
    try:
        parse_number(word)
    except ValueError:
        return False
    return True


def with_norms(words: Sequence[str]) -> list[str]:
    """Take a norm as Python's functions do, also as other libraries write it: `--norm Linf` is `--norm linf`."""
    found = []
    for before, word in zip(["", *words], words, strict=False):
        if word.startswith("--norm="):
            word = f"--norm={norm_name_if_known(word.removeprefix('--norm='))}"
        elif before == "--norm":
            word = str(norm_name_if_known(word))
        found.append(word)
    return found


def home_expanded(value: str) -> str:
    """Return a path that begins with ~ as the shell would write it, and any other text as it is."""
    return os.path.expanduser(value) if value.startswith("~") else value


def schedule_classes() -> dict[str, type[Schedule]]:
    """Return the package's schedules of the learning rate by their names, in alphabetical order."""
    return {
        name: kind
        for name, kind in sorted(vars(schedules).items())
        if isinstance(kind, type) and issubclass(kind, Schedule) and kind is not Schedule
    }


def given_options(words: Sequence[str], names: Sequence[str]) -> dict[str, Any]:
    """Return the values of some options on a command line, before a parser has read it.

    Args:
        words: the command line. The configs that it names are read, too. The last value of an option counts.
        names: names of the options, without dashes.

    Returns:
        The value of each given option: its text, "true" if it has no value, and for configs the value in YAML.
    """
    found: dict[str, Any] = {}
    for word, following in zip(words, [*words[1:], ""], strict=False):
        option, equals, value = word.partition("=")
        if not equals:
            value = "true" if following.startswith("--") or not following else following
        if option == "--config":
            content = _content_of(value)
            found |= {name: content[name] for name in names if content.get(name) is not None}
        elif option.startswith("--") and option[2:] in names:
            found[option[2:]] = value
        elif turned_off(option)[2:] in names:
            found[turned_off(option)[2:]] = "false"
    return found


def _holds_int(hint: object) -> bool:
    """Whether a type is int, or has it among its arguments at any depth, as ``tuple[int, ...] | None``."""
    return hint is int or any(map(_holds_int, get_args(hint)))


def _texts_of(value: object) -> Iterable[str]:
    """The texts in the value of an option, which may be YAML, or lists and mappings of a config."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for entry in value:
            yield from _texts_of(entry)
    elif isinstance(value, str):
        try:
            content = load_yaml(value)
        except yaml.YAMLError:  # the parser reports it
            return
        yield from [value] if isinstance(content, str) else _texts_of(content)


def _content_of(config: str) -> dict[str, Any]:
    """The entries of a config, a file or YAML; empty if it cannot be read, which the parser reports later."""
    try:
        content = load_yaml(_text_of(config))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def _text_of(config: str) -> str:
    is_file = not config.lstrip().startswith("{") and Path(config).is_file()
    return Path(config).read_text(encoding="utf-8") if is_file else config


def _configs_in(words: Sequence[str]) -> list[str]:
    """The values of --config on a command line."""
    apart = [word for word, before in zip(words[1:], words, strict=False) if before == "--config"]
    return apart + [word[len("--config=") :] for word in words if word.startswith("--config=")]


def _repeated_name(config: str) -> str | None:
    """A name that a mapping of a config has twice, of which YAML takes the last; None if there is no such name."""
    try:
        nodes = [yaml.compose(_text_of(config), yaml.SafeLoader)]
    except (OSError, ValueError, yaml.YAMLError):  # the parser reports it
        return None
    while nodes:
        node = nodes.pop()
        if isinstance(node, yaml.MappingNode):
            names = [str(key.value) for key, _ in node.value]
            if len(set(names)) < len(names):
                return max(names, key=names.count)
            nodes += [value for _, value in node.value]
    return None


def complain(text: str) -> int:
    """Print an error message, and return the exit status."""
    print(f"{_PROGRAM}: error: {text}", file=sys.stderr)
    return FAILED
