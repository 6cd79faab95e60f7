"""AFS's delta z: how much an attack lowers the margin of each extractor, over the radius of its training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fastadv.attacks import PGD
from fastadv.evaluation.context import evaluation_mode
from fastadv.evaluation.samples import as_samples, check_batch_size
from fastadv.ops.values import integer, limit, shown


@dataclass(frozen=True)
class DeltaZ:
    """The effect of an attack on the margins of several extractors.

    Attributes:
        radii: radius for which each extractor was trained, ascending.
        margin: mean margin on clean images, the logit of the label minus the largest other logit.
        delta_z: mean decrease of the margin under the attack; AFS calls it delta z.
        curvature: second divided differences of `delta_z` over `radii`, one for each inner radius.
    """

    radii: tuple[float, ...]
    margin: tuple[float, ...]
    delta_z: tuple[float, ...]
    curvature: tuple[float, ...]

    @property
    def concave(self) -> bool:
        """Whether `delta_z` is a concave function of the radius at every inner radius."""
        return all(value <= 0 for value in self.curvature)


def delta_z(
    extractors: Mapping[float, nn.Module],
    data: Any,
    *,
    eps: float = 8 / 255,
    steps: int = 20,
    batch_size: int = 256,
    max_examples: int | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
) -> DeltaZ:
    """Measure delta z of each extractor, and whether it is concave in the radius of the extractor's training.

    AFS chooses extractors by this concavity. Where it holds, a stack of several extractors is expected to have a
    better trade-off than a single network. Source: Liu and Zhao 2021, equations 8 to 10. Our reading of them is
    that delta z is the mean decrease of each network's own margin under PGD on its own cross-entropy.

    Args:
        extractors: the networks by the radius of their training, at least three.
        data: as for ``evaluate``; a few hundred images are enough.
        eps: radius of the linf attack, the same for all networks.
        steps: number of steps of PGD, each of size eps / 4, in float32.
        batch_size: images per pass.
        max_examples: use only so many images, as for ``evaluate``.
        device: as for ``evaluate``.
        seed: seed of the random start.

    Returns:
        Delta z of each extractor, by its radius, and whether it is concave.

    Raises:
        ValueError: for fewer than three extractors, or numbers out of range.
    """
    if not isinstance(extractors, Mapping):
        raise TypeError(f"extractors must be models by their radii, got {shown(extractors)}")
    for radius in extractors:
        limit("radius in extractors", radius)
    eps, steps = limit("eps", eps), integer("steps", steps, at_least=1)
    if len(extractors) < 3:
        raise ValueError(f"extractors must be at least 3, for curvature, got {len(extractors)}")
    samples = as_samples(data, (0.0, 1.0), max_examples)
    check_batch_size(batch_size)
    radii = tuple(sorted(extractors))
    margins, drops = [], []
    for radius in radii:
        model, clean, attacked = extractors[radius], 0.0, 0.0
        with evaluation_mode(model, device) as where:
            attack = PGD(model, eps, eps / 4, steps, precision="fp32")
            for indices in samples.batches(batch_size):
                x, y = samples.take(indices, where)
                adv = attack(x, y, seed=seed, sample_ids=indices.to(where))
                with torch.no_grad():
                    clean += float(_margin(model(x), y).sum())
                    attacked += float(_margin(model(adv), y).sum())
        margins.append(clean / len(samples))
        drops.append((clean - attacked) / len(samples))
    return DeltaZ(radii, tuple(margins), tuple(drops), _curvature(radii, drops))


def _margin(logits: Tensor, y: Tensor) -> Tensor:
    """The logit of the label minus the largest other logit, [B, C] -> [B]."""
    right = logits.gather(1, y[:, None]).squeeze(1)
    others = logits.scatter(1, y[:, None], -torch.inf)
    return right - others.amax(1)


def _curvature(radii: tuple[float, ...], values: list[float]) -> tuple[float, ...]:
    points = list(zip(radii, values, strict=True))
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(points)]
    middles = [(a + b) / 2 for a, b in pairwise(radii)]
    return tuple(
        (right - left) / (after - before)
        for (left, right), (before, after) in zip(pairwise(slopes), pairwise(middles), strict=True)
    )
