"""Attacks without a ball: the smallest perturbation that breaks each image, as far as an attack finds it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastadv.attacks import CWL2, FGSM, PGD
from fastadv.attacks.minimum_perturbation import Bisection
from fastadv.evaluation.attack_list import Minimum
from fastadv.evaluation.context import Model
from fastadv.evaluation.runner import Outcome, Runner
from fastadv.evaluation.verify import (
    NORM_ORDERS,
    Audit,
    admissible_or_clean,
    logits_of,
    predict,
    tolerance,
)
from fastadv.files import file_key
from fastadv.ops.values import largest_radius, limit
from fastadv.seeding import derive_seed

# (images, labels, indices in the data) -> distance of each image's adversarial image, infinite where no
# adversarial image was found
Search = Callable[[Tensor, Tensor, Tensor], Tensor]
_FIXED_C, _FIRST_C = 1.0, 1e-3  # the only value of c, and the first value of a search for c
_HALVINGS = 7  # of the largest radius; the smallest of these radii is tried first
_BISECTIONS = 10


@dataclass(frozen=True)
class CarliniWagner:
    """The settings with which `cwl2` is run.

    Attributes:
        c: weight of the margin against the squared distance; None means 1 where one value is tried, and .001 for
            the first of several.
        lr: learning rate of Adam.
    """

    c: float | None = None
    lr: float = 0.01

    def __post_init__(self) -> None:
        for name, value in (("c", self.c), ("lr", self.lr)):
            if value is None:
                continue
            if not limit(f"cw_{name}", value) > 0:
                raise ValueError(f"cw_{name} must be > 0, got {value}")
            object.__setattr__(self, name, float(value))

    def first_c(self, attack: Minimum) -> float:
        """The first value of c that an attack tries."""
        if self.c is not None:
            return self.c
        return _FIXED_C if attack.search_steps == 1 else _FIRST_C

    def variant(self, attack: Minimum) -> str:
        """The settings in words, for the row of an attack; empty for an attack that does not use them."""
        if attack.kind != "cwl2":
            return ""
        first = f"c {'from ' * (attack.search_steps > 1)}{self.first_c(attack):g}"
        return first if self.lr == CarliniWagner.lr else f"{first}, lr {self.lr:g}"


def norm_of(attack: Minimum, norm: str) -> str:
    """The norm in which an attack measures distances: its own, or the norm of the evaluation."""
    return "l2" if attack.kind == "cwl2" else norm


def smallest_perturbations(
    runner: Runner, attack: Minimum, constants: CarliniWagner, correct: Tensor
) -> tuple[Outcome, Tensor]:
    """Search the smallest perturbation of each image that is classified correctly.

    Args:
        runner: the model and the data.
        attack: the attack.
        constants: settings of the attack of Carlini and Wagner.
        correct: [N] bool, the images to attack.

    Returns:
        Which images were not broken at any distance, and the distances [N] float32 on the CPU: 0 for the images
        that were not attacked, infinite for those that were not broken.

    Raises:
        RuntimeError: when an adversarial image is not admissible, which is a fault of this package.
    """
    start, norm = time.perf_counter(), norm_of(attack, runner.norm)
    audit = Audit(math.inf, norm, runner.samples.bounds)
    search = _carlini_wagner if attack.kind == "cwl2" else _by_bisection
    distances, attacked = (
        torch.zeros(len(correct), dtype=torch.float32, device="cpu"),
        correct.nonzero().flatten(),
    )
    find = search(runner, attack, constants, audit)
    key = file_key(attack.name, attack, constants, runner.norm)
    distances[attacked] = runner.work.collect(
        attack.name,
        key,
        attacked,
        runner.batch_size,
        lambda indices: find(*runner.samples.take(indices, runner.device), indices),
        audit=audit,
    )
    if problems := audit.problems():
        raise RuntimeError(f"{attack.name} returned inadmissible images: {'; '.join(problems)}")
    outcome = Outcome(
        distances.isinf(),
        (),
        time.perf_counter() - start,
        nan_points=audit.found.nan_points,
        nan_gradients=audit.found.nan_gradients,
    )
    return outcome, distances


def _carlini_wagner(
    runner: Runner, attack: Minimum, constants: CarliniWagner, audit: Audit
) -> Search:
    method = CWL2(
        runner.source,
        constants.first_c(attack),
        steps=attack.steps,
        lr=constants.lr,
        search_steps=attack.search_steps,
        bounds=runner.samples.bounds,
        engine="eager",
    )
    seed = derive_seed(runner.seed, f"evaluate/{attack.name}")

    def find(x: Tensor, y: Tensor, indices: Tensor) -> Tensor:
        adv = method(x, y, seed=seed, sample_ids=indices.to(x.device))
        audit.count_nan(method.last.nan_points, method.last.nan_gradients)
        adv = admissible_or_clean(x, adv, audit)
        return _distances(x, adv, "l2").where(predict(runner.model, adv) != y, torch.inf)

    return find


def _by_bisection(
    runner: Runner, attack: Minimum, constants: CarliniWagner, audit: Audit
) -> Search:
    x, _ = runner.samples.take(torch.tensor([0], device="cpu"), runner.device)
    low, high = runner.samples.bounds
    largest = largest_radius((low, high), runner.norm, x.numel())
    common: dict[str, Any] = dict(
        norm=runner.norm, bounds=(low, high), precision="fp32", engine="eager"
    )
    method = (
        FGSM(runner.source, largest, **common)
        if attack.kind == "fgsm"
        else PGD(runner.source, largest, largest / 4, attack.steps, **common)
    )
    seed = derive_seed(runner.seed, f"evaluate/{attack.name}")

    def find(x: Tensor, y: Tensor, indices: Tensor) -> Tensor:
        ids = indices.to(x.device)
        radii = smallest_radii(
            *(method, x, y, largest), seed=seed, sample_ids=ids, judge=runner.model, audit=audit
        )
        rows = radii.isfinite().nonzero().flatten()
        if len(rows):
            adv = method(x[rows], y[rows], seed=seed, sample_ids=ids[rows], eps=radii[rows])
            audit.check(x[rows], adv)
            reached = _distances(x[rows], adv, runner.norm)
            slack = tolerance(runner.norm, x[0].numel(), runner.samples.bounds)
            if bool((reached > radii[rows] + slack).any()):
                raise RuntimeError(f"{attack.name} returned images outside their balls")
        return radii

    return find


def smallest_radii(
    method: FGSM | PGD,
    x: Tensor,
    y: Tensor,
    largest: float,
    *,
    seed: int,
    sample_ids: Tensor,
    judge: Model,
    audit: Audit | None = None,
) -> Tensor:
    """The smallest radius at which an attack breaks each image, found by bisection.

    Args:
        method: the attack.
        x: images [B, ...].
        y: labels [B].
        largest: the largest radius to try.
        seed: seed of the attack.
        sample_ids: [B], which random numbers each image gets.
        judge: the model that decides about success.
        audit: counts the elements of gradients that were NaN or infinite.

    Returns:
        [B] float32: 0 for images that need no attack, infinite for images that no radius breaks.

    Raises:
        RuntimeError: when the logits of the judge are not finite.
    """
    radii = torch.full((len(x),), torch.inf, device=x.device)
    # An attack can fail at a large radius and succeed at a small one. Therefore small radii are tried first.
    for halvings in range(_HALVINGS, -1, -1):
        rows = radii.isinf().nonzero().flatten()
        if len(rows) == 0:
            break
        search = Bisection(
            method, partial(logits_of, judge), x[rows], y[rows], seed, sample_ids[rows]
        )
        radii[rows] = search.radii(largest / 2**halvings, _BISECTIONS)
        if audit is not None:
            audit.count_nan(search.nan_points, search.nan_gradients)
    return radii


def _distances(x: Tensor, adv: Tensor, norm: str) -> Tensor:
    return torch.linalg.vector_norm((adv - x).flatten(1), ord=NORM_ORDERS[norm], dim=1)
