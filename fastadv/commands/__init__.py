"""The work of the program's commands, one module each, independent of the command line's parser."""

from __future__ import annotations

from fastadv.commands.evaluation import DEFAULT_ATTACKS, run_evaluation
from fastadv.commands.report import run_report
from fastadv.commands.sweep import run_sweep
from fastadv.commands.training import Flags, run_training

__all__ = ["DEFAULT_ATTACKS", "Flags", "run_evaluation", "run_report", "run_sweep", "run_training"]
