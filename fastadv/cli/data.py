"""The options of `fastadv data`."""

from __future__ import annotations

from fastadv.cli.parsing import FAILED, Parser
from fastadv.commands.data import run_data
from fastadv.data.datasets import dataset_names
from fastadv.interruption import stopped_by_signals


def data(words: list[str]) -> int:
    """Check the files of a data set, and return the exit status."""
    parser = Parser(
        prog="fastadv data",
        description="Say where to get the files of a data set and how they must lie, check the files that are "
        "there, and download them where there is a network. The exit status is 0 where the data set can be used.",
        needs={"name": f"one of {', '.join(dataset_names())}"},
    )
    parser.add_argument("name", help=f"Data set: {', '.join(dataset_names())}.")
    parser.add_function_arguments(run_data, skip={"name"})
    with stopped_by_signals("stopped; nothing of the download is kept"):
        result = run_data(**vars(parser.parse_args(words)))
    print(result.text, end="")
    return 0 if result.is_good else FAILED
