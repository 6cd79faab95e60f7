"""The command `fastadv`: train, eval, report, info and demo, one module for the options of each."""

from __future__ import annotations

from fastadv.cli.program import main
from fastadv.cli.train import training_parser

__all__ = ["main", "training_parser"]
