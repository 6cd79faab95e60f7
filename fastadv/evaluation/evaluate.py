"""Accuracy of a model, clean and under attack, with an interval and a status for every number."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastadv.attacks.options import names_checked
from fastadv.evaluation.attack_list import (
    Attack,
    AttackChoice,
    Clean,
    Ensemble,
    Foreign,
    Gradient,
    check_ensemble_asked_for,
    check_fewest_classes,
    parse_attacks,
)
from fastadv.evaluation.autoattack import ENGINES, SearchEngine, autoattack
from fastadv.evaluation.autoattack_library import STANDARD, check_classes, import_library
from fastadv.evaluation.context import Model, evaluation_mode
from fastadv.evaluation.progress import Progress
from fastadv.evaluation.report import Report, Row, library_versions
from fastadv.evaluation.runner import Outcome, Runner
from fastadv.evaluation.samples import as_samples, check_batch_size, check_eps
from fastadv.ops.values import check_bool, check_choice, integer, limit, norm_name, share

_ENOUGH = 50  # clean images to tell guessing from knowing


@names_checked
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
    worst_case: bool = False,
    progress: bool = True,
    state_dir: str | os.PathLike[str] | None = None,
    on_row: Callable[[Report], None] | None = None,
    expected: float | None = None,
    engine: SearchEngine = "auto",
) -> Report:
    """Measure accuracy without and under attacks.

    The model is in eval mode, frozen, in float32 without TF32 while this runs, and as before afterwards.
    Images that are classified wrongly without an attack count as wrong under every attack and are not attacked.
    Whatever an attack returns is checked independently of it: inside the ball and the bounds, finite, and
    classified anew by the plain model.

    Args:
        model: a float32 module, or any callable from images [B, ...] to logits [B, classes].
        data: an ``ImageData``, or a pair (images [N, ...] uint8 or float within ``bounds``, labels [N]).
        attacks: names or pairs, one row of the report each:

            * ``"clean"``; ``"fgsm"``, one step of size eps from the image; ``"fgsm-rs"``, one of 1.25 eps from a
              random start (Wong et al. 2020);
            * ``"pgd-K"``, K steps of size alpha from a random start; ``"pgd-K-R"``, R of these, an image
              counting as wrong if one of them succeeds; ``"cw-K"``, ``"cw-K-R"``, the same on the margin of
              Carlini and Wagner; ``"mim-K"``, with momentum, from the image (Dong et al. 2018);
            * ``"apgd-ce"``, ``"apgd-dlr"`` (3 classes), ``"apgd-t"`` (4 classes; DLR towards 9 classes), Auto-PGD
              of 100 steps, or ``"apgd-ce-K"`` and so on of K;
            * ``"fab-t"``, ``"fab"``, the boundary attack of 100 steps towards each of 9 classes or towards the
              nearest of all; ``"square"``, random search of 5000 queries; each also with K steps or queries;
            * ``"autoattack"``, the standard version, on the images that are classified correctly;
            * ``(name, callable(model, x, y) -> adv)``.
        eps: radius of the ball in the norm, in the units of the images.
        alpha: step size of PGD, C&W and MIM; by default eps / 4. It must be left out where there is none of these.
        norm: ``"linf"``, ``"l2"`` or ``"l1"``, also as other libraries write it: "Linf", "L2", np.inf, 2.
        bounds: smallest and largest value of an image; uint8 images are scaled to them.
        batch_size: images per pass. This package's attacks do not depend on it beyond rounding; the reference's
            attacks in AutoAttack do.
        device: where to run; by default where the model is. The model is moved there and back.
        seed: seed of everything random. Runs with one seed on one machine agree.
        max_examples: use only the first so many images.
        worst_case: attack only the images that the attacks before in the list have left, so that each row counts
            the images that withstand it and all before it, and the last row is the worst case over all. An image
            is broken as soon as one attack breaks it, so this is exact, and cheaper than attacking all anew.
        progress: bars on a terminal, one line per attack elsewhere; false for silence.
        state_dir: a folder in which AutoAttack's state is kept batch by batch, so that the same call
            continues after an interruption. Without AutoAttack there is a warning.
        on_row: called after each attack with the report so far, so that a long evaluation can be kept as it grows.
        expected: the accuracy on clean images, 0..1, that is known of the model. Where another one is found, there
            is a warning before the first attack; so there is where the model seems to guess.
        engine: how AutoAttack searches, as in `fastadv.evaluation.autoattack`; to be left out without it, as the
            other attacks run in float32.

    Returns:
        A report with one row per attack. A row's status is ``"ok"``; ``"suspect"`` when AutoAttack warns that its
        number may be too high; ``"invalid"`` when AutoAttack or a callable returned inadmissible images, which
        then count as failed attempts.

    Raises:
        ValueError: for an unknown attack name or an argument out of range, or a model with fewer classes than the
            data.
        TypeError: for an argument of the wrong kind.
        ImportError: when AutoAttack is asked for and not installed.
        RuntimeError: when one of this package's attacks returned an inadmissible image, or the model's logits
            are not finite.
    """
    worst_case = check_bool("worst_case", worst_case)
    norm, seed = norm_name(norm), integer("seed", seed)
    alpha = None if alpha is None else limit("alpha", alpha)
    expected = None if expected is None else share("expected", expected)
    check_choice("engine", engine, ENGINES)
    if on_row is not None and not callable(on_row):
        raise TypeError(f"on_row must be a function of the report, got {on_row!r}")
    say = Progress(progress)
    chosen = parse_attacks(attacks, limit("eps", eps), alpha)
    asks_autoattack = check_ensemble_asked_for(chosen, "engine", engine != "auto")
    if state_dir is not None and not asks_autoattack:
        warnings.warn(
            "state_dir is not used: only autoattack keeps a state, and it is not among the attacks",
            stacklevel=3,
        )
    if asks_autoattack:
        import_library()  # missing, it should fail now and not after the other attacks
    samples = as_samples(data, bounds, max_examples)
    eps = check_eps(eps, norm, samples)
    with evaluation_mode(model, device) as where:
        runner = Runner(model, samples, norm, check_batch_size(batch_size), where, seed, say)
        classes = runner.check_labels()
        if asks_autoattack:
            check_classes(STANDARD, classes)
        check_fewest_classes(chosen, classes)
        clean = runner.clean()
        if not isinstance(chosen[0], Clean):
            say.line(f"right on {_percent(clean.robust)} of {len(samples)} clean images")
        _doubt_clean(clean.robust, classes, expected)
        left: Tensor | None = None
        report = Report(
            rows=(),
            model=type(model).__name__,
            data=samples.name,
            norm=norm,
            bounds=samples.bounds,
            batch_size=batch_size,
            device=str(where),
            versions=library_versions(),
            worst_case=worst_case,
        )
        for attack in chosen:
            row, robust = _row(runner, attack, eps, clean, left, state_dir, engine)
            if worst_case and not isinstance(attack, Clean):
                left = robust
            report = replace(report, rows=(*report.rows, row))
            say.line(row.line())
            if on_row is not None:
                on_row(report)
    return report


def _doubt_clean(correct: Tensor, classes: int, expected: float | None) -> None:
    """Warn where another network than the one that was meant seems to be judged."""
    n, right, chance = len(correct), _count(correct) / len(correct), 1 / classes
    doubt = None
    if n >= _ENOUGH and right <= chance + 3 * math.sqrt(chance * (1 - chance) / n):
        doubt = f"about as many as by guessing among {classes} classes"
    elif expected is not None:
        # Of a part of the images another share may be right, by chance.
        spread = 3 * math.sqrt(max(expected * (1 - expected), 1e-4) / n)
        if abs(right - expected) > 0.01 + spread:
            doubt = f"while {100 * expected:.2f} % are recorded for this model"
    if doubt is not None:
        warnings.warn(
            f"the model is right on {_percent(correct)} of the clean images, {doubt}; is it the network of these "
            "weights, are images normalised as in training, and are the classes numbered alike?",
            stacklevel=4,
        )


def _percent(flags: Tensor) -> str:
    return f"{100 * _count(flags) / len(flags):.2f} %"


def _row(
    runner: Runner,
    attack: Attack,
    eps: float,
    clean: Outcome,
    left: Tensor | None,
    state_dir: str | os.PathLike[str] | None,
    engine: SearchEngine,
) -> tuple[Row, Tensor]:
    """Run one attack on the images that are left, [N] bool, or all: its row, and those left after it."""
    if isinstance(attack, Ensemble):
        return _autoattack_row(runner, attack, eps, left, state_dir, engine)
    left = clean.robust if left is None else left
    if isinstance(attack, Clean):
        return _plain_row(runner, attack, clean, eps=0.0), clean.robust
    if isinstance(attack, Gradient):
        outcome = runner.gradient(attack, eps, left)
        return _plain_row(runner, attack, outcome, eps, attack.alpha, attack.steps), outcome.robust
    assert isinstance(attack, Foreign)
    outcome = runner.foreign(attack, eps, left)
    return _plain_row(runner, attack, outcome, eps), outcome.robust


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
    runner: Runner,
    attack: Ensemble,
    eps: float,
    left: Tensor | None,
    state_dir: str | os.PathLike[str] | None,
    engine: SearchEngine,
) -> tuple[Row, Tensor]:
    samples = runner.samples
    robust = torch.zeros(len(samples), dtype=torch.bool)
    indices = (torch.ones_like(robust) if left is None else left).nonzero().flatten()
    row = Row(attack.name, len(samples), 0, eps, runner.seed, 0.0)
    if len(indices) == 0:
        return row, robust
    result = autoattack(
        runner.model,
        samples.part(indices),
        eps=eps,
        norm=runner.norm,
        bounds=samples.bounds,
        batch_size=runner.batch_size,
        device=runner.device,
        seed=runner.seed,
        state_dir=state_dir,
        progress=runner.progress.enabled,
        engine=engine,
        sample_ids=indices,
    )
    robust[indices] = result.robust
    row = replace(
        row,
        correct=_count(robust),
        seconds=result.seconds,
        status=result.status,
        notes=result.notes,
        stages=result.stages,
        search=result.search,
    )
    return row, robust


def _count(flags: Tensor) -> int:
    return int(flags.sum())
