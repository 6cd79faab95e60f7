"""What the tests of reproduced tables share."""

from __future__ import annotations

import re
from pathlib import Path

import fastadv
from fastadv.reproduction import Column, Item, Reproduced, RowSpec, reproduce
from fastadv.reproduction.measures import Accuracy
from fastadv.trainers import method_names

CLEAN = Column("Clean", Accuracy())


def tiny(item: str | Item, out: Path, seeds: int | None = None) -> Reproduced:
    return reproduce(item, out=out, scale="tiny", seeds=seeds)


def small_item(*rows: RowSpec, columns: tuple[Column, ...] = (CLEAN,)) -> Item:
    return Item("arrest", "table9", "a test", rows, columns)


def lines_of(markdown_file: Path) -> list[list[str]]:
    """The rows of a table below its heading."""
    lines = [line for line in markdown_file.read_text().splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def is_true(reason: str) -> bool:
    """Whether what a row is said to lack is lacking indeed."""
    assert reason.startswith("cannot run: "), reason
    if found := re.search(r"there is no method (\w+)", reason):
        return found[1] not in method_names()
    if found := re.search(r"method (\w+) has no option (\w+)", reason):
        fields = fastadv.trainers.find_method(found[1]).recipe_class.__dataclass_fields__
        return found[2] not in fields
    if re.search(r"method vfd refuses|method rst needs further images", reason):
        return True  # a layer that a small network has not; images that are not there
    if reason.endswith("broke no image"):
        return True  # a model that knows one class alone
    return "analysis" in reason and "cannot be made" in reason
