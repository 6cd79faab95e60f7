"""The base class of analyses, their input and their findings, and functions for their pictures."""

from __future__ import annotations

import abc
import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from fastadv.evaluation.analyses.settings import AnalysisSettings
from fastadv.evaluation.plot_style import Style
from fastadv.evaluation.samples import Samples
from fastadv.models import Stack, check_feature_split
from fastadv.models.split import refuse_other_halves
from fastadv.plain_text import csv_cell

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Need = Literal["images", "train", "teacher", "merger"]
Cell = str | int | float | None


@dataclass(frozen=True)
class Measured:
    """The findings of an analysis on one model.

    Attributes:
        analysis: name of the analysis.
        columns: names of the columns.
        rows: the rows, each with one cell per column; None where there is no number.
        summary: the most important numbers, by name.
        notes: further notes, one sentence each.
        originals: [M, C, H, W] float32 in 0..1, where the analysis shows images.
        adversarials: the same images after an attack.
    """

    analysis: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    summary: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    originals: Tensor | None = field(default=None, compare=False, repr=False)
    adversarials: Tensor | None = field(default=None, compare=False, repr=False)

    def column(self, name: str) -> list[Any]:
        """The cells of a column.

        Raises:
            KeyError: naming the existing columns.
        """
        if name not in self.columns:
            raise KeyError(f"no column {name!r}, there are {', '.join(self.columns)}")
        place = self.columns.index(name)
        return [row[place] for row in self.rows]

    def to_csv(self, head: Mapping[str, object] | None = None) -> str:
        """The numbers as CSV, below comment lines that begin with ``#``.

        Args:
            head: further comment lines, by name; the summary follows.
        """
        text = io.StringIO()
        for name, value in {**(head or {}), **self.summary}.items():
            text.write(f"# {name}: {' '.join(str(value).split())}\n")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(map(csv_cell, self.columns))
        writer.writerows([map(csv_cell, row) for row in self.rows])
        return text.getvalue()


@dataclass(frozen=True)
class AnalysisContext:
    """The model and the images that an analysis works on.

    Attributes:
        model: the model, in float32.
        device: device of the model.
        settings: the settings of the analyses.
        samples: images, where the analysis needs them.
        train: images of the training set, where the analysis needs them.
        teacher: the standard model, where the analysis needs it.
    """

    model: nn.Module
    device: torch.device
    settings: AnalysisSettings
    samples: Samples | None = None
    train: Samples | None = None
    teacher: nn.Module | None = None

    @property
    def images(self) -> Samples:
        """The images, for an analysis that needs them."""
        assert self.samples is not None
        return self.samples

    @property
    def train_images(self) -> Samples:
        """The training set, for an analysis that needs it."""
        assert self.train is not None
        return self.train

    @property
    def merger(self) -> Stack:
        """The model as a stack, for an analysis that needs a merger."""
        assert isinstance(self.model, Stack)
        return self.model

    def batches(self, samples: Samples) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Images, labels and indices of each batch, on the device."""
        for indices in samples.batches(self.settings.batch_size):
            x, y = samples.take(indices, self.device)
            yield x, y, indices.to(self.device)


class Analysis(abc.ABC):
    """Base of the analyses.

    Attributes:
        name: its name on the command line.
        title: heading of its picture.
        needs: the inputs that it needs.
        uses: the settings on which its numbers depend.
        libraries: the libraries besides torch on which its numbers depend.
        shared: whether several runs share one picture; else each run has its own.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    needs: ClassVar[tuple[Need, ...]]
    uses: ClassVar[tuple[str, ...]] = ()
    libraries: ClassVar[tuple[str, ...]] = ()
    shared: ClassVar[bool] = True

    @abc.abstractmethod
    def compute(self, context: AnalysisContext) -> Measured:
        """Find the numbers of one model."""

    @abc.abstractmethod
    def draw(self, found: Mapping[str, Measured], axes: Axes, style: Style) -> None:
        """Draw the numbers.

        Args:
            found: the findings by the name of each model; of one model where the analysis is not shared.
            axes: empty axes.
            style: the colours.
        """

    def check(self, settings: AnalysisSettings) -> None:
        """Check libraries and settings before anything is computed.

        Raises:
            ImportError: when a library is missing.
            ValueError: for settings with which this analysis cannot run.
        """
        return


def pooled_features(model: nn.Module, x: Tensor) -> Tensor:
    """The vectors [B, d] before the classifier, in evaluation mode and without a gradient."""
    with torch.no_grad():
        if isinstance(model, Stack):
            return torch.cat(model.pooled_features(x), 1)
        check_feature_split(model)
        refuse_other_halves("model", model, lambda f: f(x[:2]), "the analysis")
        split = cast(Any, model)
        pooled: Tensor = split.forward_head(split.forward_features(x), pre_logits=True)
    return pooled.flatten(1)


def label_axes(axes: Axes, style: Style, x: str, y: str) -> None:
    """Name the axes, and add the legend."""
    axes.set_xlabel(x, fontsize=13, color=style.ink)
    axes.set_ylabel(y, fontsize=13, color=style.ink)
    axes.legend(frameon=False, fontsize=11, labelcolor=style.ink)


def draw_bars(
    values: Mapping[str, Sequence[float]], labels: Sequence[str], axes: Axes, style: Style
) -> None:
    """Bars side by side, one colour per model.

    Args:
        values: the values of each model, at most one per label.
        labels: labels of the groups of bars.
        axes: the axes to draw on.
        style: the colours.
    """
    width = 0.8 / max(len(values), 1)
    for number, (name, heights) in enumerate(values.items()):
        places = [i + (number + 0.5) * width - 0.4 for i in range(len(heights))]
        axes.bar(places, heights, width * 0.92, color=style.colour(number), label=name)
    axes.set_xticks(range(len(labels)), labels)
    axes.margins(y=0.25)  # room for the legend
