"""The grid of a sweep: the options with their values, and the seeds."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction

SEED, SEEDS = "seed", "seeds"
_MAX_VALUES = 10_000  # of one axis; a range with more values is a typing error
_PLAIN_DIGITS = 15  # an integer with more digits is written with an exponent


@dataclass(frozen=True)
class Axis:
    """An option and its values.

    Attributes:
        name: the option's name, without dashes.
        values: its values, as text for the command line. A number has one spelling: `.5` and `0.50` are the same
            value.
    """

    name: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Grid:
    """All combinations of the values of some options, each for every seed.

    Attributes:
        axes: the options; empty for a sweep over seeds alone.
        seeds: the seeds of the trainings; empty where the grid does not name seeds.
    """

    axes: tuple[Axis, ...]
    seeds: tuple[int, ...] = ()

    def settings(self) -> Iterator[dict[str, str]]:
        """Yield each combination of values, the last axis changing fastest."""
        names = [axis.name for axis in self.axes]
        for values in itertools.product(*(axis.values for axis in self.axes)):
            yield dict(zip(names, values, strict=True))


def parse_grid(words: Sequence[str]) -> Grid:
    """Read a grid.

    Args:
        words: one per option, `NAME=VALUES`. VALUES are separated by commas. Each is a number, a fraction such as
            8/255, a word, a list in brackets, or a range `FIRST:LAST:STEP` with both ends, whose STEP is 1 where
            it is left out. `seeds=N` is for the seeds 0 to N - 1, `seed=A,B` for those that are named.

    Returns:
        The options and their values, and the seeds.

    Raises:
        ValueError: for words of another form; the message names the option.
    """
    axes: dict[str, Axis] = {}
    seeds: tuple[int, ...] = ()
    for word in words:
        name, equals, text = word.partition("=")
        name = name.strip().lstrip("-").replace("-", "_")
        if not equals or (not name.isidentifier() and "." not in name):
            raise ValueError(
                f"grid must be of the form NAME=VALUES, such as lr=.1,.05, got {word!r}"
            )
        if name in axes or (name in (SEED, SEEDS) and seeds):
            raise ValueError(f"grid must name each option once, got {name} twice")
        if name == SEEDS:
            seeds = _counted_seeds(text)
        elif name == SEED:
            seeds = tuple(_seed(value) for value in _values(name, text))
        else:
            axes[name] = Axis(name, _values(name, text))
    if not axes and not seeds:
        raise ValueError("grid must name an option and its values, such as lr=.1,.05, or seeds=3")
    return Grid(tuple(axes.values()), seeds)


def canonical(text: str) -> str:
    """Return the one spelling of a number; return any other text as it is.

    A fraction keeps its denominator: 8/255 stays 8/255.
    """
    text = text.strip()
    number = _number(text)
    if number is None or "/" in text:
        return text
    return _decimal(Decimal(text))


def _counted_seeds(text: str) -> tuple[int, ...]:
    if not text.isascii() or not text.isdecimal() or not 0 < int(text) <= _MAX_VALUES:
        raise ValueError(
            f"grid: seeds must be how many there are, 1 or more, got {text!r}; seed=3,7 names them"
        )
    return tuple(range(int(text)))


def _seed(text: str) -> int:
    if not text.isascii() or not text.isdecimal():
        raise ValueError(f"grid: seed must be whole numbers from 0, got {text!r}")
    return int(text)


def _values(name: str, text: str) -> tuple[str, ...]:
    values: list[str] = []
    seen: set[object] = set()
    for part in _split(name, text):
        for value in _range(name, part) if _is_range(part) else [canonical(part)]:
            same = _number(value)
            identity = value if same is None else float(same)  # as the run takes it
            if identity in seen:
                raise ValueError(f"grid: {name} must have each value once, got {value} twice")
            seen.add(identity)
            values.append(value)
    return tuple(values)


def _split(name: str, text: str) -> list[str]:
    """The parts between commas; commas inside brackets do not separate."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "[{(") - (character in "]})")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    parts = [part.strip() for part in parts]
    if depth or not all(parts):
        raise ValueError(f"grid: {name} must have values between commas, got {text!r}")
    return parts


def _is_range(text: str) -> bool:
    """Whether a text with a colon is a range; `timm:resnet18` is a word."""
    first = text.partition(":")[0]
    return ":" in text and (not first or _number(first) is not None)


def _range(name: str, text: str) -> list[str]:
    parts = text.split(":")
    numbers = [_number(part) for part in parts]
    if len(parts) not in (2, 3) or any(number is None for number in numbers):
        raise ValueError(f"grid: {name} must have ranges such as 0:.04:.005, got {text!r}")
    first, last, *steps = [number for number in numbers if number is not None]
    step = steps[0] if steps else Fraction(1)
    count = (last - first) / step if step else Fraction(-1)
    if count < 0:
        raise ValueError(
            f"grid: {name} must have a range whose step leads to its end, got {text!r}"
        )
    if count.denominator != 1:
        raise ValueError(
            f"grid: {name} must have a range with a whole number of steps, as both ends belong to it, got {text!r}"
        )
    if count >= _MAX_VALUES:
        raise ValueError(f"grid: {name} must have at most {_MAX_VALUES} values, got {text!r}")
    denominators = {part.partition("/")[2].strip() for part in parts if "/" in part}
    common = denominators.pop() if len(denominators) == 1 else ""
    denominator = int(common) if common.isdecimal() else None
    return [_spelled(first + step * number, denominator) for number in range(int(count) + 1)]


def _spelled(number: Fraction, denominator: int | None) -> str:
    """Write a number over the denominator of its range, else as a decimal number, else as a fraction."""
    if denominator is not None and number.denominator != 1:
        numerator = number * denominator
        if numerator.denominator == 1:
            return f"{numerator}/{denominator}"
    rest = number.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    if rest != 1:
        return str(number)
    return _decimal(Decimal(number.numerator) / Decimal(number.denominator))


def _number(text: str) -> Fraction | None:
    """The value of a number or of a fraction of two numbers; None for other text."""
    numerator, slash, denominator = text.partition("/")
    try:
        found = [
            Decimal(part.strip()) for part in ([numerator, denominator] if slash else [numerator])
        ]
    except InvalidOperation:
        return None
    if not all(number.is_finite() and abs(number.adjusted()) < 400 for number in found):
        return None
    if slash and not found[1]:
        return None
    return Fraction(found[0]) / (Fraction(found[1]) if slash else 1)


def _decimal(number: Decimal) -> str:
    plain = number.normalize() + 0  # the addition turns -0 into 0
    whole = plain == plain.to_integral_value() and plain.adjusted() < _PLAIN_DIGITS
    return f"{plain:f}" if whole else str(plain)
