"""The options of `fastadv demo`."""

from __future__ import annotations

import inspect

from fastadv.cli.parsing import Parser
from fastadv.demo import run_demo


def demo(words: list[str]) -> int:
    """Train and compare three models, and return the exit status."""
    parser = Parser(prog="fastadv demo", description=_summary(run_demo))
    parser.add_function_arguments(run_demo, as_group=False)
    options = vars(parser.parse_args(words))
    print(run_demo(**options))
    return 0


def _summary(documented: object) -> str:
    """The first paragraph of a docstring."""
    return (inspect.getdoc(documented) or "").partition("\n\n")[0]
