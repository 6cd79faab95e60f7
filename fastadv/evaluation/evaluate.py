"""Accuracy of a model, clean and under attack, with an interval and a status for every number."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastadv.evaluation.attack_list import (
    Attack,
    AttackChoice,
    Clean,
    Ensemble,
    Foreign,
    Gradient,
    parse_attacks,
)
from fastadv.evaluation.autoattack import autoattack
from fastadv.evaluation.autoattack_library import STANDARD, check_classes, import_library
from fastadv.evaluation.context import Model, evaluation_mode
from fastadv.evaluation.progress import Progress
from fastadv.evaluation.report import Report, Row, library_versions
from fastadv.evaluation.runner import Outcome, Runner
from fastadv.evaluation.samples import as_samples, check_batch_size
from fastadv.evaluation.verify import NORM_ORDERS
from fastadv.ops.checks import check_choice, check_finite_at_least_zero


def evaluate(
    model: Model,
    data: Any,
    attacks: AttackChoice | Sequence[AttackChoice] = ("clean", "fgsm", "pgd-20", "autoattack"),
    *,
    eps: float = 8 / 255,
    alpha: float | None = None,
    norm: str = "linf",
    bounds: tuple[float, float] = (0.0, 1.0),
    batch_size: int = 256,
    device: torch.device | str | None = None,
    seed: int = 0,
    max_examples: int | None = None,
    progress: bool = True,
    state_dir: str | os.PathLike[str] | None = None,
) -> Report:
    """Measure accuracy without and under attacks.

    The model is in eval mode, frozen, in float32 without TF32 while this runs, and as before afterwards.
    Images that are classified wrongly without an attack count as wrong under every attack and are not attacked.
    Whatever an attack returns is checked independently of it: inside the ball and the bounds, finite, and
    classified anew by the plain model.

    Args:
        model: a float32 module, or any callable from images [B, ...] to logits [B, classes].
        data: an ``ImageData``, or a pair (images [N, ...] uint8 or float within ``bounds``, labels [N]).
        attacks: names or pairs, one row of the report each: ``"clean"``; ``"fgsm"``, one step of size eps without
            a random start; ``"pgd-K"``, K steps of size alpha from a random start; ``"autoattack"``, the
            standard version of the reference implementation; ``(name, callable(model, x, y) -> adv)``.
        eps: radius of the ball in the norm, in the units of the images.
        alpha: step size of PGD; by default eps / 4.
        norm: ``"linf"``, ``"l2"`` or ``"l1"``.
        bounds: smallest and largest value of an image; uint8 images are scaled to them.
        batch_size: images per pass. FGSM and PGD do not depend on it beyond rounding; AutoAttack does.
        device: where to run; by default where the model is. The model is moved there and back.
        seed: seed of everything random. Runs with one seed on one machine agree.
        max_examples: use only the first so many images.
        progress: bars on a terminal, one line per attack elsewhere; false for silence.
        state_dir: a folder in which AutoAttack's state is kept batch by batch, so that the same call
            continues after an interruption.

    Returns:
        A report with one row per attack. A row's status is ``"ok"``; ``"suspect"`` when AutoAttack warns that its
        number may be too high; ``"invalid"`` when AutoAttack or a callable returned inadmissible images, which
        then count as failed attempts.

    Raises:
        ValueError: for an unknown attack name or an argument out of range.
        TypeError: for data or a model of the wrong kind.
        ImportError: when AutoAttack is asked for and not installed.
        RuntimeError: when FGSM or PGD returned an inadmissible image, or the model's logits are not finite.
    """
    check_finite_at_least_zero("eps", eps)
    if alpha is not None:
        check_finite_at_least_zero("alpha", alpha)
    check_choice("norm", norm, tuple(NORM_ORDERS))
    chosen = parse_attacks(attacks, eps, alpha)
    asks_autoattack = any(isinstance(attack, Ensemble) for attack in chosen)
    if asks_autoattack:
        import_library()  # missing, it should fail now and not after the other attacks
    samples = as_samples(data, bounds, max_examples)
    say = Progress(progress)
    with evaluation_mode(model, device) as where:
        runner = Runner(model, samples, norm, check_batch_size(batch_size), where, seed, say)
        classes = runner.check_labels()
        if asks_autoattack:
            check_classes(STANDARD, classes)
        clean = runner.clean()
        rows = []
        for attack in chosen:
            rows.append(_row(runner, attack, eps, clean, state_dir))
            say.line(rows[-1].line())
    return Report(
        rows=tuple(rows),
        model=type(model).__name__,
        data=samples.name,
        norm=norm,
        bounds=samples.bounds,
        batch_size=batch_size,
        device=str(where),
        versions=library_versions(),
    )


def _row(
    runner: Runner,
    attack: Attack,
    eps: float,
    clean: Outcome,
    state_dir: str | os.PathLike[str] | None,
) -> Row:
    """Run one attack and put its figures into a row."""
    if isinstance(attack, Ensemble):
        return _autoattack_row(runner, attack, eps, state_dir)
    if isinstance(attack, Clean):
        return _plain_row(runner, attack, clean, eps=0.0)
    if isinstance(attack, Gradient):
        outcome = runner.gradient(attack, eps, clean.robust)
        return _plain_row(runner, attack, outcome, eps, attack.alpha, attack.steps)
    assert isinstance(attack, Foreign)
    return _plain_row(runner, attack, runner.foreign(attack, eps, clean.robust), eps)


def _plain_row(
    runner: Runner,
    attack: Attack,
    outcome: Outcome,
    eps: float,
    alpha: float | None = None,
    steps: int | None = None,
) -> Row:
    return Row(
        name=attack.name,
        n=len(runner.samples),
        correct=_count(outcome.robust),
        eps=eps,
        seed=runner.seed,
        seconds=outcome.seconds,
        alpha=alpha,
        steps=steps,
        status="invalid" if outcome.problems else "ok",
        notes=outcome.problems,
    )


def _autoattack_row(
    runner: Runner, attack: Ensemble, eps: float, state_dir: str | os.PathLike[str] | None
) -> Row:
    result = autoattack(
        runner.model,
        runner.samples,
        eps=eps,
        norm=runner.norm,
        bounds=runner.samples.bounds,
        batch_size=runner.batch_size,
        device=runner.device,
        seed=runner.seed,
        state_dir=state_dir,
        progress=runner.progress.enabled,
    )
    return Row(
        name=attack.name,
        n=len(runner.samples),
        correct=_count(result.robust),
        eps=eps,
        seed=runner.seed,
        seconds=result.seconds,
        status=result.status,
        notes=result.notes,
        stages=result.stages,
    )


def _count(flags: Tensor) -> int:
    return int(flags.sum())
