"""The speeds that ops were asked to reach on the CPU, and whether a run has reached them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from op_rows import COMPILED, COPY, EAGER, USUAL, USUAL_COMPILED

Group = Mapping[str, dict[str, Any]]  # the benchmarks of a row by candidate


@dataclass(frozen=True)
class Target:
    """The owner of an op against another candidate of a row.

    Attributes:
        row: the row's name.
        against: the candidate; a copy gives a share of its bandwidth, all others a speedup.
        least: the ratio or share that is asked for.
    """

    row: str
    against: str
    least: float


_STEP = "pgd_step_/linf-forward-128x3x224x224-float32-contiguous"
_CROP = "crop_flip/constant-forward-50000x3x32x32-float32-contiguous"
_DISTANCES = (
    "angular_distance/same-dtype",
    "euclidean_distance/norm",
    "vanilla_feature_distillation/same-dtype",
    "attention_map_distance/same-channels",
)
# Autograd itself takes longer for one node, forward and backward, than a third of the usual code (NOTES.md, losses
# on logits, 12). So nothing can be three times as fast as that code here.
_AT_AUTOGRADS_FLOOR = {(k, s) for k in ("cross_entropy", "cw") for s in ("128x10", "128x100")}
# The cheapest node with two gradients and the forward kernel together take longer than a third (the same, 13).
_AT_AUTOGRADS_FLOOR |= {("kl", "128x10")}
# A copy of the bytes that euclidean_distance must move is 3.1 times as fast as the usual eager code (same, 13).
_AT_MEMORYS_FLOOR = {"euclidean_distance/norm": 2.5}
_LOSSES = ("cross_entropy", "kl", "trades", "mart", "alp", "boosted_cross_entropy", "cw", "dlr")


def _both(case: str, shape: str, compiled: float, eager: float | None) -> list[Target]:
    """Forward and backward pass against the usual code, compiled and, where that is possible, eager."""
    row = f"{case}-both-{shape}-float32-contiguous"
    targets = [Target(row, USUAL_COMPILED, compiled)]
    return targets if eager is None else [*targets, Target(row, USUAL, eager)]


TARGETS = (
    Target(_STEP, COPY, 0.85),
    Target(_STEP, COMPILED, 1.5),
    Target(_STEP, EAGER, 15.0),
    Target(_STEP, USUAL, 15.0),  # `where`, in the reference, is slow on CPUs: the stricter reading
    Target(_CROP, USUAL, 5.0),
    *(
        t
        for case in _DISTANCES
        for t in _both(case, "128x640x8x8", 1.3, _AT_MEMORYS_FLOOR.get(case, 3.0))
    ),
    *(
        t
        for kind in _LOSSES
        for shape in ("128x10", "128x100", "512x1000")
        for t in _both(
            f"softmax_losses/{kind}",
            shape,
            1.5,
            None if (kind, shape) in _AT_AUTOGRADS_FLOOR else 3.0,
        )
    ),
)
HEADER = ["target", "asked for", "measured", ""]
_NAMES = {
    COPY: "of the bandwidth of a copy",
    COMPILED: "over torch.compile",
    EAGER: "over the eager reference",
    USUAL: "over the usual tensor code",
    USUAL_COMPILED: "over the usual code compiled",
}


def lines(groups: Mapping[str, Group]) -> list[list[str]]:
    """A line per target: its name, the figure asked for, the figure measured, whether it is met."""
    found = []
    for target in TARGETS:
        unit = "" if target.against == COPY else "x"
        what = f"{target.row}, {_NAMES[target.against]}"
        asked = f">= {target.least:g}{unit}"
        reached = _reached(target, groups.get(target.row, {}))
        if reached is None:
            found.append([what, asked, "-", "not measured"])
        else:
            met = "met" if reached >= target.least else "NOT MET"
            found.append([what, asked, f"{reached:.2f}{unit}", met])
    return found


def _reached(target: Target, group: Group) -> float | None:
    owner = next(iter(group.values()))["extra_info"]["owner"] if group else None
    if owner not in group or target.against not in group:
        return None
    return group[target.against]["stats"]["median"] / group[owner]["stats"]["median"]
