"""The one error that the engine raises for itself."""

from __future__ import annotations


class Unrecordable(Exception):
    """Why no copy of a model can be made; the attack then runs the live model."""
