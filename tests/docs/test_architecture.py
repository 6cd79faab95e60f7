"""docs/architecture.md is true: who imports whom, and which private names of torch are used."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "fastadv"
PAGE = (ROOT / "docs" / "architecture.md").read_text()
SOURCES = [*PACKAGE.rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
_PRIVATE = re.compile(r"\btorch(?:\.\w+)*?\.(?!__)_\w+(?:\.\w+)*")


def _rows(heading: str, first: str) -> list[list[str]]:
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    table = re.search(rf"^\| {first}.*?(?=\n\n|\Z)", section, re.MULTILINE | re.DOTALL)
    assert table is not None
    rows = [line.strip("| ").split("|") for line in table[0].splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row] for row in rows[1:]]


def _floors() -> dict[str, set[str]]:
    """The names of each floor, from the highest, with what they may import."""
    floors = {}
    for row in _rows("Floors", "floor"):
        imported = set(re.findall(r"\w+", row[2])) if len(row) > 2 else set()
        floors.update(dict.fromkeys(re.findall(r"`(\w+)`", row[0]), imported))
    return floors


def _part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imported(path: Path) -> set[str]:
    """The parts of the package that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "fastadv":
            found |= {f"fastadv.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    parts = {name.split(".")[1] for name in found if name.startswith("fastadv.")}
    return parts - {"__version__"}


FLOORS = _floors()
UPWARDS = {(row[0].strip("`"), row[1].strip("`")) for row in _rows("Floors", "from")}


def test_every_part_of_the_package_has_a_floor() -> None:
    parts = {_part(path) for path in PACKAGE.rglob("*.py")}
    assert parts - {"__init__", "__main__", "kernels"} <= set(FLOORS)


def test_no_floor_is_said_to_import_a_higher_one() -> None:
    order = list(FLOORS)
    for name, imported in FLOORS.items():
        assert imported <= set(order[order.index(name) :]), name


@pytest.mark.parametrize("name", FLOORS)
def test_a_floor_imports_what_the_page_says(name: str) -> None:
    found: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        if _part(path) == name:
            found |= _imported(path)
    found = {part for part in found - {name} if (name, part) not in UPWARDS}
    assert found <= FLOORS[name], name


def test_the_kernels_import_nothing_of_the_package_but_each_other() -> None:
    for path in (ROOT / "kernels").glob("*.py"):
        assert _imported(path) <= {"kernels"}, path.name


def test_every_private_name_of_torch_is_on_the_page() -> None:
    told = [
        name
        for row in _rows("Private names of torch", "name")
        for name in re.findall(r"`(torch[\w.]+)`", row[0])
    ]
    used = {}
    for path in SOURCES:
        for line in path.read_text().splitlines():
            if found := re.match(r"\s*from (torch[\w.]*) import", line):
                line = found[1] if "._" in found[1] else ""
            used |= dict.fromkeys(_PRIVATE.findall(line), path.name)
    assert len(used) > 10
    missing = {n: file for n, file in used.items() if not n.startswith(tuple(told))}
    assert not missing
    unused = [name for name in told if not any(n.startswith(name) for n in used)]
    assert not unused


def test_named_files_exist() -> None:
    names = re.findall(
        r"`((?:bench|csrc|docs|engine|fastadv|kernels|tests|trainers)/[\w./]+)`", PAGE
    )
    places = [n if (ROOT / n).exists() else f"fastadv/{n}" for n in names if "NAME" not in n]
    assert places
    assert not [place for place in places if not (ROOT / place).exists()]


def test_the_table_of_the_engines_files_has_each_of_them() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    section = text.split("## Files of the engine\n")[1].split("\n## ")[0]
    told = re.findall(r"`(\w+\.py)`", section)
    assert sorted(told) == sorted(
        path.name for path in (PACKAGE / "engine").glob("*.py") if path.name != "__init__.py"
    )
