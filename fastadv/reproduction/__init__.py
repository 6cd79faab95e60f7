"""The tables and figures of the papers: trainings, measurements, and the paper's figures beside ours."""

from __future__ import annotations

from fastadv.reproduction.registry import all_items, find_item
from fastadv.reproduction.reproduce import Reproduced, ReproductionJob, reproduce
from fastadv.reproduction.scales import SCALES, Scale, find_scale
from fastadv.reproduction.tables import Cell, Column, Item, MeasuredCell, PaperTable, RowSpec

__all__ = [
    "SCALES",
    "Cell",
    "Column",
    "Item",
    "MeasuredCell",
    "PaperTable",
    "Reproduced",
    "ReproductionJob",
    "RowSpec",
    "Scale",
    "all_items",
    "find_item",
    "find_scale",
    "reproduce",
]
