"""The command `fastadv eval`. The parameters are the options; the docstring is their help."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch

from fastadv.commands.documents import as_json
from fastadv.commands.images import Images, Reading, images_named, images_of_run
from fastadv.commands.judged import JudgedModel, model_of_file, model_of_run
from fastadv.commands.result_keeper import ResultKeeper, unfinished_work
from fastadv.commands.sanity import find_masking
from fastadv.commands.surrogates import digest_name, model_by_word
from fastadv.commands.threat import radii_of, sentence_about_radius, threat_of
from fastadv.commands.training import check_checkpoint
from fastadv.data.datasets import dataset_names
from fastadv.digest import digest_of
from fastadv.evaluation import Report, Subject, Surrogate, evaluate
from fastadv.evaluation.attack_list import check_passes, expand_bundles, parse_attacks
from fastadv.evaluation.cost import multiply_adds
from fastadv.evaluation.minimum import CarliniWagner
from fastadv.evaluation.report import library_versions
from fastadv.evaluation.samples import Samples, as_samples, radius_or_default
from fastadv.evaluation.sanity_file import SanityResult, sanity_entry, sanity_file_of
from fastadv.evaluation.unused_options import check_options_used
from fastadv.files import file_key
from fastadv.interruption import stopped_by_signals
from fastadv.ops.values import check_bounds
from fastadv.ranks import Ranks, is_first, joined_ranks, own_device
from fastadv.trainers.checkpoint import LATEST, find_checkpoint
from fastadv.trainers.hardware import choose_device
from fastadv.trainers.number import Number
from fastadv.trainers.run_directory import Description, RunDirectory
from fastadv.trainers.weights import ROBUST

DEFAULT_ATTACKS = ("clean", "fgsm", "pgd-20", "autoattack")
# Seconds that a process waits for slower ones, as shares differ. torchrun notices a process that has ended.
_TIMEOUT = 7 * 24 * 3600.0
_AFTER_A_LOSS = "The same command goes on from the work that was kept"
_UNFINISHED = "unfinished"  # folder of the finished work of an interrupted evaluation


def run_evaluation(
    run: str | None = None,
    attacks: Sequence[str] = DEFAULT_ATTACKS,
    *,
    checkpoint: str = LATEST,
    network: str = ROBUST,
    extractors: str | None = None,
    model: str | None = None,
    weights: str | None = None,
    normalise: Sequence[str] | None = None,
    data: str | None = None,
    root: str | None = None,
    resize: int | None = None,
    crop: int | None = None,
    interpolation: Literal["bilinear", "bicubic"] | None = None,
    workers: int | None = None,
    eps: Number | list[Number] | None = None,
    norm: Literal["linf", "l2", "l1"] | None = None,
    bounds: Sequence[float] = (0.0, 1.0),
    alpha: Number | None = None,
    batch_size: int = 256,
    max_examples: int | None = None,
    worst_case: bool = False,
    engine: Literal["auto", "fp32", "reference"] = "auto",
    surrogate: str | None = None,
    surrogate_model: str | None = None,
    eot: int = 1,
    cw_c: Number | None = None,
    cw_lr: Number = 0.01,
    sanity: bool = False,
    device: str | None = None,
    seed: int = 0,
    out: str | None = None,
    quiet: bool = False,
    keep_images: int = 16,
    json: bool = False,
    command: str = "",
) -> str:
    """The evaluation.

    Args:
        run: run directory; None if a model is given with weights.
        attacks: the attacks to run, in this order; quick, standard and strong stand for several.
        checkpoint: which checkpoint of the run to judge: latest, best, or a name such as step_000391.
        network: which network of the run to judge: model, the robust one, or natural, the one of clean images that
            act and lbgat train beside it. Its results are added to natural.eval.json in the run directory.
        extractors: judge a part of a stack of afs: the numbers of its extractors, counted from 1, with commas
            between them, such as 1,3,6. They keep their part of the merger that was trained for all. The results
            are added to a file of their own in the run directory.
        model: the network: a name such as resnet18, timm:NAME, or module:function, whose code then runs. With a
            run, give it only where the network of the run is a function of your own.
        weights: file with the state dict of the model, in any of the usual wrappings; not with a run. Leave it out
            where the module:function of the model returns a trained model.
        normalise: with weights, the mean and the standard deviation by which the inputs are normalised, each one
            number or one per channel with commas between them. Leave it out where the model takes images in 0..1,
            or where the file of weights says how it normalises.
        data: digits, cifar10 or cifar100, of which the test images are used; a .npz file with the arrays image
            (uint8, N x H x W x C) and label; folder:PATH, with one folder of pictures per class in PATH; or
            hf:NAME or hf:NAME:SPLIT, which Hugging Face's datasets reads. By default the data set of the run.
        root: folder that holds the files of cifar10 or cifar100; by default the folder of the run.
        resize: with folder: or hf: data, the number of pixels that the shorter side of each picture is resized to;
            by default pictures are not resized.
        crop: with folder: or hf: data, the number of pixels of each side of the square that is cut out of the
            middle; by default nothing is cut off.
        interpolation: with resize, how pixels are interpolated: bilinear (the default) or bicubic.
        workers: with folder: or hf: data, the number of processes that decode pictures; by default one per core,
            at most 8.
        eps: radius of the ball, such as 8/255, in the units of the images; or several radii, and every attack is
            run at each of them. By default 8/255 in linf, whatever the run was trained with, and in l2
            the radius of a run that was trained in l2. Otherwise it must be given with norm l2 or l1, and with
            other bounds than 0 1.
        norm: norm of the ball. By default the norm in which the run was trained; linf without a run.
        bounds: smallest and largest value of an image as the model takes it, to which the data are scaled; eps is
            in these units.
        alpha: step size of PGD, C&W and MIM; by default eps / 4.
        batch_size: images per pass; AutoAttack's figures can depend on it slightly.
        max_examples: use only this many test images: the first ones, or evenly spread ones where the images lie
            class by class. By default all are used.
        worst_case: give each attack only the images that the attacks before it have left, so that the last row is
            the worst case over all attacks.
        engine: how AutoAttack searches. auto: on the attack engine, in bfloat16 where this is faster, and every
            adversarial image is confirmed in float32. fp32: in float32 throughout. reference: by pyautoattack.
        surrogate: another model, on which the adversarial images are made (black-box transfer): a run directory, a
            file of weights, or module:function, which returns a trained model.
        surrogate_model: the network of a surrogate that is a file of weights; model takes the same names.
        eot: number of passes through the network for each gradient. The attack follows the mean of their gradients
            (expectation over transformations). It is meant for models that draw random numbers.
        cw_c: the constant c of cwl2-K, by default 1; of cwl2-K-S the first of the S values, by default .001.
        cw_lr: learning rate of cwl2-K and cwl2-K-S.
        sanity: after the attacks, look for signs of gradient masking on the first 200 images.
            The findings are printed, and kept beside the results in a file whose name ends in .sanity.json.
        device: device to run on, e.g. cpu or cuda:0; by default a GPU if there is one.
        seed: seed of all random numbers.
        out: file (.json) to which the results are added. By default this is eval.json in the run directory,
            WEIGHTS.eval.json beside a file of weights, or, for a function that returns a trained model, eval.json
            in the current folder.
        quiet: show no progress.
        keep_images: number of adversarial images of each attack to keep, in the folder worst beside the results.
            The model is most sure of the wrong classes of the images that are kept. 0 keeps no image.
        json: print the results as one JSON document in place of the table.
        command: the command line, for the record.

    Returns:
        The table, or JSON. Each result was added to the file as soon as its attack ended.

    Raises:
        UnsavedResultsError: if results could not be written; the error holds the table.
    """
    where = own_device(choose_device(device))
    recorded = _recorded(run, checkpoint, network, extractors, weights, normalise)
    limits = check_bounds(tuple(bounds))
    given, (norm, eps) = eps, threat_of(recorded, norm, eps, limits)
    radii = radii_of(radius_or_default(eps, norm, limits))
    attacks = checked_attacks(
        attacks,
        radii[0],
        alpha=alpha,
        eot=eot,
        engine=engine,
        worst_case=worst_case,
        cw_c=cw_c,
        cw_lr=cw_lr,
        surrogate=surrogate,
        sanity=sanity,
    )
    reading = Reading(resize, crop, interpolation, workers)
    if run is None:
        judged, images = _given_model(checkpoint, model, weights, normalise, data, root, reading)
    else:
        images = images_of_run(RunDirectory(run), data, root, reading)
        judged = model_of_run(run, checkpoint, model, network, extractors)
    judged.model.to(where)
    samples = as_samples(images, limits, max_examples)
    subject = _subject(judged, images, samples)
    other, origin = _surrogate(surrogate, surrogate_model, images, subject.weights)
    file = judged.results if out is None else Path(out)
    keeper = ResultKeeper(file, subject, command, Report.to_json if json else Report.table)
    if not quiet and is_first():
        keeper.warn()
        judged.warn()
    facts = (
        *(attacks, alpha, batch_size, seed, engine, worst_case, origin, eot, cw_c, cw_lr),
        *(*limits, judged.network, sorted(library_versions().items())),
    )
    begun = _folder_of_unfinished(judged, subject, file, norm, radii, facts)
    common: dict[str, Any] = {
        **{"norm": norm, "bounds": limits, "max_examples": max_examples, "device": where},
        **{"batch_size": batch_size, "seed": seed, "progress": not quiet},
        **{"surrogate": other, "eot": eot},
    }
    with _joined_work(where, keeper, begun) as (ranks, state):
        report = evaluate(
            judged.model,
            samples,
            tuple(attacks),
            eps=radii,
            alpha=alpha,
            worst_case=worst_case,
            engine=engine,
            state_dir=state,
            on_row=keeper.add if ranks.first else None,
            expected=judged.clean,
            cw_c=cw_c,
            cw_lr=cw_lr,
            keep_images=keep_images,
            sharded=ranks.world_size > 1,
            **common,
        )
        checked = None
        if sanity and ranks.first:
            place = sanity_file_of(file)
            checked = find_masking(judged.model, images, subject, place, eps=radii[-1], **common)
        text = report.table() + sentence_about_radius(given, radii[0], norm, report, recorded)
        text += "" if checked is None else f"\n{checked.text()}"
        if json:
            text = as_json(_document(report, subject, file, checked))
        ranks.wait()
        if ranks.first:
            keeper.close(text)
    return text


@contextmanager
def _joined_work(
    where: torch.device, keeper: ResultKeeper, begun: Path
) -> Iterator[tuple[Ranks, Path | None]]:
    """Let the processes of an evaluation work together, and signals end it; keep its results and finished work.

    Args:
        where: the device of this process.
        keeper: keeps the results.
        begun: the folder of the finished work.

    Yields:
        The processes, and the folder of the finished work; None in its place if it cannot be written.
    """
    with ExitStack() as held:
        ranks = held.enter_context(joined_ranks(where, _TIMEOUT, _AFTER_A_LOSS))
        state: Path | None = begun
        if ranks.first:
            held.enter_context(keeper)
            state = held.enter_context(unfinished_work(begun))
        # All ranks keep their finished work, or no rank does.
        state = ranks.gather_objects(state)[0]
        later = "; the same command goes on where it was" if state is not None else ""
        held.enter_context(stopped_by_signals(f"stopped{later}"))
        yield ranks, state


def _subject(judged: JudgedModel, images: Images, samples: Samples) -> Subject:
    """The judged model and its images, as the results record them."""
    try:
        # Counted with tensors that have shapes and no values. A user's network may fail on these in any way.
        cost = multiply_adds(judged.model, samples.source.shape)
    except Exception:
        cost = 0
    weights = digest_of(judged.model.state_dict())
    return judged.subject(weights, images.name, samples.fingerprint(), cost)


def _folder_of_unfinished(
    judged: JudgedModel,
    subject: Subject,
    file: Path,
    norm: str,
    radii: Sequence[float],
    facts: Sequence[object],
) -> Path:
    """The folder from which an interrupted evaluation goes on when the same command is given again.

    Its name has all facts on which the figures depend. It lies beside the results, ``file``. If it was begun
    beside the model's default file of results, it is found there.
    """
    radius = "+".join(f"{radius:.6g}" for radius in radii)
    name = f"{judged.checkpoint or judged.name}-{subject.weights[:8]}-{subject.images[:8]}"
    name = file_key(f"{name}-{norm}-{radius}", *facts)
    folders = [beside.parent / _UNFINISHED / name for beside in (judged.results, file)]
    return next((folder for folder in folders if folder.exists()), folders[-1])


def _document(
    report: Report, subject: Subject, file: Path, checked: SanityResult | None
) -> dict[str, Any]:
    """The results of one evaluation as JSON types."""
    found = None if checked is None else sanity_entry(checked)
    return {**report.to_dict(), "subject": asdict(subject), "file": str(file), "sanity": found}


def _surrogate(
    word: str | None, network: str | None, images: Images, weights: str
) -> tuple[Surrogate | None, str]:
    """The model on which adversarial images are made, and the first digits of its weights' hash.

    Without a surrogate these are None and an empty string.
    """
    if word is None:
        if network is not None:
            raise ValueError(f"surrogate_model must come with surrogate, got {network!r}")
        return None, ""
    found = model_by_word(word, network, images, "surrogate", "surrogate_model")
    digest, name = digest_name(found)
    if digest == weights:
        raise ValueError(
            f"surrogate must be another model than the judged one, got {word!r} with the same weights"
        )
    return Surrogate(found.model, name), digest[:8]


def _given_model(
    checkpoint: str,
    model: str | None,
    weights: str | None,
    normalise: Sequence[str] | None,
    data: str | None,
    root: str | None,
    reading: Reading,
) -> tuple[JudgedModel, Images]:
    """The model and the images of an evaluation without a run."""
    if model is None:
        raise ValueError(
            "run must be given, or model: fastadv eval RUN judges a run, and fastadv eval --model NAME --weights "
            "FILE --data DATA anybody's network"
        )
    if checkpoint != LATEST:
        raise ValueError(f"checkpoint must come with a run, got {checkpoint!r}")
    if data is None:
        raise ValueError(
            f"data must be given without a run: {', '.join(dataset_names())}, a .npz file, folder:PATH or hf:NAME"
        )
    images = images_named(data, root, reading)
    return model_of_file(model, weights, normalise, images), images


def _recorded(
    run: str | None,
    checkpoint: str,
    network: str,
    extractors: str | None,
    weights: str | None,
    normalise: Sequence[str] | None,
) -> Description | None:
    """The description that a run has recorded; None without a run.

    Raises:
        FileNotFoundError: if there is no such run.
        ValueError: if there is no such checkpoint, or if an option has no effect with a run, or without one.
    """
    if run is None:
        if network != ROBUST:
            raise ValueError(f"network must come with a run, got {network!r}")
        if extractors is not None:
            raise ValueError(f"extractors must come with a run, got {extractors!r}")
        return None
    for option, value in (("weights", weights), ("normalise", normalise)):
        if value is not None:
            raise ValueError(f"{option} must be left out with a run, got {value!r}")
    directory = RunDirectory(run)
    check_checkpoint(directory, checkpoint)
    find_checkpoint(directory.path, checkpoint)
    return directory.read()


def checked_attacks(
    attacks: Sequence[str],
    eps: float,
    *,
    alpha: float | None,
    eot: int,
    engine: str,
    worst_case: bool,
    cw_c: float | None,
    cw_lr: float,
    surrogate: str | None,
    sanity: bool,
) -> list[str]:
    """The names of all attacks; unknown names, and options that no attack takes, are refused before loading."""
    names = [str(name) for name in expand_bundles(attacks)]
    parsed = parse_attacks(list(names), eps, alpha)
    check_passes(parsed, eot)
    # The checks for masking make attacks of their own, with the same surrogate and passes.
    of_attacks: dict[str, Any] = {} if sanity else {"surrogate": surrogate, "eot": eot}
    constants = CarliniWagner(cw_c, cw_lr)
    check_options_used(
        parsed, engine=engine, worst_case=worst_case, constants=constants, **of_attacks
    )
    return names
