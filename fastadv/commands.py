"""What the commands do. Their parameters are the options, their docstrings the help."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastadv.data import ImageData, load_npz
from fastadv.data.datasets import check_source, dataset_names
from fastadv.evaluation import (
    Report,
    Subject,
    TradeOffPoint,
    evaluate,
    load_results,
    plot_trade_off,
)
from fastadv.evaluation.attack_list import AUTOATTACK, CLEAN, parse_attacks
from fastadv.evaluation.comparison import Comparison, Judged, Line, distinct_names, radius_text
from fastadv.evaluation.report import format_eps
from fastadv.fields import check_fields
from fastadv.files import write_atomically
from fastadv.interruption import stopped_by_signals
from fastadv.judged import (
    JudgedModel,
    images_named,
    images_of_run,
    model_of_file,
    model_of_run,
)
from fastadv.ops.values import check_choice
from fastadv.result_keeper import ResultKeeper, autoattack_state
from fastadv.trainers import Afs, Recipe, Settings, TrainResult, train
from fastadv.trainers.checkpoint import (
    BEST,
    LATEST,
    checkpoints_in,
    find_checkpoint,
    load_checkpoint,
)
from fastadv.trainers.hardware import choose_device
from fastadv.trainers.number import Number
from fastadv.trainers.run_directory import Description, RunDirectory, digest_of
from fastadv.trainers.weights import check_no_code

EVAL_FILE = "eval.json"
DEFAULT_ATTACKS = ("clean", "fgsm", "pgd-20", "autoattack")
_DEFAULT_EPS = 8 / 255


@dataclass(frozen=True)
class Flags:
    """Switches of `fastadv train`.

    Attributes:
        resume: go on with the run that is in the run directory.
        overwrite: delete the run that is there, and start again.
        allow_changes: resume although the recipe, the data or the model is another.
        quiet: say nothing while training.
    """

    resume: bool = False
    overwrite: bool = False
    allow_changes: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        check_fields(self)


def run_training(
    method: str,
    recipe: Recipe,
    settings: Settings,
    flags: Flags,
    on_start: Callable[[Path], None],
    *,
    data: str,
    run: str,
    root: str | None = None,
    model: str | None = None,
    extra: str | None = None,
    teacher: Sequence[str] | None = None,
    teacher_model: Sequence[str] | None = None,
    device: str | None = None,
    from_checkpoint: str | None = None,
) -> TrainResult:
    """The run.

    Args:
        method: name of the method.
        recipe: its numbers.
        settings: how the run is kept and shown.
        flags: switches.
        on_start: called with the run directory when it is ready.
        data: data set: digits, cifar10 or cifar100.
        run: directory for everything the run leaves.
        root: folder of the data set's official files (not for digits).
        model: network, e.g. resnet18, wrn_34_10, timm:NAME, stack:6*wrn_28_10; by default small_cnn
            for digits and resnet18 otherwise, and for afs a stack of the networks of its extractors.
        extra: further images for training, such as synthetic ones: a .npz file with the arrays image
            (uint8, N x H x W x C) and label; see extra_fraction.
        teacher: trained models for methods that need them.
        teacher_model: networks of these, by name.
        device: where to train, e.g. cpu or cuda:1; by default a GPU if there is one.
        from_checkpoint: resume from this checkpoint, e.g. step_000391, instead of the latest.
    """
    check_source(data, root)
    resume = flags.resume or from_checkpoint is not None
    if flags.allow_changes and not resume:
        raise ValueError(
            "allow_changes must come with resume: a new run has nothing to differ from"
        )
    if from_checkpoint is not None and not RunDirectory(run).exists:
        raise ValueError(f"from_checkpoint {from_checkpoint!r}: there is no run in {run}")
    if from_checkpoint is not None:
        _check_checkpoint(RunDirectory(run), from_checkpoint)
    return train(
        method,
        recipe,
        data=data,
        root=root,
        model=model or _default_model(method, data, teacher or (), teacher_model or ()),
        run_dir=run,
        extra=None if extra is None else load_npz(extra),
        teacher=teacher,
        teacher_model=_one_for_all(teacher_model),
        resume=flags.resume if from_checkpoint is None else from_checkpoint,
        overwrite=flags.overwrite,
        allow_changes=flags.allow_changes,
        device=device,
        settings=settings,
        progress=not flags.quiet,
        on_start=on_start,
    )


def _check_checkpoint(directory: RunDirectory, name: str) -> None:
    """Check the name of a checkpoint, where there are any; `latest` and `best` need not be there."""
    there = [path.name for path in checkpoints_in(directory.checkpoints)]
    if there:
        check_choice("checkpoint", name, [LATEST, BEST, *there])


def _one_for_all(names: Sequence[str] | None) -> Sequence[str] | str | None:
    return names[0] if names is not None and len(names) == 1 else names


def _default_model(method: str, data: str, teachers: Sequence[str], named: Sequence[str]) -> str:
    if method == Afs.name and named:
        return "stack:" + "+".join(list(named) * (len(teachers) if len(named) == 1 else 1))
    if method == Afs.name and teachers:
        return "stack:" + "+".join(_model_name(path) for path in teachers)
    network = "small_cnn" if data == "digits" else "resnet18"
    return f"stack:6*{network}" if method == Afs.name else network


def _model_name(source: str) -> str:
    if Path(source).is_file():
        raise ValueError(f"model must be given with the state dict {source}, e.g. stack:2*resnet18")
    read = load_checkpoint(find_checkpoint(source), with_state=False)
    name = read.meta.get("model", {}).get("name")
    if name is None:
        raise ValueError(f"model must be given: {source} was trained with a model without a name")
    check_no_code(name, source)
    return str(name)


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
    _check_attacks(attacks, radius, alpha)
    recorded: Description | None = None
    if run is None:
        judged, images = _given_model(checkpoint, model, weights, normalise, data, root)
    else:
        for option, value in (("weights", weights), ("normalise", normalise)):
            if value is not None:
                raise ValueError(f"{option} must be left out with a run, got {value!r}")
        directory = RunDirectory(run)
        _check_checkpoint(directory, checkpoint)
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


def _check_attacks(attacks: Sequence[str], eps: float, alpha: float | None) -> None:
    """Refuse unknown attacks, and a step size that none of them takes, before anything is loaded."""
    parsed = parse_attacks(list(attacks), eps, alpha)
    if alpha is not None and parsed == parse_attacks(list(attacks), eps, alpha + 1):
        raise ValueError(
            "alpha must be left out: it is the step size of PGD, C&W and MIM, and the attacks are "
            f"{' '.join(attacks)}"
        )


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


def run_report(
    runs: Sequence[str],
    out: str | None = None,
    robust: str | None = None,
    eps: Number | None = None,
    norm: Literal["linf", "l2", "l1"] | None = None,
) -> str:
    """The report.

    Args:
        runs: run directories that `fastadv eval` has been through, or files that its --out has written.
        out: folder for report.md and trade_off.png; by default nothing is written.
        robust: with out, the attack on the plot's vertical axis; by default the last one that all runs have.
        eps: with out, the radius of the plot; by default the one that all runs have, or 8/255 of several.
        norm: with out, its norm, where all runs have several.

    Returns:
        The table as text. Each line is of one radius, and of one checkpoint, set of images and seed.
    """
    paths = list(dict.fromkeys(runs))
    judged = [_judged(path, name) for path, name in zip(paths, distinct_names(paths), strict=True)]
    comparison = Comparison(judged)
    cells = comparison.cells()
    if out is None:
        for name, value in (("robust", robust), ("eps", eps), ("norm", norm)):
            if value is not None:
                raise ValueError(
                    f"{name} must come with out, as it is about the plot, got {value!r}"
                )
        return _aligned(cells)
    points, robust_label = _trade_off(comparison, robust, eps, norm)
    write_atomically(Path(out) / "report.md", _markdown(cells))
    plot_trade_off(points, Path(out) / "trade_off.png", robust_label=robust_label)
    return _aligned(cells)


def _judged(path: str, name: str) -> Judged:
    """Read the results of a run directory, or of a file."""
    source = Path(path)
    file = source if source.is_file() else source / EVAL_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; run `fastadv eval {path}` first")
    results = load_results(file)
    if not results:
        raise ValueError(f"{file}: holds no results; run `fastadv eval` first")
    subject = results[-1].subject
    if file != source:
        recorded = RunDirectory(path).read()
        network = recorded.model.get("name") or recorded.model.get("class", "")
        subject = Subject(method=recorded.method, network=str(network))
    return Judged(name, subject.method or "-", subject.network or "-", tuple(results))


def _trade_off(
    comparison: Comparison, robust: str | None, eps: float | None, norm: str | None
) -> tuple[list[TradeOffPoint], str]:
    """The points of the plot, all at one radius, and the name of its vertical axis."""
    radius = comparison.radius(eps, norm)
    lines = comparison.at(radius)
    common = [t for t in comparison.attacks if all(_has(t, run, lines) for run in comparison.runs)]
    robust = robust or next((title for title in reversed(common) if title != CLEAN), None)
    if robust is None or not {CLEAN, robust} <= set(common):
        raise ValueError(
            f"robust must be an attack that all runs have beside 'clean' {radius_text(*radius)}, "
            f"got {robust!r}; they have {', '.join(common) or 'nothing'} in common"
        )
    points = [
        TradeOffPoint.from_rows(
            comparison.label(line), line.cells[CLEAN].row, line.cells[robust].row
        )
        for line in lines
        if CLEAN in line.cells and robust in line.cells
    ]
    return points, f"Accuracy under {robust} {radius_text(*radius)} (%)"


def _has(title: str, run: Judged, lines: Sequence[Line]) -> bool:
    return any(title in line.cells and CLEAN in line.cells for line in lines if line.run is run)


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    rows = (
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
    return "\n".join(rows)


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    header, *rest = ("| " + " | ".join(line) + " |" for line in lines)
    return "\n".join([header, "|" + " --- |" * len(lines[0]), *rest]) + "\n"
