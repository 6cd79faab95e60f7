"""The training loop that all methods share: its epochs, validations, records, checkpoints and interruption."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from fastadv.data import Batches
from fastadv.files import point_link
from fastadv.interruption import StopRequest
from fastadv.ranks import Ranks, launch
from fastadv.seeding import derive_seed
from fastadv.trainers.callbacks import Callbacks, RunStart
from fastadv.trainers.checkpoint import (
    BEST,
    Checkpoint,
    checkpoint_name,
    find_checkpoint,
    pack_weights,
    prune,
    save_checkpoint,
    unpack_average,
    unpack_weights,
)
from fastadv.trainers.console import Console, epoch_line
from fastadv.trainers.endings import TrainingInterrupted
from fastadv.trainers.halves import check_halves
from fastadv.trainers.iteration import Iteration
from fastadv.trainers.logs import Meter, MetricsLog
from fastadv.trainers.method import Method
from fastadv.trainers.method_state import checked_state, gather_state, shard_state
from fastadv.trainers.monitor import Monitor, Validation
from fastadv.trainers.optim import (
    EpochAverage,
    WeightAverage,
    build_optimizer,
    load_optimizer_state,
)
from fastadv.trainers.progress import Progress
from fastadv.trainers.returns import check_scalars, check_updated
from fastadv.trainers.run_directory import RunDirectory
from fastadv.trainers.settings import Settings

_REPEATS_WITHIN = 5.0  # seconds in which torchrun forwards a signal


@dataclass
class Loop:
    """One run of one method.

    Args:
        method: the method, with its models on the device.
        loader: the training images.
        monitor: validates the evaluated model.
        run: the run directory.
        settings: the settings of checkpoints and logs.
        meta: facts to record in each checkpoint.
        average: average of the weights of the first trained model, if the recipe asks for it.
        on_step: called after each step with the run's progress.
        callbacks: called with the metrics.
        show: print progress on standard error.
        ranks: the processes that train together; only the first writes and prints.
        progress: the position of the run.
    """

    method: Method[Any, Any]
    loader: Batches
    monitor: Monitor
    run: RunDirectory
    settings: Settings
    meta: dict[str, Any]
    average: WeightAverage | EpochAverage | None = None
    on_step: Callable[[Progress], None] | None = None
    callbacks: Callbacks = field(default_factory=Callbacks)
    show: bool = True
    ranks: Ranks = field(default_factory=Ranks)
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        self.recipe = self.method.recipe
        self.models = self.method.trainable()
        self.optimizers = {name: build_optimizer(m, self.recipe) for name, m in self.models.items()}
        self._window, self._epoch = Meter(), Meter()
        self._seconds: dict[str, float] = {}
        self._saved_at, self._request = 0.0, StopRequest()
        self.iteration = Iteration(
            self.method,
            self.models,
            self.optimizers,
            self.average,
            self.loader,
            self.ranks,
            self.progress,
            self._window,
            self.run,
            say=lambda line: self.console.say(line),
        )

    @property
    def evaluated(self) -> nn.Module:
        """The model that is validated and returned: the average of the weights if there is one."""
        return self.average.model if self.average else next(iter(self.models.values()))

    @property
    def stopped(self) -> bool:
        """Whether the recipe's patience is over: that number of validations in a row brought no improvement."""
        patience = self.recipe.patience
        return patience is not None and self.progress.validations_since_best >= patience

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go back to a checkpoint of this run."""
        state = checkpoint.train_state
        for position, (name, model) in enumerate(self.models.items()):
            model.load_state_dict(
                unpack_weights(checkpoint.weights, None if position == 0 else name)
            )
            load_optimizer_state(self.optimizers[name], state["optimizers"][name])
        if self.average:
            self.average.model.load_state_dict(unpack_average(checkpoint.weights))
        self.method.load_state(shard_state(state.get("method", {}), self.loader))
        self.progress.restore(state["progress"])
        # If the size of the batches has been changed, the run goes on with the images that follow in the epoch.
        size = self.recipe.batch_size
        before = checkpoint.meta.get("recipe", {}).get("batch_size", size)
        self.progress.epoch_step = min(self.progress.epoch_step * before // size, len(self.loader))
        self._window.load(state["window"])
        self._epoch.load(state["epoch"])
        best = self.progress.best_step
        if best is not None and not (self.run.checkpoints / checkpoint_name(best)).is_dir():
            self.progress.best_step, self.progress.best_score = None, -1.0
            self.progress.validations_since_best = 0
        elif best is not None and checkpoint.path == find_checkpoint(self.run.path):
            # A process that was killed may have written the checkpoint and not the link.
            self._point_to_best()

    def train(self) -> dict[str, Any]:
        """Train up to the last epoch, or until patience ends, and return the last epoch's record.

        Raises:
            TrainingInterrupted: after SIGTERM or Ctrl-C.
        """
        total = self.recipe.epochs * len(self.loader)
        first = self.ranks.first
        self.log = MetricsLog(self.run.path, self.progress.step, first)
        done = self.progress.epoch * len(self.loader) + self.progress.epoch_step
        self.console = Console(self.show and first, total, done, self.recipe.batch_size)
        record: dict[str, Any] = {}
        notice = "stopping after this iteration, with a checkpoint; once more stops at once"
        repeats = _REPEATS_WITHIN if launch() else 0.0
        self._saved_at = time.monotonic()
        try:
            with (
                self.callbacks.running(),
                StopRequest(notice if self.show and first else None, repeats) as self._request,
            ):
                self.callbacks.start(self._start(total))
                self.method.train_mode()
                while self.progress.epoch < self.recipe.epochs and not self.stopped:
                    record = self._run_epoch()
        finally:
            self.console.close()
        return record

    def _start(self, total_steps: int) -> RunStart:
        """The facts for callbacks before the first iteration."""
        parts = {name: self.meta[name] for name in ("method", "recipe", "model", "data")}
        identity, step = str(self.meta.get("run", "")), self.progress.step
        return RunStart(self.run.path, identity, **parts, step=step, total_steps=total_steps)

    def _run_epoch(self) -> dict[str, Any]:
        progress = self.progress
        for batch in self.loader.epoch(progress.epoch, progress.epoch_step):
            self.iteration.run(batch)
            progress.epoch_step += 1
            progress.step += 1
            self.console.step_done()
            if progress.step == 1:
                checked_state(self.method)  # long before the first checkpoint
                check_halves(self.method.name, self.method.halves, batch.x)
            if progress.step % self.settings.log_every == 0:
                self._log_window()
            if self.on_step is not None:
                self.on_step(progress)
            signum, save = self.ranks.largest([self._request.signal or 0, self._checkpoint_due()])
            if signum or save:
                self._save()
            if signum:
                self._stop(signum)
        record = self._end_epoch()
        (signum,) = self.ranks.largest([self._request.signal or 0])
        if signum and progress.epoch < self.recipe.epochs and not self.stopped:
            self._stop(signum)
        return record

    def _stop(self, signum: int) -> None:
        """End the run after a checkpoint, on all ranks."""
        self.ranks.wait()  # for the checkpoint: when one rank ends, torchrun ends the others
        raise TrainingInterrupted(signum, self.run, self.progress.step)

    def _log_window(self) -> None:
        """Record the iterations since the last record."""
        gauges = self.method.gauges()
        check_scalars(f"{type(self.method).__name__}.gauges", "gauges", gauges)
        self._window.add(gauges, 1)
        self._window.average(self.ranks)
        means, seconds = self._window.means(), self.method.runtime.phases.take()
        self._epoch.merge(self._window)
        self._window.clear()
        for name, value in seconds.items():
            self._seconds[name] = self._seconds.get(name, 0.0) + value
        record = {
            "step": self.progress.step,
            "epoch": self.progress.epoch + 1,
            **self._rate_and_bad_steps(),
            **means,
            "images_per_second": self.console.take_rate(),
            **{f"seconds_{name}": value for name, value in seconds.items()},
        }
        self.log.step(**record)
        with self.console.aside():
            self.callbacks.step(record)
        self.console.show(self.progress.epoch + 1, self.recipe.epochs, means)

    def _rate_and_bad_steps(self) -> dict[str, Any]:
        rate = next(iter(self.optimizers.values())).param_groups[0]["lr"]
        return {"lr": rate, "bad_steps": self.progress.bad_steps}

    def _end_epoch(self) -> dict[str, Any]:
        """Validate the model, record the epoch, and save it."""
        progress = self.progress
        if progress.step % self.settings.log_every:
            self._log_window()
        check_updated(self.method, self._epoch.means(), progress.bad_steps)
        record = {
            "epoch": progress.epoch + 1,
            "step": progress.step,
            **self._rate_and_bad_steps(),
            **self._epoch.means(),
            **{f"seconds_{name}": value for name, value in self._seconds.items()},
        }
        progress.epoch += 1
        progress.epoch_step = 0
        self._epoch.clear()
        self._seconds.clear()
        with self.console.aside():
            self._average_epoch()
            validation = self._validation()
            if validation is not None:
                record |= validation.numbers()
                self._note_validation(validation)
            if self.stopped:
                record["stopped_early"] = True
            self.log.epoch(**record)
            self._save(validation)
            self.callbacks.epoch(record)
        self.console.say(epoch_line(record, self.recipe.epochs))
        if self.stopped:
            self.console.say(
                f"stopped: the last {progress.validations_since_best} validations were no better"
            )
        return record

    def _average_epoch(self) -> None:
        """Add the epoch's last weights to the plain average (SWA). Before `swa_start` the average copies them."""
        progress, average = self.progress, self.average
        if not isinstance(average, EpochAverage) or self.recipe.swa_start is None:
            return
        progress.averaged += progress.epoch >= self.recipe.swa_start
        average.update(next(iter(self.models.values())), max(progress.averaged, 1))
        if progress.averaged:
            torch.manual_seed(derive_seed(self.recipe.seed, "swa", progress.epoch))  # for dropout
            with self.method.autocast():
                average.estimate_statistics(self.loader.epoch(progress.epoch - 1))
            for buffer in average.model.buffers():  # each rank has used its own part of each batch
                if buffer.is_floating_point():
                    self.ranks.sum(buffer).div_(self.ranks.world_size)

    def _validation(self) -> Validation | None:
        done = self.progress.epoch
        if done % self.recipe.monitor_every and done < self.recipe.epochs:
            return None
        return self.monitor.validate()

    def _note_validation(self, validation: Validation) -> None:
        """Make this checkpoint the best one if its validation has the best score so far."""
        progress = self.progress
        progress.validations_since_best += 1
        if validation.score > progress.best_score:
            progress.best_step, progress.best_score = progress.step, validation.score
            progress.validations_since_best = 0

    def _checkpoint_due(self) -> bool:
        """Whether a checkpoint is due by the number of iterations or, on the first rank, by the time."""
        if self.progress.epoch_step == len(self.loader):
            return False  # the epoch's end saves anyway
        every, minutes = self.settings.checkpoint_every, self.settings.checkpoint_minutes
        waited = time.monotonic() - self._saved_at
        late = minutes is not None and self.ranks.first and waited >= 60 * minutes
        return late or (every is not None and self.progress.step % every == 0)

    def _save(self, validation: Validation | None = None) -> None:
        """Write a checkpoint, with its validation if there was one."""
        progress = self.progress
        self._saved_at = time.monotonic()
        self._window.average(self.ranks)
        state = gather_state(self.method, self.ranks)
        if not self.ranks.first:
            return
        states = {name: model.state_dict() for name, model in self.models.items()}
        if isinstance(self.average, WeightAverage) or (self.average and progress.averaged):
            states[self.average.name] = self.average.state()
        train_state = {
            "optimizers": {name: o.state_dict() for name, o in self.optimizers.items()},
            "method": state,
            "progress": asdict(progress),
            "window": self._window.state(),
            "epoch": self._epoch.state(),
        }
        meta = {**self.meta, "epoch": progress.epoch, "epoch_step": progress.epoch_step}
        if validation is not None:
            meta["validation"] = asdict(validation)
        self.run.check_held(self.meta.get("run"))
        folder = self.run.checkpoints
        save_checkpoint(folder, progress.step, pack_weights(states), train_state, meta)
        prune(folder, self.settings.keep, progress.step, self._point_to_best())

    def _point_to_best(self) -> str | None:
        """Let the link `best` point to the best checkpoint, and return its name; None before a validation."""
        step = self.progress.best_step
        if step is None:
            return None
        if self.ranks.first:
            point_link(self.run.checkpoints / BEST, checkpoint_name(step))
        return checkpoint_name(step)
