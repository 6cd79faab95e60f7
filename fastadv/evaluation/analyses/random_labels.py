"""The analysis "random-labels": how well random labels can be learned from a model's features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from fastadv.evaluation.analyses.analysis import (
    Analysis,
    AnalysisContext,
    Measured,
    label_axes,
    pooled_features,
)
from fastadv.evaluation.context import evaluation_mode, private_generators
from fastadv.evaluation.plot_style import MARKERS, Style
from fastadv.seeding import derive_seed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_HIDDEN = (400, 200)
_BATCH = 128


class RandomLabelFit(Analysis):
    """Training accuracy of a network with hidden layers of 400 and 200 on frozen features and random labels.

    Source: ACT, figure 3. The features are the pooled vectors of the training images. The rest is our choice. The
    mean of each feature is subtracted, and all features are divided by one number so that their mean variance is
    1, because the magnitude of a model's features does not matter here. The optimiser is Adam with a learning rate
    of .001 and batches of 128.
    """

    name = "random-labels"
    title = "Fit of random labels on frozen features"
    needs = ("train",)
    uses = ("epochs", "seed")

    def compute(self, context: AnalysisContext) -> Measured:
        """One row per epoch: loss and accuracy in it, each image seen once."""
        samples, parts = context.train_images, []
        with evaluation_mode(context.model, context.device):
            for x, _, _ in context.batches(samples):
                parts.append(pooled_features(context.model, x))
        features = torch.cat(parts)
        features = features - features.mean(0)
        features = features / features.square().mean().sqrt().clamp(min=1e-12)
        classes = samples.num_classes or int(samples.labels.max()) + 1
        seed = derive_seed(context.settings.seed, "analyse/random-labels")
        with private_generators(seed), torch.enable_grad():
            labels = torch.randint(classes, (len(features),)).to(context.device)
            rows = _train(features, labels, classes, context.settings.epochs)
        summary = {"accuracy in the last epoch": rows[-1][2], "chance": 1 / classes}
        return Measured(self.name, ("epoch", "loss", "accuracy"), tuple(rows), summary)

    def draw(self, found: Mapping[str, Measured], axes: Axes, style: Style) -> None:
        """One curve per model."""
        for number, (name, one) in enumerate(found.items()):
            axes.plot(
                one.column("epoch"),
                [100 * accuracy for accuracy in one.column("accuracy")],
                marker=MARKERS[number % len(MARKERS)],
                markersize=4,
                color=style.colour(number),
                label=name,
            )
        axes.set_ylim(0, 100)
        label_axes(axes, style, "epoch", "accuracy on random labels (%)")


def _train(
    features: torch.Tensor, labels: torch.Tensor, classes: int, epochs: int
) -> list[tuple[int, float, float]]:
    """Train the network: epoch, mean loss and accuracy of the training batches."""
    widths = (features.shape[1], *_HIDDEN)
    layers: list[nn.Module] = []
    for wide, narrow in zip(widths, _HIDDEN, strict=False):
        layers += [nn.Linear(wide, narrow), nn.ReLU()]
    network = nn.Sequential(*layers, nn.Linear(_HIDDEN[-1], classes)).to(features.device)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    rows = []
    for epoch in range(1, epochs + 1):
        loss_sum = correct = 0.0
        for rows_of_batch in torch.randperm(len(features)).split(_BATCH):
            x, y = features[rows_of_batch], labels[rows_of_batch]
            logits = network(x)
            loss = nn.functional.cross_entropy(logits, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss_sum += float(loss.detach()) * len(y)
            correct += int((logits.argmax(1) == y).sum())
        rows.append((epoch, loss_sum / len(features), correct / len(features)))
    return rows
