"""The command `fastadv`: train, eval, report, info and demo."""

from __future__ import annotations

import inspect
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace
from jsonargparse.typing import register_type

import fastadv
from fastadv.commands import DEFAULT_ATTACKS, Flags, run_evaluation, run_report, run_training
from fastadv.files import write_atomically
from fastadv.trainers import Settings, find_method, method_names
from fastadv.trainers.distributed import is_first
from fastadv.trainers.methods import MethodClass
from fastadv.trainers.number import Number, parse_number

register_type(
    Number,
    serializer=float,
    deserializer=parse_number,
    type_check=lambda value, _: isinstance(value, float),
)

# What a person can put right. Anything else is a fault of ours and ends in a traceback.
_USER_ERRORS = (ValueError, TypeError, OSError, ImportError, RuntimeError, ArithmeticError)
_FAILED, _INTERRUPTED = 2, 130
_TRAINING_OPTIONS = (
    "data",
    "run",
    "root",
    "model",
    "extra",
    "teacher",
    "teacher_model",
    "device",
    "from_checkpoint",
)


class HelpFormatter(DefaultHelpFormatter):
    """Keeps the paragraphs of a description."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = (textwrap.fill(part, width) for part in text.split("\n\n"))
        return textwrap.indent("\n\n".join(paragraphs), indent)


class Parser(ArgumentParser):
    """A parser whose complaints are one line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", HelpFormatter)
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message on one line and exit with status 2."""
        text = " ".join(message.replace('Parser key "', 'option "').split())
        self.exit(_FAILED, f"{self.prog}: error: {text} (see {self.prog} --help)\n")


@dataclass(frozen=True)
class Command:
    """A command of the program.

    Attributes:
        summary: one line for the list of commands.
        run: takes the rest of the command line; returns the exit status.
    """

    summary: str
    run: Callable[[list[str]], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
        arguments: the command line without the program's name; by default the process's own.

    Returns:
        The exit status: 0; 2 for something the user can put right; 130 after an interruption.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [_option(word) for word in words if word != "--debug"]
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if words[0] == "--version":
        print(f"fastadv {fastadv.__version__}")
        return 0
    if words[0] not in _COMMANDS:
        return _complain(f"unknown command {words[0]!r}; there are {', '.join(_COMMANDS)}")
    try:
        return _COMMANDS[words[0]].run(words[1:])
    except KeyboardInterrupt:
        print("fastadv: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except _USER_ERRORS as error:
        if debug:
            raise
        hint = " (--debug shows where)" if isinstance(error, TypeError | RuntimeError) else ""
        return _complain((" ".join(str(error).split()) or type(error).__name__) + hint)


def _complain(text: str) -> int:
    print(f"fastadv: error: {text}", file=sys.stderr)
    return _FAILED


def _option(word: str) -> str:
    """Take --max-examples for --max_examples, and --run-dir for --run, which torchrun would take for its own."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    name = name[2:].replace("-", "_")
    return "--" + ("run" if name == "run_dir" else name) + equals + value


def _overview() -> str:
    width = max(map(len, _COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in _COMMANDS.items()]
    return "\n".join(
        [
            "usage: fastadv COMMAND ...",
            "",
            "Fast adversarial training of image classifiers.",
            "",
            "commands:",
            *lines,
            "",
            "`fastadv COMMAND --help` explains a command, `fastadv --version` prints the version.",
            "Any command takes --debug, which shows the traceback of an error.",
            "Numbers may be fractions, --eps 8/255; options may have dashes or underscores.",
        ]
    )


def _train(words: list[str]) -> int:
    if not words or words[0].startswith("-"):
        if words and words[0] not in ("-h", "--help"):
            return _complain(f"train needs a method before {words[0]}: {', '.join(method_names())}")
        print(_methods_overview())
        return 0 if words else _FAILED
    method = find_method(words[0])
    deciding = ("preset", *method.recipe_class.deciding)
    parser = training_parser(method, _settings_in(words[1:], deciding))
    options = parser.parse_args(words[1:])
    config = _config_text(parser, options)
    chosen = parser.instantiate(options)
    result = run_training(
        method.name,
        method.recipe_class(**_fields_of(method.recipe_class, chosen)),
        Settings(**_fields_of(Settings, chosen)),
        Flags(**_fields_of(Flags, chosen)),
        on_start=lambda path: _write_config(path, config),
        **{name: getattr(chosen, name) for name in _TRAINING_OPTIONS},
    )
    if is_first():
        print(f"trained: {result.checkpoint}")
        print(f"next: fastadv eval {result.run_dir}")
    return 0


def training_parser(
    method: MethodClass, settings: Mapping[str, Any] = MappingProxyType({})
) -> ArgumentParser:
    """Build the parser of `fastadv train METHOD`.

    Args:
        method: the method.
        settings: what the user says of the preset and of the recipe's deciding fields, from which the defaults of
            the other options follow.
    """
    given = {name: value for name, value in settings.items() if name != "preset"}
    preset = str(settings.get("preset", "paper"))
    recipe_class = method.recipe_class
    recipe_class.preset(preset)  # complains of an unknown one
    start = recipe_class.start(preset, given)
    parser = Parser(prog=f"fastadv train {method.name}", description=inspect.getdoc(method))
    parser.add_argument("--config", action="config", help="YAML file with any of the options.")
    skipped: set[str | int] = {"method", "recipe", "settings", "flags", "on_start"}
    skipped |= {"teacher", "teacher_model"}
    parser.add_function_arguments(run_training, skip=skipped)
    parser.add_argument(
        "--teacher",
        nargs="+",
        help="Trained models for methods that need them, in their order: runs, checkpoints, or state "
        "dicts in .safetensors or .pt files.",
    )
    parser.add_argument(
        "--teacher_model",
        nargs="+",
        help="Networks of these models, names as for --model, in their order or one for all. Needed for a state "
        "dict that several networks take, such as resnet18 and resnet18_layer2_stride1.",
    )
    flags = parser.add_argument_group("Switches")
    for name, text in _attribute_docs(Flags).items():
        flags.add_argument(f"--{name}", action="store_true", help=text)
    parser.add_argument(
        "--preset",
        default=preset,
        help=f"Numbers that options and configs then change: {' or '.join(recipe_class.presets)}.",
    )
    parser.add_class_arguments(recipe_class)
    parser.set_defaults(start)
    parser.add_class_arguments(Settings)
    return parser


def _settings_in(words: Sequence[str], names: Sequence[str]) -> dict[str, Any]:
    """What options and configs say of some options: the last word counts, as with any option."""
    found: dict[str, Any] = {}
    for word, following in zip(words, [*words[1:], ""], strict=True):
        option, equals, value = word.partition("=")
        value = value if equals else following
        if option == "--config":
            content = _content_of(value)
            found |= {name: content[name] for name in names if name in content}
        elif option.removeprefix("--") in names:
            found[option.removeprefix("--")] = _yaml_of(value)
    return found


def _content_of(config: str) -> dict[str, Any]:
    """The entries of a config, a file or YAML; one that cannot be read is for the parser to complain about."""
    try:
        path = Path(config)
        content = _yaml_of(path.read_text(encoding="utf-8") if path.is_file() else config)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _yaml_of(text: str) -> Any:
    """What YAML makes of a text; the text itself where it is none."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _methods_overview() -> str:
    width = max(map(len, method_names()))
    lines = [
        f"  {name:<{width}}  {(inspect.getdoc(find_method(name)) or '').splitlines()[0]}"
        for name in method_names()
    ]
    head = ["usage: fastadv train METHOD --data DATA --run RUN ...", "", "methods:"]
    return "\n".join([*head, *lines, "", "`fastadv train METHOD --help` lists the options."])


def _fields_of(kind: type[Any], options: Namespace) -> dict[str, Any]:
    """The options that are fields of a dataclass."""
    return {f.name: getattr(options, f.name) for f in fields(kind)}


def _attribute_docs(kind: type[Any]) -> dict[str, str]:
    """What a dataclass's docstring says of each field."""
    from docstring_parser import parse

    docs = {p.arg_name: p.description or "" for p in parse(inspect.getdoc(kind) or "").params}
    return {f.name: docs.get(f.name, "") for f in fields(kind)}


def _config_text(parser: ArgumentParser, options: Namespace) -> str:
    """All options as a config, without what is to be asked for each time anew and the preset, now resolved."""
    kept = options.clone()
    for name in ("config", "preset", "from_checkpoint", *(f.name for f in fields(Flags))):
        kept.pop(name, None)
    return parser.dump(kept, skip_validation=True)


def _write_config(run_dir: Path, text: str) -> None:
    write_atomically(run_dir / "config.yaml", text)


def _eval(words: list[str]) -> int:
    parser = Parser(
        prog="fastadv eval",
        description="Measure a run's accuracy, clean and under attack, on the test images.",
    )
    parser.add_argument("run", help="Run directory.")
    parser.add_argument("--config", action="config", help="YAML file with any of the options.")
    parser.add_argument(
        "--attacks",
        nargs="+",
        default=list(DEFAULT_ATTACKS),
        help="clean, fgsm, fgsm-rs, pgd-K for any K, pgd-K-R with R restarts, cw-K, mim-K, apgd-ce, "
        "apgd-dlr, apgd-t, autoattack.",
    )
    parser.add_argument("--quiet", action="store_true", help="Show no progress.")
    parser.add_function_arguments(run_evaluation, skip={"run", "attacks", "quiet"})
    options = vars(parser.parse_args(words))
    options.pop("config")
    report = run_evaluation(**options)
    print(report.table(), end="")
    return 0


def _report(words: list[str]) -> int:
    parser = Parser(prog="fastadv report", description="Compare runs: one table, one plot.")
    parser.add_argument("runs", nargs="+", help="Run directories that have been evaluated.")
    parser.add_function_arguments(run_report, skip={"runs"})
    options = vars(parser.parse_args(words))
    print(run_report(**options))
    return 0


def _info(words: list[str]) -> int:
    import json

    from fastadv import info

    parser = Parser(prog="fastadv info", description="Say what this installation can do.")
    parser.add_argument("--ops", action="store_true", help="List every op and its backends.")
    parser.add_argument("--json", action="store_true", help="Print JSON.")
    options = parser.parse_args(words)
    facts = info.collect()
    print(json.dumps(facts, indent=2) if options.json else info.render(facts, options.ops))
    return 0


def _demo(words: list[str]) -> int:
    from fastadv.demo import run_demo

    parser = Parser(prog="fastadv demo", description=inspect.getdoc(run_demo))
    parser.add_function_arguments(run_demo)
    options = vars(parser.parse_args(words))
    print(run_demo(**options))
    return 0


_COMMANDS = {
    "train": Command("train a model by one of the methods", _train),
    "eval": Command("measure a run's accuracy under attack", _eval),
    "report": Command("compare runs in a table and a plot", _report),
    "info": Command("say what this installation can do", _info),
    "demo": Command("train and compare three models on small images, in minutes", _demo),
}
