"""What the commands do. Their parameters are the options, their docstrings the help."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastadv.data import load_dataset, load_npz
from fastadv.evaluation import Report, evaluate
from fastadv.evaluation.report import format_eps
from fastadv.trainers import Afs, Recipe, Settings, TrainResult, load_model, train
from fastadv.trainers.checkpoint import LATEST, find_checkpoint, load_checkpoint
from fastadv.trainers.hardware import choose_device
from fastadv.trainers.number import Number
from fastadv.trainers.run_directory import RunDirectory
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
    if model is None and (flags.resume or from_checkpoint) and RunDirectory(run).exists:
        model = RunDirectory(run).read().model.get("name")
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
        resume=from_checkpoint or flags.resume,
        overwrite=flags.overwrite,
        allow_changes=flags.allow_changes,
        device=device,
        settings=settings,
        progress=not flags.quiet,
        on_start=on_start,
    )


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
    run: str,
    attacks: Sequence[str] = DEFAULT_ATTACKS,
    *,
    checkpoint: str = LATEST,
    data: str | None = None,
    root: str | None = None,
    eps: Number | None = None,
    alpha: Number | None = None,
    batch_size: int = 256,
    max_examples: int | None = None,
    worst_case: bool = False,
    device: str | None = None,
    seed: int = 0,
    quiet: bool = False,
) -> Report:
    """The evaluation.

    Args:
        run: run directory.
        attacks: what to run, in this order.
        checkpoint: latest, best, or a name such as step_000391.
        data: data set; by default the one of the run, whose test images are used.
        root: folder of the data set's files; by default that of the run.
        eps: radius of the L-infinity ball; by default that of the run's training, else 8/255.
        alpha: step size of PGD, C&W and MIM; by default eps / 4.
        batch_size: images per pass; AutoAttack's figures depend on it slightly.
        max_examples: use only the first so many test images.
        worst_case: attack only the images that the attacks before have left; the last row is the worst case.
        device: where to run; by default a GPU if there is one.
        seed: of everything random.
        quiet: show no progress.

    Returns:
        The report, also written to eval.json in the run directory.
    """
    where = choose_device(device)
    directory = RunDirectory(run)
    path = find_checkpoint(directory.path, checkpoint)
    recorded = directory.read()
    dataset, folder = directory.source()
    if (data or dataset) is None:
        raise ValueError(f"data must be given: {run} was not trained on a data set by name")
    splits = load_dataset(data or str(dataset), root or folder)
    model = load_model(path).to(where)
    eps = recorded.recipe.get("eps", _DEFAULT_EPS) if eps is None else eps
    # An interrupted AutoAttack goes on from here when the same command is given again.
    count = "all" if max_examples is None else max_examples
    name = f"{path.name}-{eps:.6g}-{count}-{batch_size}-{seed}" + "-left" * worst_case
    state = directory.path / "autoattack" / name
    report = evaluate(
        model,
        splits.test,
        tuple(attacks),
        eps=eps,
        alpha=alpha,
        batch_size=batch_size,
        max_examples=max_examples,
        worst_case=worst_case,
        device=where,
        seed=seed,
        progress=not quiet,
        state_dir=state if "autoattack" in attacks else None,
    )
    report.save(directory.path / EVAL_FILE)
    shutil.rmtree(state, ignore_errors=True)
    return report


def run_report(runs: Sequence[str], out: str | None = None, robust: str | None = None) -> str:
    """The report.

    Args:
        runs: run directories that `fastadv eval` has been through.
        out: folder for report.md and trade_off.png; by default nothing is written.
        robust: the attack on the plot's vertical axis; by default the last one that all runs have.

    Returns:
        The table as text.
    """
    reports = {path: _load_report(path) for path in runs}
    names = list(dict.fromkeys(row.name for report in reports.values() for row in report.rows))
    common = [name for name in names if all(name in report for report in reports.values())]
    header = ["run", "method", "model", "data", "n", "eps", *(f"{name} %" for name in names)]
    lines = [header, *(_table_line(path, report, names) for path, report in reports.items())]
    if out is not None:
        from fastadv.evaluation.plots import TradeOffPoint, plot_trade_off
        from fastadv.files import write_atomically

        robust = robust or next((name for name in reversed(common) if name != "clean"), None)
        if robust is None or not {"clean", robust} <= set(common):
            raise ValueError(
                f"robust must be an attack that all runs have beside 'clean', got {robust!r}; "
                f"they have {', '.join(common) or 'nothing'} in common"
            )
        write_atomically(Path(out) / "report.md", _markdown(lines))
        points = [
            TradeOffPoint.from_report(Path(path).name, report, robust)
            for path, report in reports.items()
        ]
        label = f"Accuracy under {robust} (%)"
        plot_trade_off(points, Path(out) / "trade_off.png", robust_label=label)
    return _aligned(lines)


def _load_report(path: str) -> Report:
    file = Path(path) / EVAL_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; run `fastadv eval {path}` first")
    return Report.load(file)


def _table_line(path: str, report: Report, names: Sequence[str]) -> list[str]:
    recorded = RunDirectory(path).read()
    eps = max((row.eps for row in report.rows), default=0.0)
    sizes = sorted({row.n for row in report.rows})
    cells = [f"{100 * report[name].accuracy:.2f}" if name in report else "-" for name in names]
    model = recorded.model.get("name") or recorded.model.get("class", "")
    size = " to ".join(str(size) for size in sizes)
    return [Path(path).name, recorded.method, model, report.data, size, format_eps(eps), *cells]


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
