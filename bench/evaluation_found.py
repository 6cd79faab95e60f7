"""The finds of the searches of `evaluation.py`, over several seeds, side by side."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from measure import text_table
from torch import Tensor

from fastadv.evaluation import AutoAttackResult

REFERENCE = "pyautoattack"


@dataclass(frozen=True)
class AttackFound:
    """One attack of a search.

    Attributes:
        name: name of the attack.
        seconds: duration, all parts together.
        left: indices in the test set of the images that are robust after this attack and all earlier ones.
    """

    name: str
    seconds: float
    left: list[int]


@dataclass(frozen=True)
class Found:
    """The finds of one search with one seed.

    Attributes:
        search: name of the search.
        seed: seed of the search's random numbers.
        ran: the precision that the search reports.
        n: number of images.
        seconds: duration, all parts together.
        parts: duration of each part in seconds.
        attacks: the attacks in the order in which they ran.
        refined: number of images found by float32 steps after a search in a narrower type.
        refinement_seconds: duration of these steps.
        status: status of the worst part.
    """

    search: str
    seed: int
    ran: str
    n: int
    seconds: float
    parts: list[float]
    attacks: list[AttackFound]
    refined: int
    refinement_seconds: float
    status: str

    @classmethod
    def of(cls, search: str, seed: int, parts: Sequence[Part]) -> Found:
        """Put the parts of a test set together."""
        results = [part.result for part in parts]
        stages = [stage for result in results for stage in result.stages]
        attacks = []
        for number, stage in enumerate(results[0].stages):
            left = [i for part in parts for i in part.left_after(number)]
            seconds = sum(result.stages[number].seconds for result in results)
            attacks.append(AttackFound(stage.name, seconds, left))
        worst = max((r.status for r in results), key=("ok", "suspect", "invalid").index)
        return cls(
            search,
            seed,
            results[0].search,
            sum(len(part.rows) for part in parts),
            sum(part.seconds for part in parts),
            [part.seconds for part in parts],
            attacks,
            sum(stage.refined for stage in stages),
            sum(stage.refinement_seconds for stage in stages),
            worst,
        )

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> Found:
        """From a results file."""
        attacks = [AttackFound(**attack) for attack in content["attacks"]]
        return cls(**{**content, "attacks": attacks})

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def robust(self) -> set[int]:
        """The images that withstood all attacks."""
        return set(self.attacks[-1].left)


@dataclass(frozen=True)
class Part:
    """A search's result on some of the images.

    Attributes:
        rows: their numbers in the test set, [R].
        seconds: wall-clock time.
        result: with the images counted from 0.
    """

    rows: Tensor
    seconds: float
    result: AutoAttackResult

    def left_after(self, number: int) -> list[int]:
        """The images that withstood the attack of this number and all before it."""
        result = self.result
        last = result.stages[-1].correct
        # Images are listed in the order of the attacks that broke them.
        broken_later = result.fooled[len(result.fooled) - (result.stages[number].correct - last) :]
        left = [*result.robust.nonzero().flatten().tolist(), *broken_later.tolist()]
        return sorted(self.rows[left].tolist())


def missed(found: Found, by: Found) -> int:
    """Images that one search leaves and another breaks."""
    return len(found.robust - by.robust)


def table(rows: Sequence[Found]) -> str:
    """Speed and robust accuracy of each search over the seeds, then the same per attack."""
    names = list(dict.fromkeys(row.search for row in rows))
    by_seed = {(row.search, row.seed): row for row in rows}
    base = names[0]
    lines = []
    for name in names:
        own = [row for row in rows if row.search == name]
        pairs = [(by_seed[base, row.seed], row) for row in own if (base, row.seed) in by_seed]
        lines.append(
            [
                name,
                own[0].ran,
                _middle([row.seconds for row in own], ".1f"),
                _middle([first.seconds / row.seconds for first, row in pairs], ".2f"),
                f"{statistics.fmean(100 * len(row.robust) / row.n for row in own):.2f}",
                _middle([missed(row, first) for first, row in pairs], "g"),
                _middle([missed(first, row) for first, row in pairs], "g"),
                ", ".join(str(row.seed) for row in own),
            ]
        )
    header = ["search", "ran in", "seconds", "times as fast", "robust %"]
    header += [f"{base} alone", "it alone", "seeds"]
    text = text_table(header, lines)
    text += f"\n\n{_per_attack(names, base, rows)}"
    apart = [
        missed(one, other)
        for one in rows
        for other in rows
        if one.search == other.search == base and one.seed != other.seed
    ]
    if apart:
        text += f"\n\n{base} with one seed leaves {_middle(apart, 'g')} that it breaks with another"
    return text


def _per_attack(names: Sequence[str], base: str, rows: Sequence[Found]) -> str:
    """Seconds, and images left after each attack, as means over the seeds."""
    header = ["attack", *(f"{name}: {what}" for name in names for what in ("s", "left"))]
    header += [f"{name}: times as fast" for name in names[1:]]
    lines = []
    for number, attack in enumerate(rows[0].attacks):
        cells, seconds = [attack.name], {}
        for name in names:
            own = [row.attacks[number] for row in rows if row.search == name]
            seconds[name] = statistics.fmean(one.seconds for one in own)
            left = statistics.fmean(len(one.left) for one in own)
            cells += [f"{seconds[name]:.1f}", f"{left:.1f}"]
        cells += [f"{seconds[base] / seconds[name]:.2f}" for name in names[1:]]
        lines.append(cells)
    text = text_table(header, lines)
    for name in names:
        own = [row for row in rows if row.search == name and row.refinement_seconds]
        for row in own:
            seconds = f"{row.refinement_seconds:.1f} s"
            text += f"\n{name}, seed {row.seed}: float32 steps found {row.refined} in {seconds}"
    return text


def _middle(values: Sequence[float], form: str) -> str:
    """The mean, and the smallest and largest of several."""
    if not values:
        return "-"
    mean = format(statistics.fmean(values), form)
    if len(set(values)) == 1:
        return mean
    return f"{mean} ({min(values):{form}}-{max(values):{form}})"
