"""The errors that the engine raises for itself."""

from __future__ import annotations


class Unrecordable(Exception):
    """Why no copy of a model can be made; the attack then runs the live model."""


class DependsOnBatch(Unrecordable):
    """The model's operations depend on the number of images in a way that is not known, or on chance."""
