"""Marks that choose a test for some of its parameters."""

from __future__ import annotations

import pytest


def accepted(item: pytest.Item, mark: pytest.Mark) -> bool:
    """Whether the `when` of a mark, if it has one, accepts the parameters of a test."""
    when = mark.kwargs.get("when")
    return when is None or bool(when(parameters(item)))


def parameters(item: pytest.Item) -> dict[str, object]:
    """The parameters of a test by their names."""
    return dict(item.callspec.params) if hasattr(item, "callspec") else {}
