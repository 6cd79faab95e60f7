"""The function `evaluate`: accuracy of a model, clean and under attack, with an interval and a status for each."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastadv.attacks.options import names_checked
from fastadv.evaluation.attack_list import (
    AttackChoice,
    Clean,
    Minimum,
    check_passes,
    parse_attacks,
)
from fastadv.evaluation.autoattack import ENGINES, SearchEngine
from fastadv.evaluation.autoattack_library import import_library
from fastadv.evaluation.context import Model, all_in_evaluation_mode
from fastadv.evaluation.early_checks import early_findings
from fastadv.evaluation.finished_batches import FinishedBatches
from fastadv.evaluation.minimum import CarliniWagner
from fastadv.evaluation.model_doubts import doubts_about
from fastadv.evaluation.progress import ProgressDisplay
from fastadv.evaluation.report import Report, library_versions
from fastadv.evaluation.result_row import Row
from fastadv.evaluation.rows import Evaluator
from fastadv.evaluation.runner import Runner
from fastadv.evaluation.samples import (
    Samples,
    as_samples,
    check_batch_size,
    check_eps,
    radius_or_default,
    refusal,
)
from fastadv.evaluation.shared_work import SharedWork
from fastadv.evaluation.state_folder import Fingerprint, fingerprint, hash_model
from fastadv.evaluation.transfer import Surrogate, as_surrogate
from fastadv.evaluation.unused_options import check_options_used
from fastadv.evaluation.wording import format_eps
from fastadv.evaluation.worst import WorstKeeper
from fastadv.ops.values import (
    check_bool,
    check_choice,
    check_path,
    integer,
    limit,
    norm_name,
    share,
)
from fastadv.ranks import Ranks, group_of_caller


@names_checked
def evaluate(
    model: Model,
    data: Any,
    attacks: AttackChoice | Sequence[AttackChoice] = ("clean", "fgsm", "pgd-20", "autoattack"),
    *,
    eps: float | Sequence[float] | None = None,
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
    surrogate: Surrogate | Model | None = None,
    eot: int = 1,
    cw_c: float | None = None,
    cw_lr: float = 0.01,
    keep_images: int = 0,
    sharded: bool = False,
) -> Report:
    """Measure accuracy without and under attacks.

    The model is in eval mode, frozen, in float32 without TF32 while this runs, and as before afterwards.
    Images that are classified wrongly without an attack count as wrong under every attack and are not attacked.
    The images that an attack returns are checked independently of it: inside the ball and the bounds, finite, and
    classified again by the plain model.

    Args:
        model: a float32 module, or any callable from images [B, ...] to logits [B, classes].
        data: an ``ImageData``; a pair (images [N, ...] uint8 or float within ``bounds``, labels [N]); a map-style
            ``Dataset`` of pairs (image, label), whose images are read when they are attacked; or a ``DataLoader``,
            whose Dataset is then read in its own order by the loader's worker processes. See docs/evaluation.md.
        attacks: names, or pairs ``(name, callable(model, x, y) -> adv)``; one row of the report each. All names,
            with the attacks that they stand for, are in docs/evaluation.md and in
            `fastadv.evaluation.attack_list.NAMES`: ``"clean"``, ``"fgsm"``, ``"pgd-20"`` for 20 steps,
            ``"pgd-20-10"`` with 10 restarts, ``"autoattack"`` and others, and bundles such as ``"standard"``.
        eps: radius of the ball in the norm, in the units of the images; of several each attack is run at each. By
            default 8/255; to be given with another norm than linf or other bounds than (0, 1).
        alpha: step size of PGD, C&W and MIM; by default eps / 4. Without one of these attacks it is refused.
        norm: ``"linf"``, ``"l2"`` or ``"l1"``, also as other libraries write it: "Linf", "L2", np.inf, 2.
        bounds: smallest and largest value of an image; uint8 images are scaled to them.
        batch_size: images per pass. This package's attacks do not depend on it beyond rounding; the reference's
            attacks in AutoAttack do.
        device: where to run; by default where the model is. The model is moved there and back.
        seed: seed of everything random. Runs with one seed on one machine agree.
        max_examples: use only so many images: the first, or evenly spread ones of data that lie class by class: of
            tensors, or of a ``Dataset`` that lists its labels in ``targets`` or ``labels``.
        worst_case: attack only the images that the attacks before in the list have left, so that each row counts
            the images that withstand it and all before it, and the last row is the worst case over all. An image
            is broken as soon as one attack breaks it, so this is exact, and cheaper than attacking all images
            again. Each radius has a worst case of its own, and attacks without a ball belong to no worst case.
            Without an attack in a ball it is refused.
        progress: bars on a terminal, one line per attack elsewhere; false for silence.
        state_dir: a folder in which each attack's state is kept batch by batch, so that the same call continues
            after an interruption; a callable's is not kept. It belongs to one model, data set and choice of
            settings.
        on_row: called after each attack with the report so far, so that a long evaluation can be kept as it grows.
        expected: the accuracy on clean images, 0..1, that is known of the model. Where another one is found, there
            is a warning before the first attack; so there is where the model seems to guess.
        engine: how AutoAttack searches, as in `fastadv.evaluation.autoattack`; to be left out without it, as the
            other attacks run in float32.
        surrogate: another model, on which the adversarial images are made (black-box transfer). The judged model
            then only selects the images to attack, which it classifies correctly, and decides whether they are
            broken.
        eot: passes through the network for each gradient, which is their mean (expectation over transformations),
            for models that draw random numbers: for FGSM, PGD, C&W in a ball, MIM and Auto-PGD.
        cw_c: c of ``"cwl2-K"``; by default 1, and .001 to begin with where several are tried. It is refused
            without this attack.
        cw_lr: learning rate of ``"cwl2-K"``; likewise.
        keep_images: how many adversarial images each attack's row keeps as ``row.worst``: the images of whose
            wrong class the model is most sure.
        sharded: whether the processes of torch's default process group share the images. All of them then call
            this with the same arguments, and get the same report. The figures equal the figures of one process.

    Returns:
        A report with one row per attack and radius. A row's status is ``"ok"``; ``"suspect"`` where its number may
        be too high: AutoAttack warns, all steps of an attack together are far shorter than the radius, the model
        draws random numbers and ``eot`` is 1, gradients are zero or not finite, the surrogate guesses, or a
        network that the model holds unregistered is in train mode, or the file of its weights hinted at a
        normalisation that the model does not have; ``"invalid"`` when AutoAttack or a callable
        returned inadmissible images, which then count as failed attempts.

    Raises:
        ValueError: for an unknown attack name or an argument out of range, or a model with fewer classes than the
            data.
        TypeError: for an argument of the wrong kind.
        ImportError: when AutoAttack is asked for and not installed.
        RuntimeError: when one of this package's attacks returned an inadmissible image, or the model's logits
            are not finite.
    """
    worst_case = check_bool("worst_case", worst_case)
    if isinstance(
        data, Tensor
    ):  # as in evaluate(model, x, y), where y would be named as the attacks
        raise refusal(data)
    norm, seed = norm_name(norm), integer("seed", seed)
    alpha = None if alpha is None else limit("alpha", alpha)
    expected = None if expected is None else share("expected", expected)
    check_choice("engine", engine, ENGINES)
    _check_reporting(on_row, progress, state_dir)
    radii = _radii(radius_or_default(eps, norm, bounds))
    chosen = parse_attacks(attacks, radii[0], alpha)
    eot = integer("eot", eot, at_least=1)
    constants, other = CarliniWagner(cw_c, cw_lr), as_surrogate(surrogate)
    sharded = check_bool("sharded", sharded)
    check_passes(chosen, eot)
    check_options_used(chosen, engine=engine, worst_case=worst_case, constants=constants)
    if engine == "reference":
        import_library()  # missing, it should fail now and not after the other attacks
    samples = as_samples(data, bounds, max_examples)
    radii = [check_eps(radius, norm, samples) for radius in radii]
    models = [model] if other is None else [model, other.model]
    made_on = "" if other is None else other.name
    doubts = doubts_about(model)
    if other is not None:
        doubts += doubts_about(other.model, "surrogate")
    with all_in_evaluation_mode(models, device) as where:
        call = {
            "attacks": [attack.name for attack in chosen],
            "eps": radii,
            "alpha": alpha,
            "batch_size": batch_size,
            "engine": engine,
            "worst_case": worst_case,
            "keep_images": keep_images,
            "constants": constants,
        }
        facts = _facts(norm, samples.bounds, seed, eot)
        ranks = group_of_caller(where) if sharded else Ranks()
        finished = _finished_batches(
            model, samples, other, call=call, facts=facts, state_dir=state_dir, ranks=ranks
        )
        say = ProgressDisplay(progress and ranks.first)
        runner = Runner(
            model,
            samples,
            norm,
            check_batch_size(batch_size),
            where,
            seed,
            SharedWork(say, ranks, finished),
            None if other is None else other.model,
            eot,
            WorstKeeper(integer("keep_images", keep_images, at_least=0)),
        )
        early = early_findings(runner, chosen, expected, made_on, doubts)
        evaluator = Evaluator(runner, early, radii, constants, engine, state_dir, made_on)
        report = _report_without_rows(runner, worst_case)
        for row, where_in_eps in _rows_of(evaluator, attacks, alpha, worst_case):
            report = replace(report, rows=(*report.rows, row))
            say.line(where_in_eps + row.line())
            if on_row is not None:
                on_row(report)
    return report


def _check_reporting(on_row: object, progress: object, state_dir: object) -> None:
    """Require the kinds of the arguments that say how an evaluation is shown and kept."""
    if on_row is not None and not callable(on_row):
        raise TypeError(f"on_row must be a function of the report, got {on_row!r}")
    check_bool("progress", progress)
    if state_dir is not None:
        check_path("state_dir", state_dir)


def _finished_batches(
    model: Model,
    samples: Samples,
    other: Surrogate | None,
    *,
    call: dict[str, Any],
    facts: dict[str, Any],
    state_dir: str | os.PathLike[str] | None,
    ranks: Ranks,
) -> FinishedBatches | None:
    """The batches that are kept in ``state_dir``, once all processes are known to have called alike.

    Args:
        model: the judged model.
        samples: images and labels.
        other: the surrogate.
        call: the arguments that all processes must have given alike.
        facts: further such facts, which belong to the identity of the kept batches, too.
        state_dir: the folder; None keeps no batch.
        ranks: the processes.
    """
    identity = None
    if state_dir is not None:
        hashed = None if other is None else hash_model(other.model)
        identity = fingerprint(model, samples, {**facts, "surrogate": hashed})
    if ranks.world_size > 1:
        ranks.check_same({**call, **facts, **_hashes(model, samples, other, identity)})
    if state_dir is None or identity is None:
        return None
    return FinishedBatches(state_dir, identity)  # after the check of all processes


def _report_without_rows(runner: Runner, worst_case: bool) -> Report:
    """The report to which each attack adds its row."""
    return Report(
        rows=(),
        model=type(runner.model).__name__,
        data=runner.samples.name,
        norm=runner.norm,
        bounds=runner.samples.bounds,
        batch_size=runner.batch_size,
        device=str(runner.device),
        versions=library_versions(),
        worst_case=worst_case,
    )


def _rows_of(
    evaluator: Evaluator,
    attacks: AttackChoice | Sequence[AttackChoice],
    alpha: float | None,
    worst_case: bool,
) -> Iterator[tuple[Row, str]]:
    """Run the attacks at each radius, and yield each row with the radius in words where there are several."""
    for number, radius in enumerate(evaluator.radii):
        left: Tensor | None = None
        for attack in parse_attacks(attacks, radius, alpha):
            in_ball = not isinstance(attack, (Clean, Minimum))
            if number > 0 and not in_ball:
                continue  # it does not depend on the radius
            row, robust = evaluator.row(attack, radius, left)
            if worst_case and in_ball:
                left = robust
            several = len(evaluator.radii) > 1 and in_ball
            yield row, f"at {format_eps(radius)}: " if several else ""


def _facts(norm: str, bounds: tuple[float, float], seed: int, eot: int) -> dict[str, Any]:
    """The settings that every attack's result depends on, besides models, data and attack."""
    return {
        "norm": norm,
        "bounds": bounds,
        "seed": seed,
        "eot": eot,
        "versions": library_versions(),
    }


def _hashes(
    model: Model, samples: Samples, other: Surrogate | None, identity: Fingerprint | None
) -> dict[str, str | None]:
    """The hashes of models and data, which all processes must have; ``identity`` has some of them already."""
    return {
        "data": samples.fingerprint() if identity is None else identity.data,
        "model": _identity(model) if identity is None else identity.model,
        "surrogate": None if other is None else _identity(other.model),
        "state_dir": None if identity is None else "a folder",
    }


def _identity(model: Model) -> str:
    """The hash of a module. Other callables cannot be told apart."""
    return hash_model(model) if isinstance(model, nn.Module) else "a callable"


def _radii(eps: float | Sequence[float]) -> list[float]:
    """The radii of an evaluation, each once.

    Raises:
        ValueError: the list is empty, has a radius twice, or has a number that is no radius.
    """
    values = eps if isinstance(eps, (list, tuple)) else [eps]
    radii = [limit("eps", value) for value in values]
    if not radii or len(set(radii)) < len(radii):
        raise ValueError(f"eps must be one radius or several that differ, got {eps}")
    return radii
