"""The error for data files with wrong content."""

from __future__ import annotations


class DataFormatError(ValueError):
    """A data file is damaged, truncated, or not the file that it is named after."""
