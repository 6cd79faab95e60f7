"""The settings of analyses: radii, steps, numbers of images, seed."""

from __future__ import annotations

from dataclasses import dataclass

from fastadv.fields import check_fields
from fastadv.ops.values import integer, limit

_RADII = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 80, 100)


@dataclass(frozen=True)
class AnalysisSettings:
    """The settings of all analyses, in linf and for images in 0..1. Each analysis uses some of them.

    Attributes:
        eps: radius of the noise and of the attack.
        alpha: step size of PGD; None means a quarter of the radius.
        steps: number of steps of PGD.
        radii: radii of `eps-curve`.
        step_counts: numbers of steps of `steps-curve`.
        max_eps: largest radius that `minimum` tries.
        pictures: number of images that `minimum` shows.
        epochs: epochs for which `random-labels` trains its network.
        points: number of images that `tsne` and `umap` show, three times each.
        extractor_eps: radius for which each extractor of a merger was trained, for `delta-z`; empty for 3/255 to
            8/255, the radii of AFS, where there are six extractors.
        batch_size: images per pass.
        seed: seed of the random numbers.
    """

    eps: float = 8 / 255
    alpha: float | None = None
    steps: int = 20
    radii: tuple[float, ...] = tuple(k / 255 for k in _RADII)
    step_counts: tuple[int, ...] = (1, 2, 5, 10, 20, 50, 100)
    max_eps: float = 0.5
    pictures: int = 8
    epochs: int = 30
    points: int = 300
    extractor_eps: tuple[float, ...] = ()
    batch_size: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            TypeError: a field of another type.
            ValueError: a value out of range.
        """
        check_fields(self)
        for name in ("eps", "max_eps"):
            self._check_radius(name, getattr(self, name))
        if self.alpha is not None and not 0 < limit("alpha", self.alpha) < 2:
            raise ValueError(f"alpha must be > 0 and < 2, got {self.alpha}")
        for name in ("steps", "epochs", "batch_size"):
            integer(name, getattr(self, name), at_least=1)
        integer("pictures", self.pictures, at_least=0)
        integer("points", self.points, at_least=2)
        for name in ("radii", "step_counts"):
            values = getattr(self, name)
            if not values or list(values) != sorted(set(values)):
                raise ValueError(f"{name} must be ascending and at least one, got {values}")
        for radius in self.radii:
            self._check_radius("radii", radius)
        for count in self.step_counts:
            integer("step_counts", count, at_least=1)
        for radius in self.extractor_eps:
            limit("extractor_eps", radius)

    @staticmethod
    def _check_radius(name: str, value: float) -> None:
        if not 0 < limit(name, value) <= 1:
            raise ValueError(f"{name} must be > 0 and at most 1, got {value}")

    @property
    def step_size(self) -> float:
        """The step size of PGD at `eps`."""
        return self.eps / 4 if self.alpha is None else self.alpha
