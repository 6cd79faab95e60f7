"""Numbers that may be written as fractions, "8/255", on the command line and in configs."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    Number: TypeAlias = float
else:

    class Number(float):
        """The annotation of recipe fields for which the command line also accepts "8/255".

        It is only a marker: the values themselves are plain floats.
        """


def parse_number(value: object) -> float:
    """Read a number or a fraction of two numbers.

    Args:
        value: a number, or text such as "0.1", "1e-3" or "8/255".

    Raises:
        ValueError: if the value is neither, if a denominator is 0, or if the result is not finite.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"expected a number or a fraction such as 8/255, got {value!r}")
    try:
        if isinstance(value, str):
            numerator, slash, denominator = value.partition("/")
            number = float(numerator) / float(denominator) if slash else float(value)
        else:
            number = float(value)
    except (ValueError, ZeroDivisionError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"expected a number or a fraction such as 8/255, got {value!r}")
    return number
