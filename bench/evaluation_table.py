"""The finds of `evaluation.py` on several networks as Markdown: attack by attack, seed by seed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import Any

from evaluation_found import REFERENCE, Found
from measure import machine_line


def markdown(files: Sequence[Mapping[str, Any]]) -> str:
    """Tables of the contents of results files, one section for each network."""
    return "\n\n".join(section(content) for content in files) + "\n"


def section(content: Mapping[str, Any]) -> str:
    """What the reference and each other search have found on one network."""
    rows = [Found.read(row) for row in content["results"]]
    settings, busy = content["settings"], content.get("busy", False)
    lines = [
        f"## {content['data']}, {content['network']}, {settings['norm']} {settings['eps']:.3g}",
        f"The first {content['images']} test images, batch size {settings['batch_size']}; "
        f"{machine_line(content['machine'])}.",
    ]
    base = {row.seed: row for row in rows if row.search == REFERENCE}
    for name in dict.fromkeys(row.search for row in rows if row.search != REFERENCE):
        own = {row.seed: row for row in rows if row.search == name}
        seeds = sorted(base.keys() & own.keys())
        if seeds:
            pairs = [(base[seed], own[seed]) for seed in seeds]
            lines += [f"### {name}, searching in {pairs[0][1].ran}", _table(pairs, busy)]
            lines.append(_verdict(pairs))
    return "\n\n".join(lines)


def _table(pairs: Sequence[tuple[Found, Found]], busy: bool) -> str:
    """After each attack: images left, images that one of both alone has broken, and seconds."""
    seeds = ", ".join(str(first.seed) for first, _ in pairs)
    note = " (busy machine)" if busy else ""
    header = [
        "after",
        "pyautoattack leaves, mean",
        "fastadv leaves, mean",
        "difference, mean",
        f"pyautoattack alone, seeds {seeds}",
        f"fastadv alone, seeds {seeds}",
        "pyautoattack alone, against another of its seeds",
        f"pyautoattack s{note}",
        f"fastadv s{note}",
        f"times as fast{note}",
    ]
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    for number, attack in enumerate(pairs[0][0].attacks):
        left = [tuple(set(one.attacks[number].left) for one in pair) for pair in pairs]
        means = [statistics.fmean(len(pair[side]) for pair in left) for side in (0, 1)]
        seconds = [
            statistics.fmean(pair[side].attacks[number].seconds for pair in pairs)
            for side in (0, 1)
        ]
        lines.append(
            [
                attack.name,
                *(f"{mean:.1f}" for mean in means),
                f"{means[1] - means[0]:+.2f}",
                ", ".join(str(len(ours - theirs)) for theirs, ours in left),
                ", ".join(str(len(theirs - ours)) for theirs, ours in left),
                _own_difference([theirs for theirs, _ in left]),
                *(f"{one:.1f}" for one in seconds),
                f"{seconds[0] / seconds[1]:.1f}",
            ]
        )
    whole = [sum(pair[side].seconds for pair in pairs) / len(pairs) for side in (0, 1)]
    totals = [*(f"{one:.1f}" for one in whole), f"{whole[0] / whole[1]:.1f}"]
    lines.append(["all", *[""] * (len(header) - 4), *totals])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _own_difference(left: Sequence[set[int]]) -> str:
    """Images that one seed leaves and another breaks, the mean over all pairs of two seeds."""
    counts = [len(one - other) for one, other in permutations(left, 2)]
    return f"{statistics.fmean(counts):.2f}" if counts else "-"


def _verdict(pairs: Sequence[tuple[Found, Found]]) -> str:
    """The images that fastadv calls robust with a seed with which the reference breaks them."""
    missed: dict[int, list[int]] = {}
    for first, own in pairs:
        for image in sorted(own.robust - first.robust):
            missed.setdefault(image, []).append(own.seed)
    if not missed:
        return "No image is called robust that pyautoattack breaks with the same seed."
    parts = []
    for image, seeds in missed.items():
        broken = sum(image not in first.robust for first, _ in pairs)
        left = sum(image in own.robust for _, own in pairs)
        parts.append(
            f"image {image} (seeds {', '.join(map(str, seeds))}; of {len(pairs)} seeds pyautoattack breaks it "
            f"with {broken}, fastadv leaves it with {left})"
        )
    return f"Called robust and broken by pyautoattack with the same seed: {'; '.join(parts)}."
