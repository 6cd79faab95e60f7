"""`train`: from a method, data and a model to a finished run."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

import fastadv
from fastadv.data import (
    Batches,
    ImageData,
    Loader,
    Splits,
    StreamedData,
    StreamLoader,
    load_dataset,
    split_validation,
    subset,
)
from fastadv.digest import digest_of
from fastadv.interruption import stopped_by_signals
from fastadv.models import create_model, form_of, usual_form
from fastadv.ops.values import check_bool
from fastadv.ranks import Ranks, is_first, joined_ranks, launch, own_device, restarted
from fastadv.seeding import derive_seed
from fastadv.trainers.announcement import announcement
from fastadv.trainers.callbacks import Callback, Callbacks, check_callbacks
from fastadv.trainers.checkpoint import (
    LATEST,
    STATE_FILE,
    Checkpoint,
    CheckpointError,
    checkpoint_name,
    checkpoints_in,
    find_checkpoint,
    load_checkpoint,
)
from fastadv.trainers.classes import check_classes
from fastadv.trainers.distributed import with_synced_norms
from fastadv.trainers.hardware import autocast_dtype, choose_device
from fastadv.trainers.loop import Loop, Progress, Settings
from fastadv.trainers.method import Method, Runtime
from fastadv.trainers.methods import MethodClass, find_method, own_code
from fastadv.trainers.monitor import Monitor
from fastadv.trainers.optim import build_average
from fastadv.trainers.phases import PhaseTimer
from fastadv.trainers.recipe import Recipe, as_plain, plain_defaults
from fastadv.trainers.returns import check_trainable
from fastadv.trainers.run_directory import Description, RunDirectory
from fastadv.trainers.teachers import (
    Architectures,
    Likes,
    Teachers,
    by_name,
    teachers_like,
)
from fastadv.trainers.trackers import make_trackers
from fastadv.trainers.unused import check_all_used
from fastadv.trainers.weights import load_teacher

Images: TypeAlias = ImageData | StreamedData


@dataclass(frozen=True)
class TrainResult:
    """A finished run.

    Attributes:
        model: the trained model in evaluation mode; the average of its weights if there is one.
        run_dir: where everything is.
        checkpoint: the last checkpoint.
        best_checkpoint: the one with the best monitored accuracy.
        record: the last epoch's record, as in metrics.jsonl; empty if nothing was left to do.
        progress: the counters of the run.
    """

    model: nn.Module
    run_dir: Path
    checkpoint: Path
    best_checkpoint: Path | None
    record: dict[str, Any]
    progress: Progress


def train(
    method: str | MethodClass,
    recipe: Recipe | None = None,
    *,
    data: Splits | str,
    model: nn.Module | str,
    run_dir: str | Path,
    root: str | Path | None = None,
    extra: ImageData | None = None,
    teacher: Teachers = None,
    teacher_model: Architectures = None,
    resume: bool | str = False,
    overwrite: bool = False,
    allow_changes: bool = False,
    device: torch.device | str | None = None,
    settings: Settings | None = None,
    progress: bool = True,
    on_start: Callable[[Path], None] | None = None,
    on_step: Callable[[Progress], None] | None = None,
    callbacks: Sequence[Callback] = (),
) -> TrainResult:
    """Train a model, or go on with a run that was interrupted.

    Under torchrun, or where the caller has made a process group, all processes train together; each
    is to call this with the same arguments. `run_dir` must be visible to all of them; the first
    alone writes there. Processes that torchrun restarts go on from the latest checkpoint, whatever
    `resume` and `overwrite` say.

    Args:
        method: a name such as "arrest", or a subclass of `Method`.
        recipe: the method's numbers; by default its paper's numbers.
        data: training and test images, or a name for `load_dataset`. Training images may be `StreamedData`,
            which are read while they are needed.
        model: a name for `create_model`, or a module, which is then trained in place.
        run_dir: directory for everything the run leaves.
        root: folder of the data set, for a name that needs one.
        extra: further images, such as synthetic ones, of which each batch takes the recipe's
            `extra_fraction`.
        teacher: for methods with a frozen model (ARREST's standard model): a run or checkpoint
            directory, a file with a state dict, or a module; with several (AFS's extractors), a mapping
            by name or a list in their order. A resumed run has its own copy.
        teacher_model: networks of the teachers, names for `create_model`: one for all of them, a mapping by name
            or a list in their order. By default teachers are of the model's own kind, or what their runs say. A
            file with a state dict that several networks take must have one.
        resume: True to continue from the latest checkpoint (or start, if there is no run yet), or
            the name of a checkpoint.
        overwrite: delete a run that is in `run_dir` and start again.
        allow_changes: resume although the recipe, the data or the model is another.
        device: where to train; by default a GPU if there is one, under torchrun one for each process.
        settings: how the run is kept and shown.
        progress: False for silence.
        on_start: called with `run_dir` when it is ready, before the first step; in the first process alone.
        on_step: called after each step, in every process.
        callbacks: called with the metrics, in the first process alone; see `Callback`.

    Returns:
        The trained model and where things are.

    Raises:
        ValueError: for arguments out of range, a number of the recipe that others leave without effect, a model
            with fewer classes than the data, or a run that does not fit the arguments.
        TypeError: for arguments of a wrong kind.
        FileExistsError: if `run_dir` holds a run and neither resume nor overwrite is asked for.
        RunInUseError: if another process trains in `run_dir`; the message says which.
        OSError: if `run_dir` cannot be written.
        ImportError: if a tracker that `settings` ask for, such as TensorBoard, is not installed.
        CheckpointError: if a checkpoint or the teacher's cannot be read.
        NonFiniteLossError: if several steps in a row had a loss that is not finite.
        Interrupted: after SIGTERM or Ctrl-C.
        TrainingInterrupted: likewise, while steps are taken. The step under way is finished and a checkpoint
            written; it names the checkpoint, and `resume=True` goes on from there. A second signal ends the run at
            once. It is a `KeyboardInterrupt`; a script that does not catch it exits with status 143 or 130.
            Handlers of your own for these signals stay in force, and then decide.
        LostRanksError: if another process that torchrun started hangs (see `Settings.timeout`) or has ended.
    """
    resume = resume if isinstance(resume, str) else check_bool("resume", resume)
    overwrite = check_bool("overwrite", overwrite)
    allow_changes = check_bool("allow_changes", allow_changes)
    progress = check_bool("progress", progress)
    method_class = find_method(method)
    recipe = _checked_recipe(method_class, recipe)
    _check_kinds(data, model, run_dir, extra, settings, on_start, on_step)
    check_callbacks(callbacks)
    settings = settings or Settings()
    hooks = Callbacks([*make_trackers(settings.trackers), *callbacks])
    run = RunDirectory(run_dir)
    if restarted() and run.launch() == launch():
        resume, overwrite = True, False
    if not resume:
        check_all_used(method_class, recipe)
    run.check_free(bool(resume), overwrite)
    if isinstance(resume, str) and not run.exists:
        raise ValueError(f"resume must be True or False where there is no run, got {resume!r}")
    if is_first():
        run.lock.check()
    where = own_device(choose_device(device))
    splits = load_dataset(data, root) if isinstance(data, str) else data
    aside = "stopped between iterations; resuming goes on from the last checkpoint, or starts again"
    with (
        stopped_by_signals(aside),
        run.lock,
        joined_ranks(where, settings.timeout) as ranks,
        _run_environment(where),
    ):
        network = _on_device(_build_model(model, splits.train, recipe), recipe, where)
        likes = teachers_like(method_class, recipe, teacher_model, network, splits.train)
        frozen = _build_teachers(method_class, likes, teacher, run if resume else None)
        if recipe.sync_bn:
            network = with_synced_norms(network, ranks)
        dtype, timer = autocast_dtype(recipe.precision, where), PhaseTimer(where)
        check_classes(network, splits, where, dtype)
        builder = _model_builder(splits.train, recipe, where, ranks)
        runtime = Runtime(where, dtype, timer, ranks, builder)
        trainer = method_class(
            recipe, network, runtime, {k: _on_device(v, recipe, where) for k, v in frozen.items()}
        )
        name = model if isinstance(model, str) else None
        description = Description(
            method=method_class.name,
            recipe=as_plain(recipe),
            model=_describe_model(network, name, splits.train),
            data=_describe_data(splits.train, extra),
            teachers={k: digest_of(v.state_dict()) for k, v in frozen.items()},
        )
        source = {
            "dataset": data if isinstance(data, str) else None,
            "root": None if root is None else str(Path(root).resolve()),
            **(splits.source or {}),
        }
        trainer.initialise()
        check_trainable(trainer)
        for trained in trainer.trainable().values():
            ranks.share([*trained.parameters(), *trained.buffers()])
        loop = _build_loop(
            trainer, splits, extra, run, settings, description, on_step, progress, ranks
        )
        if ranks.first:
            loop.callbacks = hooks
        facts = {"versions": versions(), "launch": launch(), **own_code(method_class)}
        defaults = plain_defaults(method_class.recipe_class)
        start = _open_run(
            *(run, description, defaults, source, frozen, resume),
            *(overwrite, allow_changes, ranks, facts),
        )
        if ranks.first:
            loop.meta["run"] = run.identity()
        if start is not None:
            _restore(loop, start)
        if progress and ranks.first:
            print(announcement(loop, name), file=sys.stderr, flush=True)
        if on_start is not None and ranks.first:
            on_start(run.path)
        if recipe.compile:
            trainer.compile()
        record = loop.train()
        ranks.wait()  # for the last checkpoint
    best = loop.progress.best_step
    return TrainResult(
        model=loop.evaluated.eval(),
        run_dir=run.path,
        checkpoint=find_checkpoint(run.path),
        best_checkpoint=None if best is None else run.checkpoints / checkpoint_name(best),
        record=record,
        progress=loop.progress,
    )


def _check_kinds(
    data: object,
    model: object,
    run_dir: object,
    extra: object,
    settings: object,
    on_start: object,
    on_step: object,
) -> None:
    """Check of what kind the arguments are that are neither numbers nor switches.

    Raises:
        TypeError: naming the first that is of another kind.
    """
    if isinstance(data, ImageData | StreamedData) or not isinstance(data, Splits | str):
        raise TypeError(
            "data must be Splits(train=..., test=...) of ImageData, or the name of a data set, got "
            f"{type(data).__name__}; from_tensors makes ImageData of tensors"
        )
    if not isinstance(model, nn.Module | str):
        hint = "; call it to make the module" if callable(model) else ""
        raise TypeError(f"model must be a module or a name, got {type(model).__name__}{hint}")
    if not isinstance(run_dir, str | os.PathLike):
        raise TypeError(f"run_dir must be the path of a directory, got {run_dir!r}")
    if not isinstance(extra, ImageData | None):
        raise TypeError(f"extra must be ImageData, got {type(extra).__name__}; see from_tensors")
    if not isinstance(settings, Settings | None):
        raise TypeError(f"settings must be Settings(...), got {type(settings).__name__}")
    for name, function in (("on_start", on_start), ("on_step", on_step)):
        if function is not None and not callable(function):
            raise TypeError(f"{name} must be a function, got {function!r}")


def _checked_recipe(method: MethodClass, recipe: Recipe | None) -> Recipe:
    if recipe is None:
        return method.recipe_class()
    if not isinstance(recipe, method.recipe_class):
        raise TypeError(
            f"recipe of {method.name} must be a {method.recipe_class.__name__}, "
            f"got {type(recipe).__name__}"
        )
    return recipe


@contextmanager
def _run_environment(device: torch.device) -> Iterator[None]:
    """Leave the caller's random numbers alone, and let cuDNN choose by measuring."""
    cuda = [device] if device.type == "cuda" else []
    cudnn = torch.backends.cudnn
    benchmark = cudnn.benchmark
    with torch.random.fork_rng(devices=cuda):
        cudnn.benchmark = True  # not by `cudnn.flags`, which by default switches cuDNN off
        try:
            yield
        finally:
            cudnn.benchmark = benchmark


def _build_model(model: nn.Module | str, data: Images, recipe: Recipe) -> nn.Module:
    if isinstance(model, nn.Module):
        return model
    torch.manual_seed(derive_seed(recipe.seed, "init"))
    return create_model(model, data.num_classes, data.in_channels)


def _model_builder(
    data: Images, recipe: Recipe, device: torch.device, ranks: Ranks
) -> Callable[[str], nn.Module]:
    """Return a function that makes further models by name, which are trained like the run's own."""

    def build(name: str) -> nn.Module:
        model = _on_device(create_model(name, data.num_classes, data.in_channels), recipe, device)
        return with_synced_norms(model, ranks) if recipe.sync_bn else model

    return build


def _on_device(model: nn.Module, recipe: Recipe, device: torch.device) -> nn.Module:
    layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
    return model.to(device=device, memory_format=layout)  # type: ignore[call-overload]


def _build_teachers(
    method: MethodClass, needed: Likes, given: Teachers, resumed: RunDirectory | None
) -> dict[str, nn.Module]:
    """Load the frozen models that the method needs, from where the caller says or from the run."""
    sources = by_name(given, list(needed))
    unknown = sorted(sources.keys() - needed.keys())
    if unknown:
        takes = f"only {', '.join(needed)}" if needed else "no frozen model"
        raise ValueError(f"{method.name} with this recipe takes {takes}, got {', '.join(unknown)}")
    for name in needed:
        if name not in sources and resumed is not None and resumed.teacher_file(name).is_file():
            sources[name] = resumed.teacher_file(name)
        if name not in sources:
            raise ValueError(
                f"{method.name} needs a {name}: the run directory, checkpoint, state-dict file or "
                "module of a trained model, got None"
            )
    try:
        return {name: load_teacher(sources[name], *like) for name, like in needed.items()}
    except ValueError as error:
        if given is not None or resumed is None:
            raise
        raise ValueError(
            f"{error}; if it is of another kind than the model, give teacher again"
        ) from error


def _describe_model(model: nn.Module, name: str | None, data: Images) -> dict[str, Any]:
    description = {
        "name": name,
        "class": type(model).__name__,
        "num_classes": data.num_classes,
        "in_channels": data.in_channels,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    return description if usual_form(model) else {**description, "form": form_of(model)}


def _describe_data(train: Images, extra: ImageData | None = None) -> dict[str, Any]:
    if isinstance(train, StreamedData):
        return {"name": train.name, "images": len(train), "size": list(train.image_shape)}
    description = {
        "name": train.name,
        "images": len(train),
        "size": list(train.images.shape[1:]),
        "labels": digest_of({"labels": train.labels}),
    }
    return description if extra is None else {**description, "extra": _describe_data(extra)}


def _open_run(
    run: RunDirectory,
    description: Description,
    defaults: Mapping[str, Any],
    source: Mapping[str, Any],
    teachers: Mapping[str, nn.Module],
    resume: bool | str,
    overwrite: bool,
    allow_changes: bool,
    ranks: Ranks,
    facts: Mapping[str, Any],
) -> Checkpoint | None:
    """Take possession of the run directory, and return the checkpoint to continue from, if any."""
    if ranks.first:
        run.take()
        run.check_free(bool(resume), overwrite)  # once more, now that nobody else can write there
    start: Checkpoint | None = None
    clear = run.exists and overwrite
    if run.exists and not clear:
        if not allow_changes:
            run.check_same(description, defaults)
        if isinstance(resume, str) or checkpoints_in(run.checkpoints):
            which = resume if isinstance(resume, str) else LATEST
            start = load_checkpoint(find_checkpoint(run.path, which))
    ranks.wait()  # until all have read what is there
    if not ranks.first:
        return start
    if clear:
        run.clear()
    run.begin(description, {"source": dict(source), **facts})
    for name, teacher in teachers.items():
        run.save_teacher(name, teacher)
    return start


def _restore(loop: Loop, start: Checkpoint) -> None:
    """Go back to a checkpoint, whose state may be that of another version."""
    try:
        loop.restore(start)
    except torch.OutOfMemoryError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        writer = start.meta.get("versions", {}).get("fastadv", "of an unknown version")
        raise CheckpointError(
            f"{start.path / STATE_FILE}: its state, written by fastadv {writer}, is not one that fastadv "
            f"{fastadv.__version__} can go on with ({type(error).__name__}: {error}). Go on with the version that "
            "wrote it, or begin a new run"
        ) from error


def _build_loop(
    method: Method[Any, Any],
    splits: Splits,
    extra: ImageData | None,
    run: RunDirectory,
    settings: Settings,
    description: Description,
    on_step: Callable[[Progress], None] | None,
    show: bool,
    ranks: Ranks,
) -> Loop:
    recipe, runtime = method.recipe, method.runtime
    if extra is None and recipe.extra_weight != 1:
        raise ValueError(f"extra_weight must be 1 without extra images, got {recipe.extra_weight}")
    loader, watched = _build_loader(splits, extra, recipe, runtime.device, ranks)
    watched = subset(watched, min(recipe.monitor_images, len(watched)), recipe.seed)
    first = next(iter(method.trainable().values()))
    method.train_mode()
    average = build_average(first, recipe)
    return Loop(
        method=method,
        loader=loader,
        monitor=Monitor(
            average.model if average else first,
            watched,
            recipe,
            runtime,
            method.teachers.get("teacher"),
            ranks,
        ),
        run=run,
        settings=settings,
        meta={**asdict(description), "seed": recipe.seed, "versions": versions()},
        average=average,
        on_step=on_step,
        show=show,
        ranks=ranks,
    )


def _build_loader(
    splits: Splits,
    extra: ImageData | None,
    recipe: Recipe,
    device: torch.device,
    ranks: Ranks,
) -> tuple[Batches, ImageData]:
    """Build the training batches, and choose the images that are held out of them or for testing."""
    training, watched = splits.train, splits.test
    common: dict[str, Any] = {
        "seed": recipe.seed,
        "device": device,
        "channels_last": recipe.channels_last,
        "rank": ranks.rank,
        "world_size": ranks.count,
    }
    if isinstance(training, StreamedData):
        _check_streamed(recipe, extra, training.supports)
        return StreamLoader(training, recipe.batch_size, **common), watched
    if recipe.holdout:
        training, watched = split_validation(training, recipe.holdout, recipe.seed)
    if recipe.train_images is not None:
        training = _some_of(training, recipe.train_images, recipe.seed)
    loader = Loader(
        training,
        recipe.batch_size,
        train=True,
        pad=recipe.pad,
        mode=recipe.pad_mode,
        flip=recipe.flip,
        extra=extra,
        extra_fraction=recipe.extra_fraction,
        **common,
    )
    return loader, watched


def _check_streamed(recipe: Recipe, extra: ImageData | None, supported: frozenset[str]) -> None:
    """Refuse what only images in memory can have."""
    if extra is not None:
        raise ValueError("extra must be None with StreamedData: let the dataset hold all images")
    wanted = {"pad": 0, "flip": False, "holdout": 0, "train_images": None, "extra_fraction": 0}
    for name, value in wanted.items():
        if name not in supported and getattr(recipe, name) != value:
            raise ValueError(
                f"{name} must be {value} with StreamedData, whose dataset chooses and augments all "
                f"images itself, got {getattr(recipe, name)}"
            )


def _some_of(training: ImageData, count: int, seed: int) -> ImageData:
    if count > len(training):
        raise ValueError(f"train_images must be <= {len(training)}, the images there, got {count}")
    return subset(training, count, seed)


def versions() -> dict[str, str]:
    """Return the versions of what computes a run."""
    return {
        "fastadv": fastadv.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
