"""The error for data that is there but not what it should be."""

from __future__ import annotations


class DataFormatError(ValueError):
    """A data file is damaged, truncated, or not the file that it is named after."""
