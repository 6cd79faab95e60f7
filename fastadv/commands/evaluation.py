"""What `fastadv eval` does. The parameters are the options, the docstring their help."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Literal

from fastadv.commands.judged import (
    JudgedModel,
    images_named,
    images_of_run,
    model_of_file,
    model_of_run,
)
from fastadv.commands.result_keeper import ResultKeeper, autoattack_state
from fastadv.commands.training import check_checkpoint
from fastadv.data import ImageData
from fastadv.data.datasets import dataset_names
from fastadv.evaluation import Report, Subject, evaluate
from fastadv.evaluation.attack_list import (
    AUTOATTACK,
    CLEAN,
    check_ensemble_asked_for,
    parse_attacks,
)
from fastadv.evaluation.comparison import radius_text
from fastadv.evaluation.report import format_eps
from fastadv.interruption import stopped_by_signals
from fastadv.trainers.checkpoint import LATEST, find_checkpoint
from fastadv.trainers.hardware import choose_device
from fastadv.trainers.number import Number
from fastadv.trainers.run_directory import Description, RunDirectory, digest_of

EVAL_FILE = "eval.json"
DEFAULT_ATTACKS = ("clean", "fgsm", "pgd-20", "autoattack")
_DEFAULT_EPS = 8 / 255


def run_evaluation(
    run: str | None = None,
    attacks: Sequence[str] = DEFAULT_ATTACKS,
    *,
    checkpoint: str = LATEST,
    model: str | None = None,
    weights: str | None = None,
    normalise: Sequence[str] | None = None,
    data: str | None = None,
    root: str | None = None,
    eps: Number | None = None,
    norm: Literal["linf", "l2", "l1"] = "linf",
    alpha: Number | None = None,
    batch_size: int = 256,
    max_examples: int | None = None,
    worst_case: bool = False,
    engine: Literal["auto", "fp32", "reference"] = "auto",
    device: str | None = None,
    seed: int = 0,
    out: str | None = None,
    quiet: bool = False,
) -> str:
    """The evaluation.

    Args:
        run: run directory; None where a model is given with weights.
        attacks: what to run, in this order.
        checkpoint: latest, best, or a name such as step_000391, of the run.
        model: the network, e.g. resnet18, timm:NAME or module:function, whose code then runs. With a run it is
            only to be given where its network is a function of your own.
        weights: without a run, a file with the state dict of the model, in any of the usual wrappings. A
            module:function may return a trained model itself.
        normalise: with weights, mean and standard deviation of the inputs, each one number or one per channel with
            commas between them, unless the model takes images in 0..1 or the file says how.
        data: digits, cifar10, cifar100, or a .npz file with the arrays image (uint8, N x H x W x C) and label. By
            default the data set of the run, whose test images are used.
        root: folder of the data set's files; by default that of the run.
        eps: radius of the ball; by default 8/255, whatever the run was trained with. It must be given with
            another norm than linf.
        norm: norm of the ball.
        alpha: step size of PGD, C&W and MIM; by default eps / 4.
        batch_size: images per pass; figures of the reference's attacks in AutoAttack depend on it slightly.
        max_examples: use only the first so many test images.
        worst_case: attack only the images that the attacks before have left; the last row is the worst case.
        engine: how AutoAttack searches: auto, on the attack engine, in bfloat16 where that is faster, with every
            adversarial image confirmed in float32; fp32, in float32 throughout; reference, by pyautoattack.
        device: where to run; by default a GPU if there is one.
        seed: of everything random.
        out: file (.json) to add the results to, in place of eval.json in the run directory, or of
            WEIGHTS.eval.json beside a file of weights. A function that returns a trained model has no folder; its
            results go to eval.json in the current one.
        quiet: show no progress.

    Returns:
        The table. Its results have been added to the file, each as soon as its attack ended.

    Raises:
        UnsavedResultsError: when they could not be written; it holds the table.
    """
    where = choose_device(device)
    radius = _radius(eps, norm)
    _check_attacks(attacks, radius, alpha, engine)
    recorded: Description | None = None
    if run is None:
        judged, images = _given_model(checkpoint, model, weights, normalise, data, root)
    else:
        for option, value in (("weights", weights), ("normalise", normalise)):
            if value is not None:
                raise ValueError(f"{option} must be left out with a run, got {value!r}")
        directory = RunDirectory(run)
        check_checkpoint(directory, checkpoint)
        find_checkpoint(directory.path, checkpoint)  # a run that is not there is told as such
        recorded = directory.read()
        images = images_of_run(directory, data, root)
        judged = model_of_run(run, checkpoint, model, EVAL_FILE)
    network = judged.model.to(where)
    subject = Subject(
        run=judged.name,
        method=judged.method,
        network=judged.network,
        checkpoint=judged.checkpoint,
        weights=digest_of(network.state_dict()),
        data=images.name,
        images=digest_of(
            {"images": images.images[:max_examples], "labels": images.labels[:max_examples]}
        ),
    )
    keeper = ResultKeeper(judged.results if out is None else Path(out), subject)
    if not quiet:
        keeper.warn()
        if judged.others:
            print(
                f"note: these weights also fit {', '.join(judged.others)}, which computes something else; judged "
                f"is {judged.network}",
                file=sys.stderr,
            )
    # An interrupted AutoAttack goes on from here when the same command is given again.
    name = f"{judged.checkpoint or judged.name}-{subject.weights[:8]}-{subject.images[:8]}-{norm}-{radius:.6g}"
    name = name.replace(":", "_") + f"-{batch_size}-{seed}" + "-left" * worst_case
    name += f"-{engine}" * (engine != "reference")
    folders = [file.parent / "autoattack" / name for file in (judged.results, keeper.file)]
    begun = next((folder for folder in folders if folder.exists()), folders[-1])
    with keeper, autoattack_state(begun, AUTOATTACK in attacks) as state, _stoppable(state):
        report = evaluate(
            network,
            images,
            tuple(attacks),
            eps=radius,
            norm=norm,
            alpha=alpha,
            batch_size=batch_size,
            max_examples=max_examples,
            worst_case=worst_case,
            engine=engine,
            device=where,
            seed=seed,
            progress=not quiet,
            state_dir=state,
            on_row=keeper.add,
            expected=judged.clean,
        )
        text = report.table() + _about_radius(eps, radius, norm, report, recorded)
        keeper.close(text)
    return text


def _given_model(
    checkpoint: str,
    model: str | None,
    weights: str | None,
    normalise: Sequence[str] | None,
    data: str | None,
    root: str | None,
) -> tuple[JudgedModel, ImageData]:
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
            f"data must be given without a run: {', '.join(dataset_names())}, or a .npz file"
        )
    images = images_named(data, root)
    return model_of_file(model, weights, normalise, images), images


def _stoppable(state: Path | None) -> AbstractContextManager[None]:
    """Let SIGTERM and Ctrl-C end an evaluation, and say how to go on."""
    later = "; the same command goes on where AutoAttack was" if state is not None else ""
    return stopped_by_signals(f"stopped{later}")


def _radius(eps: float | None, norm: str) -> float:
    if eps is None and norm != "linf":
        raise ValueError(
            f"eps must be given with norm {norm}; in linf alone it is 8/255 by default"
        )
    return _DEFAULT_EPS if eps is None else eps


def _check_attacks(attacks: Sequence[str], eps: float, alpha: float | None, engine: str) -> None:
    """Refuse unknown attacks, and options that none of them takes, before anything is loaded."""
    parsed = parse_attacks(list(attacks), eps, alpha)
    check_ensemble_asked_for(parsed, "engine", engine != "auto")


def _about_radius(
    eps: float | None, radius: float, norm: str, report: Report, recorded: Description | None
) -> str:
    """Say at which radius a model was judged where the command did not, and how to name another."""
    if all(row.name == CLEAN for row in report.rows):
        return "" if eps is None else "\neps was not used: there was no attack.\n"
    if eps is not None:
        return ""
    text = f"\nJudged {radius_text(norm, radius)}, the default."
    trained = None if recorded is None else recorded.recipe.get("eps")
    if trained is not None and trained != radius:
        there = format_eps(trained)
        text += (
            f" The run was trained {radius_text('linf', trained)}: --eps {there} judges it there."
        )
    else:
        text += " --eps names another radius."
    return text + "\n"
