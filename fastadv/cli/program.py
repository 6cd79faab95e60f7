"""The program `fastadv`: which command is meant, and how its errors are shown.

The commands are told apart here and not by jsonargparse's subcommands. Those need the parsers of all commands and
methods for each call, some fifty of them at a tenth of a second each. They could not make the defaults of a method
follow from its other options, nor share the words of a sweep out to three parsers.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import fastadv
from fastadv.cli.analyse import analyse
from fastadv.cli.completion import is_completing, offer, typed_words
from fastadv.cli.data import data
from fastadv.cli.evaluate import evaluate
from fastadv.cli.others import demo, info, report
from fastadv.cli.parsing import complain, home_expanded
from fastadv.cli.reproduce import reproduce
from fastadv.cli.sweep import sweep
from fastadv.cli.train import train
from fastadv.cli.transfer import transfer
from fastadv.commands.result_keeper import UnsavedResultsError
from fastadv.interruption import Interrupted
from fastadv.ops.values import closest
from fastadv.trainers import method_names

_PROGRAM = "fastadv"
# Errors that a person can put right. Anything else is a fault of ours and ends in a traceback.
_USER_ERRORS = (ValueError, TypeError, OSError, ImportError, RuntimeError, ArithmeticError)


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
        The exit status: 0; 2 for something the user can put right; 128 + number after a signal, such as 130
        after Ctrl-C.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        try:
            return _run(words)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        # The reader, such as `head`, has seen enough. Python would complain once more when it ends.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, it stays open to the end
        return 0


def _run(words: list[str]) -> int:
    if is_completing():
        words = typed_words()
        if not words:
            offer(_PROGRAM, [*_COMMANDS, "--help", "--version"])
    debug = "--debug" in words
    words = [_option(word) for word in words if word != "--debug"]
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if words[0] == "--version":
        print(f"fastadv {fastadv.__version__}")
        return 0
    if words[0] not in _COMMANDS:
        return complain(_unknown(words[0]))
    try:
        return _COMMANDS[words[0]].run(words[1:])
    except Interrupted as stop:
        with suppress(OSError):  # the terminal may be gone
            print(f"fastadv: {stop}", file=sys.stderr)
        return stop.code
    except KeyboardInterrupt:
        print("fastadv: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        raise
    except _USER_ERRORS as error:
        if isinstance(error, UnsavedResultsError):
            print(error.table, end="", flush=True)
        if debug:
            raise
        hint = " (--debug shows where)" if isinstance(error, TypeError | RuntimeError) else ""
        return complain((" ".join(str(error).split()) or type(error).__name__) + hint)


def _unknown(word: str) -> str:
    """The message on a command that does not exist."""
    text = f"unknown command {word!r}; there are {', '.join(_COMMANDS)}"
    if word.lower().replace("-", "_") in method_names():
        return f"{text}; did you mean 'train {word}'?"
    return text + closest(word, [*_COMMANDS, "--help", "--version"])


def _option(word: str) -> str:
    """Take --max-examples for --max_examples, and --run-dir for --run, which torchrun would take for its own.

    In `--out=~/results` a shell leaves the ~ as it is.
    """
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    name = name[2:].replace("-", "_")
    return "--" + ("run" if name == "run_dir" else name) + equals + home_expanded(value)


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
            "A flag stands alone, --quiet, and --no-flip turns off one that is on.",
        ]
    )


_COMMANDS = {
    "train": Command("train a model by one of the methods", train),
    "sweep": Command("train and compare a method over a grid of its options", sweep),
    "eval": Command("measure a run's accuracy under attack", evaluate),
    "transfer": Command("let models judge each other's adversarial images", transfer),
    "analyse": Command("look into models: features, weights, entropies, curves", analyse),
    "reproduce": Command("reproduce a table or a figure of a paper", reproduce),
    "report": Command("compare runs in a table and a plot", report),
    "data": Command("check the files of a data set, or download them", data),
    "info": Command("show versions, devices, kernels and engines", info),
    "demo": Command("train and compare three models on small images, in minutes", demo),
}
