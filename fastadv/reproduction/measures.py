"""The measurements of a trained model for the cells of a table, one class for each kind of figure."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from fastadv.evaluation import (
    ARREST_CIFAR10_CURVE,
    ARREST_CIFAR100_CURVE,
    ardist,
    cosine_similarity_to,
    delta_z,
    trade_off_sum,
)
from fastadv.evaluation.analyses import ANALYSES, analyse
from fastadv.evaluation.cost import multiply_adds
from fastadv.evaluation.result_row import Row
from fastadv.models import Stack, importance_ratios
from fastadv.reproduction.specs import CannotRun, RunSpec
from fastadv.reproduction.tables import MeasuredCell

if TYPE_CHECKING:
    from fastadv.reproduction.run_store import TrainedRun


class Measure(abc.ABC):
    """A figure that is measured on the model of a row."""

    def needs(self) -> tuple[RunSpec, ...]:
        """Other trainings that the measurement needs."""
        return ()

    def attacks(self) -> tuple[Accuracy, ...]:
        """The accuracies that the measurement needs. All accuracies of a row are measured together."""
        return ()

    def on(self, network: str) -> Measure:
        """The same measurement on another network of the paper."""
        return self

    @abc.abstractmethod
    def measure(self, trained: TrainedRun) -> MeasuredCell:
        """Measure the figure.

        Args:
            trained: a trained model, with images and device.

        Raises:
            CannotRun: if the model or the installation lacks something that the measurement needs.
        """


@dataclass(frozen=True)
class Accuracy(Measure):
    """Accuracy in percent, clean or under an attack.

    Attributes:
        attack: a name that `evaluate` takes.
        eps: radius in units of 1/255.
        source: training of the model on which the adversarial images are made; None for the judged model itself.
    """

    attack: str = "clean"
    eps: float = 8.0
    source: RunSpec | None = None

    def needs(self) -> tuple[RunSpec, ...]:
        """The source of a black-box attack."""
        return () if self.source is None else (self.source,)

    def attacks(self) -> tuple[Accuracy, ...]:
        """This accuracy itself."""
        return (self,)

    def on(self, network: str) -> Accuracy:
        """The same accuracy, with the source on the other network as well."""
        source = None if self.source is None else self.source.on(network)
        return Accuracy(self.attack, self.eps, source)

    def measure(self, trained: TrainedRun) -> MeasuredCell:
        """Return the accuracy with Wilson's interval."""
        row = trained.row(self)
        low, high = row.interval
        return MeasuredCell(100 * row.accuracy, 100 * low, 100 * high, row.n, _note(row))


@dataclass(frozen=True)
class SmallestPerturbationMeasure(Measure):
    """Mean distance of the smallest adversarial perturbations that an attack without a ball finds.

    Attributes:
        attack: its name.
        unit: factor of the distances; 255 for linf.
    """

    attack: str
    unit: float = 1.0

    def attacks(self) -> tuple[Accuracy, ...]:
        """The attack, whose row has the distances."""
        return (Accuracy(self.attack),)

    def measure(self, trained: TrainedRun) -> MeasuredCell:
        """Return the mean over the images that the attack broke."""
        row = trained.row(Accuracy(self.attack))
        if row.distances is None or row.distances.mean is None:
            raise CannotRun(f"{self.attack} broke no image")
        return MeasuredCell(self.unit * row.distances.mean, n=row.distances.broken, note=_note(row))


@dataclass(frozen=True)
class TradeOffMeasure(Measure):
    """A number made of clean and robust accuracy: their sum, or ARDist.

    Attributes:
        robust: the accuracy under attack.
        of: "sum", or "ardist": the distance from the paper's curve, on CIFAR-100 the curve of CIFAR-100, on all
            other data the curve of CIFAR-10.
    """

    robust: Accuracy
    of: str = "sum"

    def attacks(self) -> tuple[Accuracy, ...]:
        """Both accuracies."""
        return (Accuracy(), self.robust)

    def measure(self, trained: TrainedRun) -> MeasuredCell:
        """Return the number, in percentage points."""
        clean, robust = Accuracy().measure(trained), self.robust.measure(trained)
        value = trade_off_number(clean.value, robust.value, self.of, trained.data)
        return MeasuredCell(value, n=robust.n, note=robust.note)


def trade_off_number(clean: float, robust: float, of: str, data: str) -> float:
    """The sum of two accuracies, or ARDist on a data set, in percentage points."""
    if of == "sum":
        return trade_off_sum(clean, robust)
    curve = ARREST_CIFAR100_CURVE if data == "cifar100" else ARREST_CIFAR10_CURVE
    return ardist(clean, robust, curve)


@dataclass(frozen=True)
class CosineMeasure(Measure):
    """Cosine similarity of the features of clean images to the features of another model.

    Attributes:
        teacher: the training of the other model.
    """

    teacher: RunSpec

    def needs(self) -> tuple[RunSpec, ...]:
        """The other model."""
        return (self.teacher,)

    def on(self, network: str) -> CosineMeasure:
        """The same similarity, with the other model on the other network as well."""
        return CosineMeasure(self.teacher.on(network))

    def measure(self, trained: TrainedRun) -> MeasuredCell:
        """Return the mean over the test images."""
        title = f"cosine to {trained.name_of(self.teacher)}"
        return MeasuredCell(trained.cached(title, lambda: self._mean(trained)), n=trained.n)

    def _mean(self, trained: TrainedRun) -> float:
        return cosine_similarity_to(
            trained.model(),
            trained.model(self.teacher),
            trained.images,
            max_examples=trained.n,
            device=trained.device,
        )


@dataclass(frozen=True)
class ImportanceMeasure(Measure):
    """How much a merger relies on one of its extractors.

    Attributes:
        number: number of the extractor, from 1.
        of: "share", its part of the sum of absolute weights in percent, or "weight", their mean.
    """

    number: int
    of: str = "share"

    def measure(self, trained: TrainedRun) -> MeasuredCell:
        """Return the figure of the extractor."""
        stack = cast(Stack, trained.model())
        if self.number > len(stack.widths):
            raise CannotRun(f"the stack has {len(stack.widths)} extractors")
        if self.of == "share":
            return MeasuredCell(100 * importance_ratios(stack)[self.number - 1])
        blocks = stack.merger.weight.detach().abs().split(stack.widths, dim=1)
        return MeasuredCell(float(blocks[self.number - 1].mean()))


@dataclass(frozen=True)
class DeltaZMeasure(Measure):
    """AFS's delta z of one extractor, and its curvature over the radii of several.

    Attributes:
        number: number of the extractor, from 1.
        of: "delta_z", or "curvature".
    """

    number: int
    of: str = "delta_z"

    def measure(self, trained: TrainedRun) -> MeasuredCell:
        """Return the figure of the extractor; for a curvature, the curvature at the extractor's radius."""
        title = f"{self.of} of all extractors"
        values = trained.cached(title, lambda: self._of_all_extractors(trained))
        at = self.number - (1 if self.of == "delta_z" else 2)
        if not 0 <= at < len(values):
            raise CannotRun("there is no curvature at the first and the last radius")
        return MeasuredCell(values[at], n=trained.n)

    def _of_all_extractors(self, trained: TrainedRun) -> list[float]:
        stacked = cast(Stack, trained.model())
        radii = trained.extractor_radii()
        if len(set(radii)) < len(radii) or len(radii) < 3:
            raise CannotRun("delta z needs three extractors of different radii")
        found = delta_z(
            dict(zip(radii, stacked.extractors, strict=True)),
            trained.images,
            eps=trained.scale.eps(8),
            max_examples=trained.n,
            device=trained.device,
        )
        return list(getattr(found, self.of))


@dataclass(frozen=True)
class SizeMeasure(Measure):
    """Parameters in millions, or multiply-adds of one image in billions.

    Attributes:
        of: "parameters" or "multiply_adds".
    """

    of: str = "parameters"

    def measure(self, trained: TrainedRun) -> MeasuredCell:
        """Count the parameters or the multiply-adds."""
        model = trained.model()
        if self.of == "parameters":
            return MeasuredCell(sum(p.numel() for p in model.parameters()) / 1e6)
        return MeasuredCell(multiply_adds(model, trained.image_shape) / 1e9)


@dataclass(frozen=True)
class AnalysisMeasure(Measure):
    """A number in the summary of an analysis of `fastadv.evaluation.analyses`.

    Attributes:
        name: the analysis.
        of: the number's name in the summary.
        unit: factor of the number.
        train: whether the analysis takes training images.
        attacked: whether the analysis takes a radius.
    """

    name: str
    of: str
    unit: float = 1.0
    train: bool = False
    attacked: bool = False

    def measure(self, trained: TrainedRun) -> MeasuredCell:
        """Return the number."""
        numbers = trained.cached(f"analysis {self.name}", lambda: self._summary(trained))
        if self.of not in numbers:
            raise CannotRun(f"analysis {self.name} has no number {self.of!r}")
        n = len(trained.store.train_images) if self.train else trained.n
        return MeasuredCell(self.unit * numbers[self.of], n=n)

    def _summary(self, trained: TrainedRun) -> dict[str, float]:
        if self.name not in ANALYSES:
            raise CannotRun(f"there is no analysis {self.name}")
        options: dict[str, Any] = {"eps": trained.scale.eps(8)} if self.attacked else {}
        if self.train:
            options["train"] = trained.store.train_images
        if "images" in ANALYSES[self.name].needs:
            options["max_examples"] = trained.n
        try:
            found = analyse(
                trained.model(), trained.images, [self.name], device=trained.device, **options
            )
        except ImportError as error:
            raise CannotRun(f"analysis {self.name} cannot be made: {error}") from error
        return dict(found[self.name].summary)


def _note(row: Row) -> str:
    return "" if row.status == "ok" else f"{row.status}: {'; '.join(row.notes)}"
