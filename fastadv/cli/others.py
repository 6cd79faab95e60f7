"""The options of `fastadv report`, `fastadv info` and `fastadv demo`, which have few."""

from __future__ import annotations

import inspect

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


def info(words: list[str]) -> int:
    """Print the facts about the installation, and return the exit status."""
    import json

    from fastadv import info as facts_of

    parser = Parser(
        prog="fastadv info",
        description="Show versions, devices, kernels and engines.",
    )
    parser.add_flag("ops", "List every op and its backends.")
    parser.add_flag("json", "Print JSON. It lists the ops in any case.")
    options = parser.parse_args(words)
    facts = facts_of.collect()
    print(json.dumps(facts, indent=2) if options.json else facts_of.render(facts, options.ops))
    return 0


def demo(words: list[str]) -> int:
    """Train and compare three models, and return the exit status."""
    from fastadv.demo import run_demo

    parser = Parser(prog="fastadv demo", description=_summary(run_demo))
    parser.add_function_arguments(run_demo, as_group=False)
    options = vars(parser.parse_args(words))
    print(run_demo(**options))
    return 0


def _summary(documented: object) -> str:
    """The first paragraph of a docstring."""
    return (inspect.getdoc(documented) or "").partition("\n\n")[0]
