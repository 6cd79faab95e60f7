"""`train`, which trains a model by a method and returns the finished run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastadv.attacks.options import names_checked
from fastadv.bars import say
from fastadv.data import ImageData, Splits, load_dataset, subset
from fastadv.digest import digest_of
from fastadv.interruption import stopped_by_signals
from fastadv.ops.values import check_bool
from fastadv.ranks import Ranks, is_first, joined_ranks, launch, own_device, restarted
from fastadv.trainers.announcement import announcement
from fastadv.trainers.argument_kinds import check_kinds, checked_recipe
from fastadv.trainers.building import build_method, build_model
from fastadv.trainers.callbacks import Callback, Callbacks, check_callbacks
from fastadv.trainers.checkpoint import checkpoint_name, find_checkpoint
from fastadv.trainers.distributed import with_synced_norms
from fastadv.trainers.endings import failed_writes_explained
from fastadv.trainers.hardware import choose_device
from fastadv.trainers.loop import Loop
from fastadv.trainers.method import Method
from fastadv.trainers.methods import MethodClass, find_method, own_code
from fastadv.trainers.monitor import Monitor
from fastadv.trainers.opening import (
    Images,
    describe_data,
    describe_model,
    open_run,
    restore,
    versions,
)
from fastadv.trainers.optim import build_average
from fastadv.trainers.plain_recipe import as_plain, plain_defaults
from fastadv.trainers.progress import Progress
from fastadv.trainers.recipe import Recipe
from fastadv.trainers.returns import check_trainable
from fastadv.trainers.run_directory import Description, RunDirectory
from fastadv.trainers.settings import Settings
from fastadv.trainers.teachers import Architectures, Teachers, load_teachers, teacher_templates
from fastadv.trainers.trackers import make_trackers
from fastadv.trainers.training_batches import build_loader
from fastadv.trainers.unused import check_all_used, warn_of_late_drop


@dataclass(frozen=True)
class TrainResult:
    """A finished run.

    Attributes:
        model: the trained model in evaluation mode; the average of its weights if there is one.
        run_dir: the run directory.
        checkpoint: the last checkpoint.
        best_checkpoint: the checkpoint with the best accuracy in a validation; None if there was no validation.
        record: the last epoch's record, as in metrics.jsonl; empty if no epoch was left to train.
        progress: the counters of the run.
    """

    model: nn.Module
    run_dir: Path
    checkpoint: Path
    best_checkpoint: Path | None
    record: dict[str, Any]
    progress: Progress


@names_checked
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

    Under torchrun, or if the caller has made a process group, all processes train together. Each must call this
    function with the same arguments. `run_dir` must be visible to all processes; only the first writes there.
    Processes that torchrun restarts go on from the latest checkpoint, whatever `resume` and `overwrite` say.

    Args:
        method: a name such as "arrest", or a subclass of `Method`.
        recipe: the method's numbers; by default its paper's numbers.
        data: training and test images, or a name for `load_dataset`. Training images may be `StreamedData`,
            which are read while they are needed.
        model: a name for `create_model`, or a module, which is then trained in place.
        run_dir: directory for everything that the run writes.
        root: folder of the data set, for a name that needs one.
        extra: further images, such as synthetic ones, of which each batch takes the recipe's
            `extra_fraction`.
        teacher: for a method with a frozen model, such as ARREST's standard model: a run or checkpoint
            directory, a file with a state dict, or a module. For several frozen models, such as AFS's extractors:
            a mapping by name or a list in their order. A resumed run has its own copies.
        teacher_model: names for `create_model` of the teachers' architectures: one for all teachers, a mapping by
            name or a list in their order. By default a teacher has the architecture that its run records, or the
            model's own. It is needed for a file with a state dict that fits several architectures.
        resume: True to go on from the latest checkpoint (or start, if there is no run yet), or
            the name of a checkpoint.
        overwrite: delete a run that is in `run_dir` and start again.
        allow_changes: resume although the recipe, the data or the model has changed.
        device: the device; by default a GPU if there is one, under torchrun one GPU for each process.
        settings: settings of checkpoints and logs.
        progress: False to print nothing.
        on_start: called with `run_dir` when it is ready, before the first step; only in the first process.
        on_step: called after each step, in every process.
        callbacks: called with the metrics, only in the first process; see `Callback`.

    Returns:
        The trained model, and the paths of the run and its checkpoints.

    Raises:
        ValueError: if an argument is out of range, if a number of the recipe has no effect, if the model has fewer
            classes than the data, or if the run in `run_dir` does not fit the arguments.
        TypeError: if an argument has a wrong type.
        FileExistsError: if `run_dir` holds a run, and `resume` and `overwrite` are false.
        RunInUseError: if another process trains in `run_dir`; the message names it.
        OSError: if `run_dir` cannot be written.
        ImportError: if a tracker that `settings` name, such as TensorBoard, is not installed.
        CheckpointError: if a checkpoint of the run or of a teacher cannot be read.
        NonFiniteLossError: if several steps in a row had a loss that is not finite.
        Interrupted: after SIGTERM or Ctrl-C, before the first step or after the last.
        TrainingInterrupted: after SIGTERM or Ctrl-C between the first and the last step. The current step is
            finished and a checkpoint is written. The exception names the checkpoint, and `resume=True` goes on
            from there. A second signal ends the run at once. The exception is a `KeyboardInterrupt`; a script that
            does not catch it exits with status 143 or 130. The caller's own handlers for these signals stay in
            force, and then decide.
        LostRanksError: if another process that torchrun started hangs (see `Settings.timeout`) or has ended.
    """
    resume = resume if isinstance(resume, str) else check_bool("resume", resume)
    overwrite = check_bool("overwrite", overwrite)
    allow_changes = check_bool("allow_changes", allow_changes)
    progress = check_bool("progress", progress)
    method_class = find_method(method)
    recipe = checked_recipe(method_class, recipe)
    check_kinds(data, root, model, run_dir, extra, settings, on_start, on_step)
    check_callbacks(callbacks)
    settings = settings or Settings()
    hooks = Callbacks([*make_trackers(settings.trackers), *callbacks])
    # The run stays where it is when a model's or a callback's code changes the working directory.
    run = RunDirectory(Path(run_dir).expanduser().absolute())
    if restarted() and run.launch() == launch():
        resume, overwrite = True, False
    if not resume:
        check_all_used(method_class, recipe)
        warn_of_late_drop(recipe)
    _check_run_directory(run, resume, overwrite)
    where = own_device(choose_device(device))
    splits = load_dataset(data, root) if isinstance(data, str) else data
    name = model if isinstance(model, str) else None
    with _run_environment(where, run, settings) as ranks:
        network = build_model(model, splits.train, recipe, where)
        templates = teacher_templates(method_class, recipe, teacher_model, network, splits.train)
        frozen = load_teachers(method_class, templates, teacher, run if resume else None)
        if recipe.sync_bn:
            network = with_synced_norms(network, ranks, method_class.differentiates_twice)
        trainer = build_method(method_class, recipe, network, name, frozen, splits, where, ranks)
        description = _description(method_class, recipe, network, name, frozen, splits.train, extra)
        # Else each process would train a model of its own, or wait for the others without end.
        ranks.check_same(
            {**description.flat(), "resume": bool(resume), "log_every": settings.log_every}
        )
        _initialise(trainer, ranks)
        loop = _build_loop(
            trainer, splits, extra, run, settings, description, on_step, progress, ranks
        )
        start = open_run(
            run,
            description,
            plain_defaults(method_class.recipe_class),
            _source(data, root, splits),
            frozen,
            resume=resume,
            overwrite=overwrite,
            allow_changes=allow_changes,
            ranks=ranks,
            facts={"versions": versions(), "launch": launch(), **own_code(method_class)},
        )
        if start is not None:
            restore(loop, start)
        if ranks.first:
            loop.meta["run"], loop.callbacks = run.identity(), hooks
            if progress:
                say(announcement(loop, name))
            if on_start is not None:
                on_start(run.path)
        if recipe.compile:
            trainer.compile()
        with failed_writes_explained():
            record = loop.train()
        ranks.wait()  # for the last checkpoint
    return _result(loop, run, record)


def _check_run_directory(run: RunDirectory, resume: bool | str, overwrite: bool) -> None:
    """Refuse a directory whose run stands in the way, is missing or is in use, before anything is loaded."""
    run.check_free(bool(resume), overwrite)
    if isinstance(resume, str) and not run.exists:
        raise ValueError(f"resume must be True or False where there is no run, got {resume!r}")
    if is_first():
        run.lock.check()


def _description(
    method: MethodClass,
    recipe: Recipe,
    network: nn.Module,
    name: str | None,
    teachers: Mapping[str, nn.Module],
    train: Images,
    extra: ImageData | None,
) -> Description:
    """The facts by which a resumed run recognises that it is the same."""
    return Description(
        method=method.name,
        recipe=as_plain(recipe),
        model=describe_model(network, name, train),
        data=describe_data(train, extra),
        teachers={key: digest_of(one.state_dict()) for key, one in teachers.items()},
    )


def _initialise(trainer: Method[Any, Any], ranks: Ranks) -> None:
    """Let the method set its weights and buffers, which then are the first process's in all processes."""
    trainer.initialise()
    check_trainable(trainer)
    for trained in trainer.trainable().values():
        ranks.broadcast([*trained.parameters(), *trained.buffers()])


def _result(loop: Loop, run: RunDirectory, record: dict[str, Any]) -> TrainResult:
    """The result of a run that has ended."""
    best = loop.progress.best_step
    return TrainResult(
        model=loop.evaluated.eval(),
        run_dir=run.path,
        checkpoint=find_checkpoint(run.path),
        best_checkpoint=None if best is None else run.checkpoints / checkpoint_name(best),
        record=record,
        progress=loop.progress,
    )


def _source(data: Splits | str, root: str | Path | None, splits: Splits) -> dict[str, Any]:
    """The name and the folder of the data set, and how its images were read, for the record of the run."""
    return {
        "dataset": data if isinstance(data, str) else None,
        "root": None if root is None else str(Path(root).resolve()),
        **(splits.source or {}),
    }


@contextmanager
def _run_environment(
    device: torch.device, run: RunDirectory, settings: Settings
) -> Iterator[Ranks]:
    """Lock the directory of a run, let signals end it, join its processes, and keep the caller's generators.

    Yields:
        The processes that train together.
    """
    notice = (
        "stopped between iterations; resuming goes on from the last checkpoint, or starts again"
    )
    remedy = "Resuming goes on from the last checkpoint; the option timeout sets the wait"
    with (
        stopped_by_signals(notice),
        run.lock,
        joined_ranks(device, settings.timeout, remedy) as ranks,
        _callers_generators_kept(device),
    ):
        yield ranks


@contextmanager
def _callers_generators_kept(device: torch.device) -> Iterator[None]:
    """Restore the caller's generators of random numbers afterwards, and let cuDNN choose by measuring times."""
    cuda = [device] if device.type == "cuda" else []
    cudnn = torch.backends.cudnn
    benchmark = cudnn.benchmark
    with torch.random.fork_rng(devices=cuda):
        cudnn.benchmark = True  # not by `cudnn.flags`, whose default turns cuDNN off
        try:
            yield
        finally:
            cudnn.benchmark = benchmark


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
    loader, watched = build_loader(splits, extra, recipe, runtime.device, ranks)
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
