"""The command `fastadv train`. The parameters are the options; the docstring is their help."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastadv.commands.images import Reading, check_training_images
from fastadv.data import Splits, load_extra, load_folders
from fastadv.data.preprocessing import Interpolation
from fastadv.data.training_folders import FOLDER
from fastadv.fields import check_fields
from fastadv.models.registry import check_model_name
from fastadv.ops.values import check_choice
from fastadv.trainers import Afs, Recipe, Settings, TrainResult, find_method, train
from fastadv.trainers.checkpoint import (
    BEST,
    LATEST,
    checkpoints_in,
    find_checkpoint,
    load_checkpoint,
)
from fastadv.trainers.methods import MethodClass
from fastadv.trainers.run_directory import RunDirectory
from fastadv.trainers.weights import check_no_code


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
    method: str | MethodClass,
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
    resize: int | None = None,
    crop: int | None = None,
    interpolation: Interpolation | None = None,
    workers: int | None = None,
) -> TrainResult:
    """The run.

    Args:
        method: the method, or its name.
        recipe: the hyperparameters of the method.
        settings: how the run is saved and shown.
        flags: switches.
        on_start: called with the run directory when it is ready.
        data: data set: digits, cifar10 or cifar100; or folder:PATH, whose folders train and val hold one folder of
            pictures per class.
        run: directory for everything the run leaves.
        root: folder of the data set's official files (not for digits).
        model: network, e.g. resnet18, wrn_34_10, timm:NAME, stack:6*wrn_28_10; by default small_cnn
            for digits, resnet50 for folders and resnet18 otherwise, and for afs a stack of its
            extractors' networks.
        extra: further images for training, such as synthetic ones: a .npz file with the arrays image
            (uint8, N x H x W x C) and label, or a .pickle file with data and extrapolated_targets, as
            RST publishes its images; see extra_fraction.
        teacher: trained models for methods that need them.
        teacher_model: names of the teachers' networks.
        device: where to train, e.g. cpu or cuda:1; by default a GPU if there is one.
        from_checkpoint: resume from this checkpoint, e.g. step_000391, instead of the latest.
        resize: with folder:PATH, pixels of the shorter side of a test picture, 256 by default.
        crop: with folder:PATH, pixels of each side of all images, 224 by default.
        interpolation: with folder:PATH, the interpolation of the resizing, bilinear by default.
        workers: with folder:PATH, number of processes that read ahead, for each process that trains; by default
            its share of the cores, at most 8.
    """
    reading = Reading(resize, crop, interpolation, workers)
    check_training_images(data, root)
    if not data.startswith(FOLDER):
        reading.check_none(data)
    if model is not None:
        check_model_name("model", model)
    for name in teacher_model or ():
        check_model_name("teacher_model", name)
    resume = flags.resume or from_checkpoint is not None
    if flags.allow_changes and not resume:
        raise ValueError(
            "allow_changes must come with resume: a new run has nothing to differ from"
        )
    if from_checkpoint is not None and not RunDirectory(run).exists:
        raise ValueError(f"from_checkpoint {from_checkpoint!r}: there is no run in {run}")
    if from_checkpoint is not None:
        check_checkpoint(RunDirectory(run), from_checkpoint)
    images: Splits | str = data
    if data.startswith(FOLDER):
        images = load_folders(
            data.removeprefix(FOLDER),
            test_images=recipe.monitor_images,
            seed=recipe.seed,
            flip=recipe.flip,
            **reading.given(),
        )
    return train(
        method,
        recipe,
        data=images,
        root=root,
        model=model
        or _default_model(find_method(method).name, data, teacher or (), teacher_model or ()),
        run_dir=run,
        extra=None if extra is None else load_extra(extra),
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


def check_checkpoint(directory: RunDirectory, name: str) -> None:
    """Check the name of a checkpoint, if the run has checkpoints; `latest` and `best` are always allowed.

    Raises:
        ValueError: if the run has checkpoints, but not this one.
    """
    there = [path.name for path in checkpoints_in(directory.checkpoints)]
    if there:
        check_choice("checkpoint", name, [LATEST, BEST, *there])


def _one_for_all(names: Sequence[str] | None) -> Sequence[str] | str | None:
    return names[0] if names is not None and len(names) == 1 else names


def _default_model(method: str, data: str, teachers: Sequence[str], named: Sequence[str]) -> str:
    """The network of a run that names no model; for AFS a stack of its teachers' networks, if they are given."""
    if method == Afs.name and named:
        return "stack:" + "+".join(list(named) * (len(teachers) if len(named) == 1 else 1))
    if method == Afs.name and teachers:
        return "stack:" + "+".join(_recorded_model_name(path) for path in teachers)
    network = {"digits": "small_cnn"}.get(data, "resnet18")
    if data.startswith(FOLDER):
        network = "resnet50"
    return f"stack:6*{network}" if method == Afs.name else network


def _recorded_model_name(source: str) -> str:
    if Path(source).is_file():
        raise ValueError(f"model must be given with the state dict {source}, e.g. stack:2*resnet18")
    read = load_checkpoint(find_checkpoint(source), with_state=False)
    name = read.meta.get("model", {}).get("name")
    if name is None:
        raise ValueError(f"model must be given: {source} was trained with a model without a name")
    check_no_code(name, source)
    return str(name)
