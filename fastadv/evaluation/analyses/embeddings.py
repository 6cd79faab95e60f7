"""The analyses "tsne" and "umap": features of clean, noisy and adversarial images, placed in the plane."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fastadv.attacks import PGD
from fastadv.evaluation.analyses.analysis import (
    Analysis,
    AnalysisContext,
    Measured,
    label_axes,
    pooled_features,
)
from fastadv.evaluation.analyses.settings import AnalysisSettings
from fastadv.evaluation.context import evaluation_mode
from fastadv.evaluation.plot_style import Style
from fastadv.ops import random_start
from fastadv.seeding import derive_seed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KINDS = ("clean", "noisy", "adversarial")
_MOST_NAMED = 20  # classes that are named in the picture
_MARKERS = dict(zip(KINDS, ("o", "s", "x"), strict=True))


class Embedding(Analysis):
    """Base of t-SNE and UMAP: the pooled features of three kinds of images, placed in the plane together.

    Noisy images have uniform noise in the ball of the attack. The adversarial images are made by PGD.
    """

    needs = ("images",)
    uses = ("eps", "alpha", "steps", "points", "seed")
    shared = False

    @abstractmethod
    def place(self, features: np.ndarray, seed: int) -> np.ndarray:
        """Place vectors [N, d] in the plane, [N, 2]."""

    def compute(self, context: AnalysisContext) -> Measured:
        """One row per image and kind: where it is, its label, the model's prediction."""
        settings, model = context.settings, context.model
        samples = context.images
        if len(samples) > settings.points:
            chosen = torch.arange(settings.points) * len(samples) // settings.points
            samples = samples.part(chosen)
        attack = PGD(model, settings.eps, settings.step_size, settings.steps, precision="fp32")
        attack_seed = derive_seed(settings.seed, "analyse/attack")
        noise_seed = derive_seed(settings.seed, "analyse/noise")
        features: dict[str, list[torch.Tensor]] = {kind: [] for kind in KINDS}
        predictions: dict[str, list[int]] = {kind: [] for kind in KINDS}
        with evaluation_mode(model, context.device):
            for x, y, ids in context.batches(samples):
                images = {
                    "clean": x,
                    "noisy": random_start(x, settings.eps, seed=noise_seed, sample_ids=ids),
                    "adversarial": attack(x, y, seed=attack_seed, sample_ids=ids),
                }
                for kind, batch in images.items():
                    features[kind].append(pooled_features(model, batch).cpu())
                    with torch.no_grad():
                        predictions[kind] += model(batch).argmax(1).tolist()
        together = torch.cat([torch.cat(features[kind]) for kind in KINDS]).numpy()
        seed = derive_seed(settings.seed, f"analyse/{self.name}") % 2**32
        places = self.place(together, seed).tolist()
        labels = samples.labels.tolist()
        heads = [
            (image, label, prediction, kind)
            for kind in KINDS
            for image, (label, prediction) in enumerate(zip(labels, predictions[kind], strict=True))
        ]
        rows = tuple((*head, *place) for head, place in zip(heads, places, strict=True))
        summary = {
            f"accuracy, {kind}": float(np.mean(np.equal(predictions[kind], labels)))
            for kind in KINDS
        }
        columns = ("image", "label", "prediction", "kind", "x", "y")
        return Measured(self.name, columns, rows, summary)

    def draw(self, found: Mapping[str, Measured], axes: Axes, style: Style) -> None:
        """One point per image: its colour is the label, its marker the kind."""
        ((_, one),) = found.items()
        colours = _colours(sorted(set(one.column("label"))), style)
        columns = [one.column(name) for name in ("kind", "x", "y", "label")]
        for kind in KINDS:
            cells = [cell for cell in zip(*columns, strict=True) if cell[0] == kind]
            axes.scatter(
                [x for _, x, _, _ in cells],
                [y for _, _, y, _ in cells],
                s=14,
                marker=_MARKERS[kind],
                linewidths=0.8,
                c=[colours[label] for _, _, _, label in cells],
            )
            axes.scatter([], [], marker=_MARKERS[kind], color=style.grey, label=kind)
        if len(colours) <= _MOST_NAMED:
            _name_classes(one, axes, style)
        axes.set_xticks([])
        axes.set_yticks([])
        label_axes(axes, style, "", "")


def _colours(labels: list[int], style: Style) -> dict[int, Any]:
    """A colour of its own for each class."""
    if len(labels) <= len(style.colours):
        return {label: style.colour(number) for number, label in enumerate(labels)}
    from matplotlib import colormaps

    wheel = colormaps["tab20" if len(labels) <= _MOST_NAMED else "gist_rainbow"]
    return {label: wheel(number / len(labels)) for number, label in enumerate(labels)}


def _name_classes(one: Measured, axes: Axes, style: Style) -> None:
    """Write each class in the middle of its clean images."""
    clean = [row for row in one.rows if row[3] == "clean"]
    for label in sorted(set(one.column("label"))):
        places = np.array([row[4:] for row in clean if row[1] == label], dtype=float)
        x, y = np.median(places, axis=0)
        axes.annotate(str(label), (x, y), fontsize=13, weight="bold", color=style.ink)


class TSNEEmbedding(Embedding):
    """t-SNE of scikit-learn, begun from principal components; its perplexity is 30, or less for few images."""

    name = "tsne"
    libraries = ("scikit-learn",)
    title = "t-SNE of features"

    def check(self, settings: AnalysisSettings) -> None:
        """Refuse to begin without scikit-learn."""
        _import_tsne()

    def place(self, features: np.ndarray, seed: int) -> np.ndarray:
        """Place vectors by t-SNE."""
        perplexity = min(30.0, (len(features) - 1) / 3)
        method = _import_tsne()(
            n_components=2, init="pca", perplexity=perplexity, random_state=seed
        )
        return np.asarray(method.fit_transform(features))


class UMAPEmbedding(Embedding):
    """UMAP of umap-learn with 15 neighbours, or fewer for few images."""

    name = "umap"
    libraries = ("umap-learn", "scikit-learn")
    title = "UMAP of features"

    def check(self, settings: AnalysisSettings) -> None:
        """Refuse to begin without umap-learn."""
        _import_umap()

    def place(self, features: np.ndarray, seed: int) -> np.ndarray:
        """Place vectors by UMAP."""
        method = _import_umap()(
            n_components=2, n_neighbors=min(15, len(features) - 1), random_state=seed, n_jobs=1
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about few points, whose number the record has
            return np.asarray(method.fit_transform(features))


def _import_tsne() -> Any:
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise ImportError("tsne needs scikit-learn: pip install scikit-learn") from error
    return TSNE


def _import_umap() -> Any:
    try:
        from umap import UMAP
    except ImportError as error:
        raise ImportError("umap needs umap-learn: pip install umap-learn") from error
    return UMAP
