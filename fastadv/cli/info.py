"""The options of `fastadv info`."""

from __future__ import annotations

import json

from fastadv.cli.parsing import Parser
from fastadv.info import collect, render


def info(words: list[str]) -> int:
    """Print the facts about the installation, and return the exit status."""
    parser = Parser(
        prog="fastadv info",
        description="Show versions, devices, kernels and engines.",
    )
    parser.add_flag("ops", "List every op and its backends.")
    parser.add_flag("json", "Print JSON. It lists the ops in any case.")
    options = parser.parse_args(words)
    facts = collect()
    print(json.dumps(facts, indent=2) if options.json else render(facts, options.ops))
    return 0
