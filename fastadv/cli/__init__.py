"""The command line `fastadv`: the program, and for each command a module that reads its options."""

# PYTHON_ARGCOMPLETE_OK: argcomplete's global completion looks for this word.

from __future__ import annotations

from fastadv.cli.program import main
from fastadv.cli.train import training_parser

__all__ = ["main", "training_parser"]
