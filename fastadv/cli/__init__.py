"""The command `fastadv`: train, eval, report, info and demo, one module for the options of each."""

# PYTHON_ARGCOMPLETE_OK: argcomplete's global completion looks for this word.

from __future__ import annotations

from fastadv.cli.program import main
from fastadv.cli.train import training_parser

__all__ = ["main", "training_parser"]
