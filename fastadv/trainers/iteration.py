"""One iteration of training: the method's step on a batch, and the updates of the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastadv.data import Batch, Batches
from fastadv.ranks import Ranks
from fastadv.seeding import derive_seed
from fastadv.trainers.distributed import Synchroniser
from fastadv.trainers.endings import NonFiniteLossError, write_nonfinite
from fastadv.trainers.logs import Meter
from fastadv.trainers.method import LossResult, Method, TrainBatch
from fastadv.trainers.mixup import classes_of, mixed
from fastadv.trainers.optim import (
    BufferGuard,
    EpochAverage,
    WeightAverage,
    clip_gradients,
    gradient_norm,
    set_place,
)
from fastadv.trainers.progress import Progress
from fastadv.trainers.returns import check_loss, modes_kept
from fastadv.trainers.run_directory import RunDirectory


@dataclass
class Iteration:
    """Runs the iterations of a run, one batch at a time.

    An iteration whose loss or gradient is not finite is undone and counted.

    Args:
        method: the method, with its models on the device.
        models: the trained models by name; the first is averaged.
        optimizers: the optimiser of each model.
        average: average of the weights of the first model; it follows each update if it is a `WeightAverage`.
        loader: the training images.
        ranks: the processes that train together.
        progress: the position of the run. The loop moves it on; only bad iterations are counted here.
        metrics: gets the loss, the method's metrics and the norm of the gradient.
        run_directory: the run directory, for the file of a batch whose loss is not finite.
        say: prints a line.
    """

    method: Method[Any, Any]
    models: Mapping[str, nn.Module]
    optimizers: Mapping[str, torch.optim.Optimizer]
    average: WeightAverage | EpochAverage | None
    loader: Batches
    ranks: Ranks
    progress: Progress
    metrics: Meter
    run_directory: RunDirectory
    say: Callable[[str], None]

    def __post_init__(self) -> None:
        self.recipe = self.method.recipe
        self.batch: TrainBatch | None = None
        self._guard = BufferGuard(list(self.models.values()))
        self._sync = Synchroniser(list(self.models.values()), self.ranks)
        self._classes: int | None = None
        self._moved, self._bad_loss = False, 0.0

    def run(self, batch: Batch) -> None:
        """Train on one batch at the learning rate and momentum of its place, with its own random numbers.

        Raises:
            NonFiniteLossError: too many iterations in a row had a loss or a gradient that is not finite.
        """
        epoch, step, done = self.progress.epoch, self.progress.epoch_step, self.progress.step
        place = epoch + step / len(self.loader)
        for optimizer in self.optimizers.values():
            set_place(optimizer, self.recipe, place)
        seed = derive_seed(self.recipe.seed, "torch", epoch, step)  # for dropout
        torch.manual_seed(seed + self.ranks.rank)
        weights = self.loader.weights_of(batch.ids, self.recipe.extra_weight)
        self.batch = TrainBatch(*batch, epoch, step, self.recipe.seed, weights, done)
        if self.recipe.mixup:
            if self._classes is None:
                self._classes = classes_of(next(iter(self.models.values())), self.batch.x)
            self.batch = mixed(self.batch, self.recipe.mixup, self._classes, self.ranks)
        self._guard.save()
        self._moved = False
        with modes_kept(self.method):
            self.method.step(self.batch, self._update)
        # Not within the step, in which AWP has perturbed the weights, and Free updates them several times.
        if self.progress.bad_in_a_row >= self.recipe.max_bad_steps:
            self._give_up()
        if isinstance(self.average, WeightAverage) and self._moved:
            self.average.update(next(iter(self.models.values())), self.progress.step + 1)

    def _update(self, result: LossResult) -> bool:
        """Update the weights by a loss's gradient. If it is not finite, undo the iteration and return False."""
        check_loss(self.method, result)
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        loss = self._sync.backward(result.loss)
        norms = [gradient_norm(optimizer) for optimizer in self.optimizers.values()]
        # This waits for the device, while the backward pass is still running on it.
        if not bool(torch.isfinite(torch.stack([loss, *norms])).all()):
            self._reject(float(loss))
            return False
        for optimizer, norm in zip(self.optimizers.values(), norms, strict=True):
            if self.recipe.clip_grad_norm is not None:
                clip_gradients(optimizer, norm, self.recipe.clip_grad_norm)
            optimizer.step()
        self._moved = True
        self._guard.save()
        self.progress.bad_in_a_row = 0
        assert self.batch is not None
        scalars = {"loss": result.loss, **result.metrics, "grad_norm": norms[0]}
        self.metrics.add(scalars, len(self.batch.y))
        return True

    def _reject(self, loss: float) -> None:
        """Undo the failed iteration, and count it."""
        self._guard.restore()
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        progress, self._bad_loss = self.progress, loss
        progress.bad_steps += 1
        progress.bad_in_a_row += 1
        self.say(
            f"iteration {progress.step + 1}: loss {loss:.4g} or its gradient is not "
            f"finite, weights not updated ({progress.bad_in_a_row} in a row)"
        )

    def _give_up(self) -> None:
        """Save the batch of a failed iteration and the weights before it, and raise the error."""
        assert self.batch is not None
        batch = {
            name: self.ranks.gather(value) if isinstance(value, torch.Tensor) else value
            for name, value in vars(self.batch).items()
        }
        weights = {name: model.state_dict() for name, model in self.models.items()}
        content = {**batch, "loss": self._bad_loss, "weights": weights}
        file = self.run_directory.path / f"nonfinite_step_{self.progress.step + 1:06d}.pt"
        if self.ranks.first:
            write_nonfinite(file, content)
        self.ranks.wait()  # when one rank fails, torchrun ends the others
        raise NonFiniteLossError(
            f"{self.progress.bad_in_a_row} iterations in a row had a loss or a gradient that is not "
            f"finite; the last batch and the weights before it are in {file}"
        )
