"""Sweeps: one method trained at every point of a grid, for several seeds, and compared in one table."""

from __future__ import annotations

from fastadv.sweeps.grid import Axis, Grid, parse_grid
from fastadv.sweeps.plan import Plan, SweepRun

__all__ = ["Axis", "Grid", "Plan", "SweepRun", "parse_grid"]
