"""The options of `fastadv report`."""

from __future__ import annotations

from fastadv.cli.parsing import Parser
from fastadv.commands import run_report


def report(words: list[str]) -> int:
    """Compare results, and return the exit status."""
    parser = Parser(
        prog="fastadv report",
        description="Compare the results of `fastadv eval`: print tables, and with --out write a report.",
        needs={
            "runs": "one or more run directories that `fastadv eval` has judged, or its files (.json)"
        },
    )
    parser.add_argument(
        "runs",
        nargs="+",
        help="Run directories that `fastadv eval` has judged, or files of results (.json) that it has written.",
    )
    parser.add_function_arguments(run_report, skip={"runs", "json"})
    parser.add_flag("json", "Print all results as JSON in place of the table.")
    options = vars(parser.parse_args(words))
    print(run_report(**options))
    return 0
