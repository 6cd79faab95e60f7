"""The exceptions that parts of the engine raise for each other; they never reach the caller of an attack."""

from __future__ import annotations


class Unrecordable(Exception):
    """No copy of a model can be made; the message says why. The attack then runs the live model."""


class DependsOnBatch(Unrecordable):
    """The model's operations depend on the number of images in a way that is not known, or on chance."""
