"""The program `fastadv`: it finds the command, runs it, and shows its errors.

jsonargparse's subcommands are not used. They need the parsers of all commands and methods for each call: about
fifty parsers, at a tenth of a second each. With them the defaults of a method could not follow from its other
options, and the words of a sweep could not be divided among three parsers.
"""

from __future__ import annotations

import codecs
import io
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
from fastadv.cli.demo import demo
from fastadv.cli.evaluate import evaluate
from fastadv.cli.info import info
from fastadv.cli.parsing import complain, home_expanded, with_norms
from fastadv.cli.report import report
from fastadv.cli.reproduce import reproduce
from fastadv.cli.sweep import sweep
from fastadv.cli.train import train
from fastadv.cli.transfer import transfer
from fastadv.commands.result_keeper import UnsavedResultsError
from fastadv.interruption import Interrupted
from fastadv.ops.values import did_you_mean
from fastadv.trainers import method_names

_PROGRAM = "fastadv"
# Errors that the user can put right. Any other error is a defect of fastadv and ends in a traceback.
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
        arguments: the command line without the program's name; by default the words of this process.

    Returns:
        The exit status: 0 after success; 2 after an error that the user can put right; 128 and the signal's number
        after a signal, such as 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    open_closed_streams()
    _escape_signs_without_code()
    try:
        try:
            return _run(words)
        finally:
            _flush_output()
    except BrokenPipeError:
        # The reader, such as `head`, has closed the pipe. Python would print the error again when it ends.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, it stays open to the end
        return 0


def _flush_output() -> None:
    """Write what was printed. On a full disk say so, in place of a traceback, and end with status 2.

    Raises:
        BrokenPipeError: nobody reads the output.
        SystemExit: the output cannot be written.
    """
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, as Python would try again when it ends
        raise SystemExit(
            complain(f"the standard output cannot be written: {error.strerror}")
        ) from error


def open_closed_streams() -> None:
    """Send the output of streams that the caller has closed nowhere, as after `2>&-`.

    Else the next file that is opened would get the number of the stream, and messages of libraries would be
    written into it. Python's `print` takes the standard output for a standard error that is None, where progress
    and notes would stand in the midst of a JSON document.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(
                os.open(os.devnull, os.O_RDWR), True
            )  # the lowest number that is free
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115, it stays open to the end


def _escape_signs_without_code() -> None:
    """Print signs that the output's encoding does not have as escapes, with a backslash.

    Else a table that took hours would end in an error at its "±", or at the name of a folder.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            is_utf8 = codecs.lookup(stream.encoding).name == "utf-8"
            if stream.errors == "strict" or not is_utf8:
                stream.reconfigure(errors="backslashreplace")


def _run(words: list[str]) -> int:
    if is_completing():
        words = typed_words()
        if not words:
            offer(_PROGRAM, [*_COMMANDS, "--help", "--version"])
    debug = "--debug" in words
    words = with_norms([_option(word) for word in words if word != "--debug"])
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if words[0] == "--version":
        print(f"fastadv {fastadv.__version__}")
        return 0
    if words[0] not in _COMMANDS:
        return complain(_unknown(words[0]))
    try:
        os.getcwd()
    except FileNotFoundError:
        return complain("the current folder has been deleted; change to another folder")
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
    """The message about a command that does not exist."""
    text = f"unknown command {word!r}; there are {', '.join(_COMMANDS)}"
    if word.lower().replace("-", "_") in method_names():
        return f"{text}; did you mean 'train {word}'?"
    return text + did_you_mean(word, [*_COMMANDS, "--help", "--version"])


def _option(word: str) -> str:
    """Read --max-examples as --max_examples, and --run-dir as --run, which torchrun would take for its own option.

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
            "`fastadv COMMAND --help` explains a command, and `fastadv --version` prints the",
            "version.",
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
