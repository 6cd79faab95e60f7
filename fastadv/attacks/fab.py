"""The fast adaptive boundary attack (Croce and Hein 2020): small changes that cross the decision boundary.

Source: F. Croce and M. Hein, "Minimally distorted adversarial examples with a fast adaptive boundary attack",
ICML 2020, algorithm 1 without its final search, as AutoAttack runs it. The form with target classes is from Croce
and Hein, "Reliable evaluation of adversarial robustness", ICML 2020.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from fastadv.attacks.arguments import Precision, TrainMode
from fastadv.attacks.attack import Attack, AttackSettings
from fastadv.attacks.batch import AttackBatch
from fastadv.attacks.best import Best, where_images
from fastadv.attacks.leaving import is_time_to_look
from fastadv.attacks.objectives import likeliest_wrong_classes, logit_difference
from fastadv.attacks.options import Setting
from fastadv.attacks.projections import to_hyperplane
from fastadv.engine.engines import Model
from fastadv.ops import random_start
from fastadv.ops.checks import over_samples
from fastadv.ops.values import check_bool, integer, share
from fastadv.seeding import derive_seed

_ORDERS = {"linf": math.inf, "l2": 2.0, "l1": 1.0}
_DUAL_ORDERS = {"linf": 1.0, "l2": 2.0, "l1": math.inf}
_SHORTEST = 1e-8  # a way of length 0 counts as this long, so that the ratio of two lengths exists
_START_RADIUS = 0.5  # radius of the ball in which restarts begin, in units of eps


@dataclass(frozen=True)
class FABSettings(AttackSettings):
    """The settings of a FAB attack, checked on creation. Fields as in `FAB`."""

    steps: int = 100
    target_classes: int | None = 9
    restarts: int = 1
    alpha_max: float = 0.1
    eta: float = 1.05
    beta: float = 0.9
    early_stop: bool = True
    batch_size: int | None = None
    targeted: bool = field(default=False, init=False)
    precision: Precision = field(default="fp32", kw_only=True)

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            TypeError: a field of another type.
            ValueError: a value out of range or an unknown word.
        """
        super().__post_init__()
        integer("steps", self.steps, at_least=1)
        integer("restarts", self.restarts, at_least=1)
        if self.target_classes is not None:
            integer("target_classes", self.target_classes, at_least=1)
        if self.batch_size is not None:
            integer("batch_size", self.batch_size, at_least=1)
        share("alpha_max", self.alpha_max)
        share("beta", self.beta)
        if not 1 <= self.eta < math.inf:
            raise ValueError(f"eta must be finite and >= 1, got {self.eta}")
        check_bool("early_stop", self.early_stop)
        if self.precision == "fp16":  # whose engine scales each sample's gradient
            raise ValueError("precision must be 'auto', 'fp32' or 'bf16', got 'fp16'")


class FAB(Attack):
    """Steps onto the linearised decision boundary, drawn towards the image, until a crossing lies in the ball.

    A step takes the boundary between the label and another class as the hyperplane that the gradient gives. It
    goes a little beyond (``eta``) the nearest point of it within the bounds, as seen from the current point and,
    with a small weight, from the image. After a crossing the search goes on from a point closer to the image
    (``beta``). There is no step size, and scaling the logits changes nothing.

    An image whose smallest change found is within eps comes back with that change. The others come back as they
    were. The results lie close to the boundary that the attack saw. Leave it at full precision unless you do not
    mind that a float32 model gets some of them right.

    Source: Croce and Hein, "Minimally distorted adversarial examples with a fast adaptive boundary attack", ICML
    2020, algorithm 1.

    Args:
        model: as in `fastadv.PGD`.
        eps: radius of the ball, in the units of the images.
        steps: number of steps of a run; each costs two forward passes and one backward pass.
        target_classes: number of wrong classes, each with a run towards it, the likeliest first ("fab-t" of
            AutoAttack). None: one run, in which each step goes towards the nearest of all classes ("fab"); such a
            step costs a forward and a backward pass for every class.
        restarts: number of runs; all but the first begin at a random point of the ball of half the radius.
        alpha_max: the largest share of the step that starts at the image, in 0..1.
        eta: length of a step, in units of the distance to the hyperplane; at least 1.
        beta: the point from which a run continues after a crossing, as a share of the way from the image to the
            crossing, in 0..1.
        early_stop: an image leaves the batch at the first crossing in the ball. False: no run is cut short, and
            the smallest change of all is returned.
        batch_size: after images have left, several runs of the other images share a batch of up to this size, or
            of the call's batch size if it is larger. The results equal the results of one run after the other.
        norm: as in `fastadv.PGD`.
        bounds: as in `fastadv.PGD`.
        precision: ``"fp32"``, ``"bf16"`` or ``"auto"``.
        engine: as in `fastadv.PGD`, but for ``"graph"``.
        train_mode: as in `fastadv.PGD`; no image leaves then.
        seed: as in `fastadv.PGD`.
        check_inputs: as in `fastadv.PGD`.

    Raises:
        TypeError: as in `fastadv.PGD`.
        ValueError: as in `fastadv.PGD`.
    """

    settings: FABSettings
    steps = Setting[int]()
    target_classes = Setting[int | None]()
    restarts = Setting[int]()
    alpha_max = Setting[float]()
    eta = Setting[float]()
    beta = Setting[float]()
    early_stop = Setting[bool]()
    batch_size = Setting[int | None]()

    def __init__(
        self,
        model: Model,
        eps: float = 8 / 255,
        steps: int = 100,
        target_classes: int | None = 9,
        *,
        restarts: int = 1,
        alpha_max: float = 0.1,
        eta: float = 1.05,
        beta: float = 0.9,
        early_stop: bool = True,
        batch_size: int | None = None,
        norm: str = "linf",
        bounds: tuple[float, float] = (0.0, 1.0),
        precision: Literal["auto", "fp32", "bf16"] = "fp32",
        engine: Literal["auto", "fixed", "eager", "compiled"] = "auto",
        train_mode: TrainMode = False,
        seed: int | None = None,
        check_inputs: bool = True,
    ) -> None:
        chosen = FABSettings(
            eps,
            steps,
            target_classes,
            restarts,
            alpha_max,
            eta,
            beta,
            early_stop,
            batch_size,
            norm=norm,
            bounds=bounds,
            precision=precision,
            engine=engine,
            train_mode=train_mode,
        )
        super().__init__(model, chosen, seed, check_inputs)

    def _perturb(self, batch: AttackBatch, seed: int) -> Tensor:
        # `rows` gives the samples their ids, which they keep when others leave.
        batch = batch.rows(torch.arange(batch.x.shape[0], device=batch.x.device))
        clean, best = batch.logits(batch.x), Best()
        _offer(best, batch, batch.x, batch.succeeded(clean))
        runs = list(self._runs(batch, clean, seed))
        while runs and (rows := self._left(best)).numel():
            count = self._runs_at_once(batch, rows)
            self._run_together(batch, best, rows, runs[:count])
            runs = runs[count:]
        return batch.project_(where_images(best.succeeded, best.images, batch.x))

    def _runs(
        self, batch: AttackBatch, clean: Tensor, seed: int
    ) -> Iterator[tuple[Tensor, int | None]]:
        """For each run the classes that it may go to, [B, 1] or all, and the seed of a random start."""
        count, others = self.settings.target_classes, clean.shape[1] - 1
        classes = likeliest_wrong_classes(clean, batch.y, others if count is None else count)
        for number, some in enumerate((classes,) if count is None else classes.split(1, dim=1)):
            yield some, None
            for restart in range(1, self.settings.restarts):
                yield some, derive_seed(seed, "restart", number, restart)

    def _runs_at_once(self, batch: AttackBatch, rows: Tensor) -> int:
        if not self._leaves:  # the best run of each image counts, and BatchNorm may mix images
            return 1
        return max(1, max(batch.x.shape[0], self.batch_size or 0) // rows.numel())

    def _run_together(
        self, batch: AttackBatch, best: Best, rows: Tensor, runs: list[tuple[Tensor, int | None]]
    ) -> None:
        """Carry out runs of some images side by side; for each image the first run that succeeds counts."""
        some = batch.rows(rows)
        starts = torch.cat([self._start(some, seed) for _, seed in runs])
        aims = torch.cat([classes[rows] for classes, _ in runs])
        found = self._run(batch.rows(rows.repeat(len(runs))), aims, starts)
        for number in range(len(runs)):
            open_ = (
                self._left(best.rows(rows))
                if number
                else torch.arange(len(rows), device=rows.device)
            )
            if open_.numel() == 0:
                return
            best.merge(found.rows(number * len(rows) + open_), rows[open_])

    def _start(self, batch: AttackBatch, seed: int | None) -> Tensor:
        """The points at which a run begins: the given start or the images, or random points near them."""
        if seed is None:
            return batch.start(0, random=False)
        radius = _START_RADIUS * batch.eps
        ids = batch.sample_ids
        return random_start(batch.x, radius, batch.norm, batch.bounds, seed, sample_ids=ids)

    def _run(self, batch: AttackBatch, classes: Tensor, adv: Tensor) -> Best:
        """Algorithm 1 from one start, on a batch that images leave."""
        rows, best, result = torch.arange(batch.x.shape[0], device=batch.x.device), Best(), Best()
        for step in range(1, self.settings.steps + 1):
            adv = self._step(batch, adv, *_nearest_boundary(batch, adv, classes))
            crossed = batch.succeeded(batch.logits(adv))
            _offer(best, batch, adv, crossed)
            if step == 1:
                result.merge(best)
            closer = batch.x + self.settings.beta * (adv - batch.x)
            adv = where_images(crossed, closer, adv)
            if is_time_to_look(step, batch.x.device):
                going = self._left(best)
                if len(going) < len(rows):
                    result.merge(best, rows)
                    if len(going) == 0:
                        return result
                    rows, adv, classes = rows[going], adv[going], classes[going]
                    batch, best = batch.rows(going), best.rows(going)
        result.merge(best, rows)
        return result

    @property
    def _leaves(self) -> bool:
        return self.settings.early_stop and not self.settings.train_mode

    def _left(self, best: Best) -> Tensor:
        """The indices of the images that are still attacked; this may wait for the device."""
        if self._leaves:
            return (~best.succeeded).nonzero().flatten()
        return torch.arange(best.value.shape[0], device=best.value.device)

    def _step(self, batch: AttackBatch, adv: Tensor, normal: Tensor, gap: Tensor) -> Tensor:
        """The next point (algorithm 1, line 9), from a hyperplane ``normal . (z - adv) = gap``."""
        settings, x = self.settings, batch.x
        from_image = (normal.double() * (adv - x)).flatten(1).sum(1) + gap
        both, twice = torch.cat((adv, x)), torch.cat((normal, normal))
        gaps = torch.cat((gap.double(), from_image))
        ways = to_hyperplane(both, twice, gaps, settings.norm, settings.bounds)
        lengths = _lengths(ways, settings.norm).clamp(min=_SHORTEST).to(x.dtype)
        (way, image_way), (length, image_length) = ways.chunk(2), lengths.chunk(2)
        part = over_samples((length / (length + image_length)).clamp(max=settings.alpha_max), x)
        moved = (1 - part) * (adv + settings.eta * way) + part * (x + settings.eta * image_way)
        return moved.clamp(*settings.bounds)


def _nearest_boundary(batch: AttackBatch, adv: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest of the linearised boundaries between the labels and other classes [B, K].

    Returns:
        Normals [B, ...], and [B] by how much ``normal . adv`` has to rise to reach the boundary.
    """
    normal, gap, distance = torch.zeros_like(adv), *adv.new_zeros(2, *batch.y.shape)
    for number, target in enumerate(classes.unbind(1)):
        found = batch.gradient(adv, partial(logit_difference, y=batch.y, target=target))
        batch.count(found.grad)
        grad = found.grad.to(adv.dtype)
        if classes.shape[1] == 1:
            return grad, -found.value
        dual = torch.linalg.vector_norm(grad.flatten(1), _DUAL_ORDERS[batch.norm], dim=1)
        away = (found.value.abs() / dual).nan_to_num(torch.inf, torch.inf)
        nearer = away < distance if number else torch.ones_like(away, dtype=torch.bool)
        normal = where_images(nearer, grad, normal)
        gap = torch.where(nearer, -found.value, gap)
        distance = torch.where(nearer, away, distance)
    return normal, gap


def _offer(best: Best, batch: AttackBatch, adv: Tensor, crossed: Tensor) -> None:
    """Keep the crossings [B] that are nearer than the known ones; one in the ball is a success."""
    distance = _lengths(adv - batch.x, batch.norm)
    value = torch.where(crossed, -distance, -torch.inf)
    best.offer(adv, value, crossed & (distance <= batch.eps))


def _lengths(delta: Tensor, norm: str) -> Tensor:
    """Norms [B] float64 of changes [B, ...]."""
    if norm == "linf":  # no sum, so that nothing is lost in the narrower type, in which it is fast
        return delta.flatten(1).abs().amax(1).double()
    return torch.linalg.vector_norm(delta.flatten(1), _ORDERS[norm], dim=1, dtype=torch.float64)
