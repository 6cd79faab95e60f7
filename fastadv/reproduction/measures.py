"""Measurements of a trained model for a cell of a table."""

from __future__ import annotations

import abc
import importlib
from collections.abc import Callable
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
from fastadv.evaluation.cost import multiply_adds
from fastadv.evaluation.result_row import Row
from fastadv.models import Stack, importance_ratios
from fastadv.reproduction.specs import CannotRun, RunSpec
from fastadv.reproduction.tables import MeasuredCell

if TYPE_CHECKING:
    from fastadv.reproduction.workshop import Place

_ANALYSES = "fastadv.evaluation.analyses"


class Measure(abc.ABC):
    """Something that is measured of the model of a row."""

    def needs(self) -> tuple[RunSpec, ...]:
        """Other trainings without which it cannot be measured."""
        return ()

    def attacks(self) -> tuple[Accuracy, ...]:
        """Accuracies that it is made of, so that all of a row can be measured together."""
        return ()

    def on(self, network: str) -> Measure:
        """The same on another network of the paper."""
        return self

    @abc.abstractmethod
    def measure(self, place: Place) -> MeasuredCell:
        """Measure it.

        Args:
            place: a trained model, and where to measure.

        Raises:
            CannotRun: if it needs something that is not there.
        """


@dataclass(frozen=True)
class Accuracy(Measure):
    """Accuracy in percent, clean or under an attack.

    Attributes:
        attack: a name as `evaluate` takes it.
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
        """Itself."""
        return (self,)

    def on(self, network: str) -> Accuracy:
        """The same, with the source on the other network, too."""
        source = None if self.source is None else self.source.on(network)
        return Accuracy(self.attack, self.eps, source)

    def measure(self, place: Place) -> MeasuredCell:
        """Return the accuracy with Wilson's interval."""
        row = place.row(self)
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

    def measure(self, place: Place) -> MeasuredCell:
        """Return the mean over the images that the attack broke."""
        row = place.row(Accuracy(self.attack))
        if row.distances is None or row.distances.mean is None:
            raise CannotRun(f"{self.attack} broke no image")
        return MeasuredCell(self.unit * row.distances.mean, n=row.distances.broken, note=_note(row))


@dataclass(frozen=True)
class Together(Measure):
    """A number made of clean and robust accuracy: their sum, or ARDist.

    Attributes:
        robust: the accuracy under attack.
        of: "sum" or "ardist", which is measured from the paper's curve on CIFAR-100, or that on CIFAR-10.
    """

    robust: Accuracy
    of: str = "sum"

    def attacks(self) -> tuple[Accuracy, ...]:
        """Both accuracies."""
        return (Accuracy(), self.robust)

    def measure(self, place: Place) -> MeasuredCell:
        """Return the number, in percentage points."""
        clean, robust = Accuracy().measure(place), self.robust.measure(place)
        value = together(clean.value, robust.value, self.of, place.data)
        return MeasuredCell(value, n=robust.n, note=robust.note)


def together(clean: float, robust: float, of: str, data: str) -> float:
    """The sum of two accuracies, or ARDist on a data set, in percentage points."""
    if of == "sum":
        return trade_off_sum(clean, robust)
    curve = ARREST_CIFAR100_CURVE if data == "cifar100" else ARREST_CIFAR10_CURVE
    return ardist(clean, robust, curve)


@dataclass(frozen=True)
class CosineMeasure(Measure):
    """Cosine similarity of the features of clean images to another model's.

    Attributes:
        teacher: its training.
    """

    teacher: RunSpec

    def needs(self) -> tuple[RunSpec, ...]:
        """The other model."""
        return (self.teacher,)

    def on(self, network: str) -> CosineMeasure:
        """The same, with the other model on the other network, too."""
        return CosineMeasure(self.teacher.on(network))

    def measure(self, place: Place) -> MeasuredCell:
        """Return the mean over the test images."""

        def cosine() -> float:
            other = place.model(self.teacher)
            return cosine_similarity_to(
                place.model(), other, place.images, max_examples=place.n, device=place.device
            )

        return MeasuredCell(
            place.kept(f"cosine to {place.name_of(self.teacher)}", cosine), n=place.n
        )


@dataclass(frozen=True)
class Importance(Measure):
    """How much a merger relies on one of its extractors.

    Attributes:
        number: of the extractor, from 1.
        of: "share", of the sum of absolute weights in percent, or "weight", their mean.
    """

    number: int
    of: str = "share"

    def measure(self, place: Place) -> MeasuredCell:
        """Return the figure of the extractor."""
        stack = cast(Stack, place.model())
        if self.number > len(stack.widths):
            raise CannotRun(f"the stack has {len(stack.widths)} extractors")
        if self.of == "share":
            return MeasuredCell(100 * importance_ratios(stack)[self.number - 1])
        blocks = stack.merger.weight.detach().abs().split(stack.widths, dim=1)
        return MeasuredCell(float(blocks[self.number - 1].mean()))


@dataclass(frozen=True)
class DeltaZOf(Measure):
    """AFS's delta z of one extractor, and its curvature over the radii of several.

    Attributes:
        number: of the extractor, from 1.
        of: "delta_z", or "curvature".
    """

    number: int
    of: str = "delta_z"

    def measure(self, place: Place) -> MeasuredCell:
        """Return the figure of an extractor; a curvature is that at its radius."""

        def found() -> list[float]:
            stacked = cast(Stack, place.model())
            radii = place.extractor_radii()
            if len(set(radii)) < len(radii) or len(radii) < 3:
                raise CannotRun("delta z needs three extractors of different radii")
            models = dict(zip(radii, stacked.extractors, strict=True))
            whole = delta_z(
                models,
                place.images,
                eps=place.scale.eps(8),
                max_examples=place.n,
                device=place.device,
            )
            return list(getattr(whole, self.of))

        values = place.kept(f"{self.of} of all extractors", found)
        at = self.number - (1 if self.of == "delta_z" else 2)
        if not 0 <= at < len(values):
            raise CannotRun("there is no curvature at the first and the last radius")
        return MeasuredCell(values[at], n=place.n)


@dataclass(frozen=True)
class Size(Measure):
    """Parameters in millions, or multiply-adds of one image in billions.

    Attributes:
        of: "parameters" or "multiply_adds".
    """

    of: str = "parameters"

    def measure(self, place: Place) -> MeasuredCell:
        """Count."""
        model = place.model()
        if self.of == "parameters":
            return MeasuredCell(sum(p.numel() for p in model.parameters()) / 1e6)
        return MeasuredCell(multiply_adds(model, place.image_shape) / 1e9)


@dataclass(frozen=True)
class AnalysisMeasure(Measure):
    """A number that an analysis of `fastadv.evaluation.analyses` sums up.

    The analysis is looked up by name when it is needed, so that a cell comes alive when its analysis is there.

    Attributes:
        name: of the analysis.
        of: which number of its summary.
        unit: factor of the number.
        train: whether it is of training images.
        attacked: whether it takes a radius.
    """

    name: str
    of: str
    unit: float = 1.0
    train: bool = False
    attacked: bool = False

    def measure(self, place: Place) -> MeasuredCell:
        """Return the number."""

        def summary() -> dict[str, float]:
            analyse, known = _analyses()
            if self.name not in known:
                raise CannotRun(f"analysis {self.name} is not there")
            settings = {"eps": place.scale.eps(8)} if self.attacked else {}
            images: dict[str, Any] = {"train": place.shop.train_images} if self.train else {}
            if "images" in known[self.name].needs:
                images["max_examples"] = place.n
            try:
                found = analyse(
                    place.model(),
                    place.images,
                    [self.name],
                    device=place.device,
                    **images,
                    **settings,
                )
            except ImportError as error:
                raise CannotRun(f"analysis {self.name} is not there: {error}") from error
            return dict(found[self.name].summary)

        numbers = place.kept(f"analysis {self.name}", summary)
        if self.of not in numbers:
            raise CannotRun(f"analysis {self.name} is not there with {self.of!r}")
        n = len(place.shop.train_images) if self.train else place.n
        return MeasuredCell(self.unit * numbers[self.of], n=n)


def _analyses() -> tuple[Callable[..., Any], Any]:
    """The function that analyses, and the names that it knows."""
    try:
        module = importlib.import_module(_ANALYSES)
        return module.analyse, module.ANALYSES
    except (ModuleNotFoundError, AttributeError):
        return _nothing, ()


def _nothing(*_: Any, **__: Any) -> Any:
    raise NotImplementedError  # of no name that is known


def _note(row: Row) -> str:
    return "" if row.status == "ok" else f"{row.status}: {'; '.join(row.notes)}"
