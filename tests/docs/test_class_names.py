"""One class per name, so that a name in a traceback or a signature says which class it is."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "fastadv"


def test_no_two_classes_share_a_name() -> None:
    """`fastadv.compat` alone repeats names, as it is imported in place of torchattacks."""
    homes = defaultdict(set)
    for path in PACKAGE.rglob("*.py"):
        if "compat" not in path.relative_to(PACKAGE).parts:
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ClassDef):
                    homes[node.name].add(str(path.relative_to(PACKAGE)))
    assert len(homes) > 200
    assert {name: sorted(found) for name, found in homes.items() if len(found) > 1} == {}
