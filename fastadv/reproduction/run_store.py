"""Training and measuring the models of the tables. Existing results are used again, and stopped runs continue."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from fastadv.commands import run_evaluation
from fastadv.data import ImageData, load_npz
from fastadv.data.folder import FolderImages
from fastadv.evaluation import Result, load_results
from fastadv.evaluation.attack_list import CLEAN, Minimum, parse_attacks
from fastadv.evaluation.minimum import CarliniWagner
from fastadv.evaluation.result_row import Row
from fastadv.evaluation.results import EVAL_FILE
from fastadv.files import sha256_of, write_atomically
from fastadv.models import MissingLayerError
from fastadv.reproduction.images import Source
from fastadv.reproduction.measures import Accuracy
from fastadv.reproduction.scales import Scale
from fastadv.reproduction.specs import CannotRun, ResolvedRun, RunSpec, resolve
from fastadv.trainers import NonFiniteLossError, load_model, train
from fastadv.trainers.checkpoint import LATEST, find_checkpoint

# A file in the directory of a run: that it is complete, and its measures other than accuracies.
_RECORD = "reproduction.json"
_SECONDS, _DIVERGED = "seconds", "diverged"
_SEED = 0  # of the attacks
T = TypeVar("T")


@dataclass
class RunStore:
    """A folder of trained models: it trains the missing ones, measures them, and records the figures.

    Attributes:
        folder: the directory of the runs.
        scale: the scale of the runs.
        source: the images.
        device: the device for training and measuring; None chooses.
        extra: a .npz file of further training images, for the methods that take such images.
        quiet: write no messages.
        trained: names of the runs that were trained, in full or in part, by this object.
        evaluations: the number of evaluations made by this object.
        failures: trainings that were refused, with the reason. A layer that the scale's network lacks is a limit
            of the scale, and not a failure.
    """

    folder: Path
    scale: Scale
    source: Source
    device: str | None = None
    extra: str | None = None
    quiet: bool = True
    trained: list[str] = field(default_factory=list)
    evaluations: int = 0
    failures: list[str] = field(default_factory=list)

    @property
    def images(self) -> ImageData | FolderImages:
        """The test images."""
        return self.source.tests

    @cached_property
    def extra_digest(self) -> str:
        """SHA-256 of the further images; empty without any."""
        return "" if self.extra is None else sha256_of(Path(self.extra))

    def resolve(self, run: RunSpec, seed: int) -> ResolvedRun:
        """Return the details of a training here.

        Raises:
            CannotRun: if a method, an option, a value or a network does not exist here.
        """
        return resolve(run, self.scale, self.source.place, seed, self.extra_digest)

    @cached_property
    def train_images(self) -> ImageData:
        """The training images, as many as test images are used."""
        return self.source.first_train_images(self.scale.test_images)

    def path(self, run: ResolvedRun) -> Path:
        """The directory of a run."""
        return self.folder / run.name

    def is_complete(self, run: ResolvedRun) -> bool:
        """Whether a run has been trained to its end."""
        return _SECONDS in self._record(run)

    def missing(self, runs: Iterable[ResolvedRun]) -> list[ResolvedRun]:
        """The runs that must be trained, among these and their teachers, each once and after its teachers."""
        needed = {one.name: one for run in runs for one in run.with_teachers()}
        return [run for run in needed.values() if not self.is_complete(run)]

    def ensure(self, run: ResolvedRun) -> None:
        """Train a run and its teachers, except complete ones. A run that was stopped is resumed."""
        for one in self.missing([run]):
            self._say(f"training {one.method.name} in {self.path(one)}")
            if (diverged := self._record(one).get(_DIVERGED)) is not None:
                raise CannotRun(diverged)
            self._train(one)

    def _train(self, run: ResolvedRun) -> None:
        began = time.perf_counter()
        self.trained.append(run.name)
        try:
            train(
                run.method,
                run.recipe,
                data=self.source.for_training(run.recipe),
                root=None if self.source.is_folder else self.source.root,
                model=run.network,
                run_dir=self.path(run),
                teacher={
                    name: self.folder / teacher.relative_path for name, teacher in run.teachers
                }
                or None,
                extra=load_npz(self.extra) if run.extra and self.extra else None,
                resume=True,
                device=self.device,
                progress=not self.quiet,
            )
        except NonFiniteLossError as error:
            # The other rows can still be trained. This run is not tried again, since it would diverge again.
            reason = f"{run.method.name} in {run.name} diverged: {str(error).partition(';')[0]}"
            self._write_record(run, _DIVERGED, reason)
            raise CannotRun(reason) from error
        except (ValueError, TypeError) as error:
            # The other rows can still be trained.
            reason = f"method {run.method.name} refuses: {error}"
            if not (isinstance(error, MissingLayerError) and self.scale.network is not None):
                self.failures.append(f"{run.name}: {reason}")
            raise CannotRun(reason) from error
        self._write_record(run, _SECONDS, time.perf_counter() - began)

    def rows(self, run: ResolvedRun, wanted: Iterable[Accuracy], seed: int) -> dict[Accuracy, Row]:
        """Return accuracies of a trained run. Accuracies in its file of results are not measured again."""
        wanted = list(dict.fromkeys(wanted))
        found = self.known(run, wanted, seed)
        groups: dict[tuple[Any, ...], list[Accuracy]] = {}
        for one in wanted:
            if one not in found:
                attack = self.scale.attack(one.attack)
                key = (one.source, attack, self.scale.images_for(attack))
                groups.setdefault(key, []).append(one)
        for source, n, attacks, radii in _joined(groups, self.scale):
            self.evaluations += 1
            run_evaluation(
                str(self.path(run)),
                attacks,
                checkpoint=run.checkpoint,
                data=None if self.source.is_folder else self.source.data,
                root=self.source.root,
                eps=radii,
                max_examples=n,
                surrogate=None if source is None else str(self._source(source, seed)),
                device=self.device,
                seed=_SEED,
                quiet=self.quiet,
                keep_images=0,
            )
        if groups:
            found = self.known(run, wanted, seed)
        return found

    def known(self, run: ResolvedRun, wanted: Iterable[Accuracy], seed: int) -> dict[Accuracy, Row]:
        """Return the accuracies of a run that are in its file of results."""
        file = self.path(run) / EVAL_FILE
        if not file.exists():
            return {}
        name = find_checkpoint(self.path(run), run.checkpoint).name
        results = load_results(file)
        found: dict[Accuracy, Row] = {}
        for one in wanted:
            attack, eps = self.scale.attack(one.attack), self.scale.eps(one.eps)
            n = self.scale.images_for(attack)
            n = len(self.images) if n is None else min(n, len(self.images))
            source = "" if one.source is None else self._source(one.source, seed).name
            for result in results:
                row = result.row
                at = row.name == CLEAN or row.distances is not None or _near(row.eps, eps)
                same = row.surrogate.partition(" ")[0] == source
                fits = row.name == attack and row.n == n and row.seed == _SEED
                if fits and at and same and self._is_ours(result, name):
                    found[one] = row
        return found

    def _is_ours(self, result: Result, checkpoint: str) -> bool:
        """Whether `rows` has made this result, and not `fastadv eval` with other options."""
        row = result.row
        without_ball = row.name == CLEAN or row.distances is not None
        own_alpha = row.alpha is None or row.name.startswith("fgsm")
        (attack,) = parse_attacks(row.name, 1.0, None)
        usual = CarliniWagner().variant(attack) if isinstance(attack, Minimum) else ""
        return (
            not result.after
            and row.variant == usual
            and (without_ball or result.norm == "linf")
            and (without_ball or own_alpha or _near(row.alpha or 0.0, row.eps / 4))
            and result.bounds == (0.0, 1.0)
            and (result.subject.data, result.subject.checkpoint) == (self.images.name, checkpoint)
        )

    def _source(self, source: RunSpec, seed: int) -> Path:
        return self.path(self.resolve(source, seed))

    def cached(self, run: ResolvedRun, title: str, find: Callable[[], T]) -> T:
        """Return a measure of a run from its file, or call ``find`` and write the result to the file."""
        record = self._record(run)
        title = title if run.checkpoint == LATEST else f"{title}, {run.checkpoint}"
        if title not in record:
            self._write_record(run, title, find())
            self.evaluations += 1
        return self._record(run)[title]

    def _record(self, run: ResolvedRun) -> dict[str, Any]:
        file = self.path(run) / _RECORD
        if not file.exists():
            return {}
        try:
            return dict(json.loads(file.read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(
                f"{file} is damaged: {error}; delete it, and the run is checked anew"
            ) from error

    def _write_record(self, run: ResolvedRun, title: str, value: Any) -> None:
        content = json.dumps({**self._record(run), title: value}, indent=2)
        write_atomically(self.path(run) / _RECORD, content + "\n")

    def _say(self, text: str) -> None:
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)


@dataclass
class TrainedRun:
    """One trained model, with the images and the device of its measurements.

    Attributes:
        store: the folder of models.
        run: the training.
        seed: the seed of the training.
        found: the accuracies that are known.
    """

    store: RunStore
    run: ResolvedRun
    seed: int
    found: dict[Accuracy, Row]

    @property
    def scale(self) -> Scale:
        """The scale of the training."""
        return self.store.scale

    @property
    def data(self) -> str:
        """The name of the data set."""
        return self.store.source.name

    @property
    def images(self) -> ImageData | FolderImages:
        """The test images."""
        return self.store.images

    @property
    def device(self) -> str | None:
        """The device for measuring."""
        return self.store.device

    @property
    def n(self) -> int:
        """The number of test images that are used."""
        n = self.scale.test_images
        return len(self.images) if n is None else min(n, len(self.images))

    @property
    def image_shape(self) -> tuple[int, ...]:
        """[C, H, W]."""
        return self.store.source.image_shape

    def row(self, accuracy: Accuracy) -> Row:
        """The result with an accuracy of the model."""
        return self.found[accuracy]

    def model(self, run: RunSpec | None = None) -> nn.Module:
        """The trained model, or the model of another training with the same seed."""
        resolved = self.run if run is None else self._resolved(run)
        model = load_model(self.store.folder / resolved.relative_path)
        return model if self.device is None else model.to(torch.device(self.device))

    def name_of(self, run: RunSpec) -> str:
        """The name of another training with the same seed."""
        return self._resolved(run).relative_path

    def _resolved(self, run: RunSpec) -> ResolvedRun:
        return self.store.resolve(run, self.seed)

    def cached(self, title: str, find: Callable[[], T]) -> T:
        """`RunStore.cached` for this model, the number of images and the radius; its name lacks these two."""
        images = "all" if self.scale.test_images is None else self.scale.test_images
        conditions = f"{images} images, 8/255 is {self.scale.eps(8):.6g}"
        return self.store.cached(self.run, f"{title}, {conditions}", find)

    def extractor_radii(self) -> list[float]:
        """The radii for which the extractors of a stack were trained."""
        return [float(getattr(teacher.recipe, "eps", 0.0)) for _, teacher in self.run.teachers]


def _near(a: float, b: float) -> bool:
    return abs(a - b) < 1e-9


def _joined(
    groups: dict[tuple[Any, ...], list[Accuracy]], scale: Scale
) -> list[tuple[RunSpec | None, int | None, list[str], list[float]]]:
    """The evaluations that measure these accuracies: source, number of images, attacks and radii of each."""
    joined: dict[tuple[Any, ...], list[str]] = {}
    for (source, attack, n), ones in groups.items():
        radii = tuple(sorted({scale.eps(one.eps) for one in ones}))
        joined.setdefault((source, n, radii), []).append(attack)
    return [(source, n, attacks, list(radii)) for (source, n, radii), attacks in joined.items()]
