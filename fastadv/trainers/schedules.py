"""Learning-rate schedules: pure functions of the position in the run, so that resuming needs no state."""

from __future__ import annotations

import abc
import bisect
import math
from dataclasses import dataclass, replace

from fastadv.fields import check_fields
from fastadv.ops.values import check_finite_at_least_zero
from fastadv.trainers.number import Number


class Schedule(abc.ABC):
    """Base of the schedules: a factor on the recipe's learning rate. The numbers of a dataclass must be >= 0."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name, value in vars(self).items():
            for part in value if isinstance(value, tuple) else (value,):
                if isinstance(part, float):
                    check_finite_at_least_zero(name, part)

    @abc.abstractmethod
    def factor(self, epoch: float, epochs: int) -> float:
        """Return the factor at one step.

        Args:
            epoch: epochs done so far, counted from 0; 2.5 is the middle of the third epoch.
            epochs: epochs of the whole run.
        """

    def momentum(self, epoch: float, epochs: int) -> float | None:
        """Return the momentum at one step; None if the schedule does not change the recipe's momentum.

        Args:
            epoch: as for `factor`.
            epochs: as for `factor`.
        """
        return None

    def scaled(self, epochs: int, to: int) -> Schedule:
        """Return the schedule for a run of another length: numbers of epochs change in proportion.

        Args:
            epochs: number of epochs for which the schedule was made.
            to: number of epochs of the other run.
        """
        return self


@dataclass(frozen=True)
class Constant(Schedule):
    """The recipe's learning rate in all epochs."""

    def factor(self, epoch: float, epochs: int) -> float:
        """Return 1."""
        return 1.0


@dataclass(frozen=True)
class Step(Schedule):
    """Multiply by gamma after each period of `every` epochs.

    Attributes:
        every: epochs between two drops.
        gamma: factor of each drop.
    """

    every: int | Number = 30
    gamma: Number = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.every > 0:
            raise ValueError(f"every must be > 0 epochs, got {self.every}")

    def factor(self, epoch: float, epochs: int) -> float:
        """Return gamma to the power of the number of finished periods."""
        return self.gamma ** int(epoch // self.every)

    def scaled(self, epochs: int, to: int) -> Step:
        """Return the schedule of a run of another length."""
        return replace(self, every=_in_proportion(self.every, epochs, to))


@dataclass(frozen=True)
class MultiStep(Schedule):
    """Multiply by gamma after each milestone.

    Attributes:
        milestones: epochs after which the rate drops, ascending; 75 means from the 76th epoch on, 12.5 from the
            middle of the 13th.
        gamma: factor of each drop.
    """

    milestones: tuple[int | Number, ...] = (75, 90)
    gamma: Number = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_ascending("milestones", self.milestones)

    def factor(self, epoch: float, epochs: int) -> float:
        """Return gamma to the power of the number of passed milestones."""
        return self.gamma ** bisect.bisect_right(self.milestones, epoch)

    def scaled(self, epochs: int, to: int) -> MultiStep:
        """Return the schedule of a run of another length."""
        return replace(
            self, milestones=tuple(_in_proportion(one, epochs, to) for one in self.milestones)
        )


@dataclass(frozen=True)
class Piecewise(Schedule):
    """A constant factor in each of several pieces of the run.

    Attributes:
        starts: epochs after which each piece begins, ascending from 0; 12.5 is the middle of the 13th epoch.
        factors: factor on the recipe's learning rate in each piece.
    """

    starts: tuple[int | Number, ...] = (0,)
    factors: tuple[Number, ...] = (1.0,)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_pieces("starts", self.starts, self.factors)

    def factor(self, epoch: float, epochs: int) -> float:
        """Return the factor of the piece that contains the epoch."""
        return self.factors[bisect.bisect_right(self.starts, epoch) - 1]

    def scaled(self, epochs: int, to: int) -> Piecewise:
        """Return the schedule of a run of another length."""
        return replace(self, starts=tuple(_in_proportion(one, epochs, to) for one in self.starts))


@dataclass(frozen=True)
class Interpolated(Schedule):
    """Linear interpolation between factors at given epochs; after the last epoch the factor is constant.

    Attributes:
        epochs: epochs with given factors, ascending from 0.
        factors: factor on the recipe's learning rate at each of these epochs.
    """

    epochs: tuple[int | Number, ...] = (0, 100)
    factors: tuple[Number, ...] = (1.0, 0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_pieces("epochs", self.epochs, self.factors)

    def factor(self, epoch: float, epochs: int) -> float:
        """Return the interpolated factor at an epoch."""
        after = bisect.bisect_right(self.epochs, epoch)
        if after == len(self.epochs):
            return self.factors[-1]
        left, right = self.epochs[after - 1], self.epochs[after]
        share = (epoch - left) / (right - left)
        return (1 - share) * self.factors[after - 1] + share * self.factors[after]

    def scaled(self, epochs: int, to: int) -> Interpolated:
        """Return the schedule of a run of another length."""
        return replace(self, epochs=tuple(_in_proportion(one, epochs, to) for one in self.epochs))


@dataclass(frozen=True)
class Cosine(Schedule):
    """Half a cosine from the recipe's rate down to a floor; the rate changes with each step.

    Attributes:
        floor: factor at the end.
    """

    floor: Number = 0.0

    def factor(self, epoch: float, epochs: int) -> float:
        """Return the factor of this very step."""
        done = min(epoch / epochs, 1.0)
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * done)) / 2


@dataclass(frozen=True)
class EpochCosine(Cosine):
    """`Cosine` whose rate changes only when an epoch begins."""

    def factor(self, epoch: float, epochs: int) -> float:
        """Return the factor at the first step of the epoch."""
        return super().factor(math.floor(epoch), epochs)


@dataclass(frozen=True)
class Cyclic(Schedule):
    """One triangle: from 0 up to the recipe's rate and down to 0; the rate changes with each step.

    Source: Smith 2017, in the form of torch's CyclicLR, which has the same names for the momentum.

    Attributes:
        peak: position of the highest rate, as a fraction of the run, between 0 and 1.
        base_momentum: momentum at the highest rate; by default the recipe's momentum does not change.
        max_momentum: momentum at both ends; set it together with base_momentum.
    """

    peak: Number = 0.4
    base_momentum: Number | None = None
    max_momentum: Number | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_peak(self.peak)
        _check_momenta(self.base_momentum, self.max_momentum)

    def factor(self, epoch: float, epochs: int) -> float:
        """Return the factor of this very step."""
        done = epoch / epochs
        return done / self.peak if done < self.peak else max(0.0, (1 - done) / (1 - self.peak))

    def momentum(self, epoch: float, epochs: int) -> float | None:
        """Return the momentum of this very step, which falls while the rate rises."""
        return _lowered(self.base_momentum, self.max_momentum, self.factor(epoch, epochs))


@dataclass(frozen=True)
class OneCycle(Schedule):
    """Half a cosine up to the recipe's rate and half a cosine down; the rate changes with each step.

    Source: Smith and Topin 2018, in the form of torch's OneCycleLR, which has the same names for the momentum.

    Attributes:
        peak: position of the highest rate, as a fraction of the run, between 0 and 1.
        start: factor at the beginning.
        floor: factor at the end.
        base_momentum: momentum at the highest rate; by default the recipe's momentum does not change.
        max_momentum: momentum at both ends; set it together with base_momentum.
    """

    peak: Number = 0.3
    start: Number = 1 / 25
    floor: Number = 1 / 250_000
    base_momentum: Number | None = None
    max_momentum: Number | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_peak(self.peak)
        _check_momenta(self.base_momentum, self.max_momentum)

    def factor(self, epoch: float, epochs: int) -> float:
        """Return the factor of this very step."""
        low = self.start if epoch / epochs < self.peak else self.floor
        return low + (1 - low) * self._height(epoch / epochs)

    def momentum(self, epoch: float, epochs: int) -> float | None:
        """Return the momentum of this very step, which falls while the rate rises."""
        return _lowered(self.base_momentum, self.max_momentum, self._height(epoch / epochs))

    def _height(self, done: float) -> float:
        """The height of the curve after a fraction of the run: 0 at both ends, 1 at the highest rate."""
        done = min(done, 1.0)
        way = done / self.peak if done < self.peak else (1 - done) / (1 - self.peak)
        return (1 - math.cos(math.pi * way)) / 2


@dataclass(frozen=True)
class EpochOneCycle(OneCycle):
    """`OneCycle` whose rate and momentum change only when an epoch begins.

    They equal the rate and momentum of torch's OneCycleLR with one step for each epoch. The highest rate is in the
    epoch before the fraction `peak` of the run is over, and the last epoch has the rate of the floor.
    """

    def factor(self, epoch: float, epochs: int) -> float:
        """Return the factor of this epoch."""
        return super().factor(self._place(epoch, epochs), 1)

    def momentum(self, epoch: float, epochs: int) -> float | None:
        """Return the momentum of this epoch."""
        return super().momentum(self._place(epoch, epochs), 1)

    def _place(self, epoch: float, epochs: int) -> float:
        """The position of an epoch on the curve of `OneCycle`, as a fraction of the run."""
        now, top, last = math.floor(epoch), self.peak * epochs - 1, epochs - 1
        if now <= top:
            return self.peak * now / top if top > 0 else self.peak
        return self.peak + (1 - self.peak) * (now - top) / (last - top)


def _in_proportion(place: float, epochs: int, to: int) -> int | Number:
    """A position in a run of ``epochs`` epochs, scaled to a run of ``to`` epochs."""
    there = place * to / epochs
    return int(there) if there == int(there) else Number(there)


def _check_peak(peak: float) -> None:
    if not 0 < peak < 1:
        raise ValueError(f"peak must lie between 0 and 1, got {peak}")


def _check_momenta(base: float | None, largest: float | None) -> None:
    if base is None and largest is None:
        return
    if base is None or largest is None or not 0 <= base <= largest < 1:
        raise ValueError(
            "base_momentum and max_momentum must both be None, or 0 <= base_momentum <= max_momentum < 1, "
            f"got {base} and {largest}"
        )


def _lowered(base: float | None, largest: float | None, height: float) -> float | None:
    """The momentum at a height of the learning rate's curve; None if the momentum is not cycled."""
    return None if base is None or largest is None else largest - (largest - base) * height


def _check_ascending(name: str, values: tuple[float, ...]) -> None:
    if list(values) != sorted(set(values)) or any(value < 0 for value in values):
        raise ValueError(f"{name} must be ascending epochs >= 0, got {values}")


def _check_pieces(name: str, epochs: tuple[int | Number, ...], factors: tuple[Number, ...]) -> None:
    """Raise ValueError unless the epochs ascend from 0 and each of them has a factor."""
    _check_ascending(name, epochs)
    if not epochs or epochs[0] != 0:
        raise ValueError(f"{name} must begin with 0, got {epochs}")
    if len(factors) != len(epochs):
        raise ValueError(
            f"factors must have one number for each of the {len(epochs)} {name}, got {len(factors)}"
        )
