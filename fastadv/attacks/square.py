"""The Square attack (Andriushchenko et al. 2020): random search that sees logits and no gradient."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from fastadv.attacks.arguments import Precision, TrainMode
from fastadv.attacks.attack import Attack, AttackSettings
from fastadv.attacks.batch import AttackBatch
from fastadv.attacks.best import Best, best_of_runs
from fastadv.attacks.leaving import is_time_to_look
from fastadv.attacks.objectives import Objective
from fastadv.attacks.options import Setting
from fastadv.attacks.square_ahead import (
    DRAWN_AT_ONCE,
    AcceptedShare,
    AheadSearch,
    queries_at_once,
    words_of_queries,
)
from fastadv.attacks.square_proposals import proposals_for
from fastadv.engine.engines import Model
from fastadv.ops.pgd_step_per_channel import Bounds
from fastadv.ops.values import check_bool, integer, number

Loss = Literal["cw", "ce"]
# Numbers of queries after which the fraction of the image that a square covers is halved, in a search of 10000.
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
_FULL_SCHEDULE = 10000


@dataclass(frozen=True)
class SquareSettings(AttackSettings):
    """The settings of a Square attack, checked on creation. Fields as in `Square`."""

    queries: int = 5000
    p_init: float = 0.8
    restarts: int = 1
    loss: Loss = "cw"
    rescale_schedule: bool = False
    precision: Precision = field(default="fp32", kw_only=True)

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            TypeError: a field of another type.
            ValueError: a value out of range or an unknown word.
        """
        super().__post_init__()
        integer("queries", self.queries, at_least=1)
        integer("restarts", self.restarts, at_least=1)
        check_bool("rescale_schedule", self.rescale_schedule)
        if not 0 < number("p_init", self.p_init) <= 1:
            raise ValueError(f"p_init must be above 0 and at most 1, got {self.p_init}")


class Square(Attack):
    """Random search: squares of an image are changed, and a change that raises the loss is kept.

    It needs no gradient, so it also shows whether a model merely hides its gradients. The defaults come from
    AutoAttack's standard version, which has the schedule of 10000 queries and stops at 5000. Every image
    draws squares of its own. An image leaves the batch once it is broken; with ``train_mode`` it stays, unchanged.
    Sources: Andriushchenko, Croce, Flammarion and Hein, "Square attack: a query-efficient black-box adversarial
    attack via random search", ECCV 2020; in l1 Croce and Hein, "Mind the box", ICML 2021.

    The last squares are small, and so are the changes of the loss. A narrow precision rounds some of them away,
    and breaks fewer images. The default is full precision.

    Args:
        model: as in `fastadv.PGD`.
        eps: as in `fastadv.PGD`.
        queries: number of points to try for an image in a run, at least 1; each costs one forward pass.
        p_init: fraction of the image that the first squares cover, above 0 and at most 1.
        restarts: runs from different random starts; each attacks only the images that withstood the earlier runs.
        loss: the loss to maximise: ``"cw"`` (margin) or ``"ce"``.
        rescale_schedule: scale the schedule by which squares shrink to ``queries``; otherwise it is the schedule
            of 10000 queries.
        norm: as in `fastadv.PGD`.
        bounds: as in `fastadv.PGD`.
        targeted: as in `fastadv.PGD`.
        precision: as in `fastadv.PGD`.
        engine: as in `fastadv.PGD`, but for ``"graph"``.
        train_mode: as in `fastadv.PGD`.
        seed: as in `fastadv.PGD`.
        check_inputs: as in `fastadv.PGD`.

    Raises:
        TypeError: as in `fastadv.PGD`.
        ValueError: as in `fastadv.PGD`; also images that are not [B, C, H, W].
    """

    settings: SquareSettings
    queries = Setting[int]()
    p_init = Setting[float]()
    restarts = Setting[int]()
    loss = Setting[Loss]()
    rescale_schedule = Setting[bool]()

    def __init__(
        self,
        model: Model,
        eps: float = 8 / 255,
        queries: int = 5000,
        *,
        p_init: float = 0.8,
        restarts: int = 1,
        loss: Loss = "cw",
        rescale_schedule: bool = False,
        norm: str = "linf",
        bounds: tuple[float, float] = (0.0, 1.0),
        targeted: bool = False,
        precision: Precision = "fp32",
        engine: Literal["auto", "fixed", "eager", "compiled"] = "auto",
        train_mode: TrainMode = False,
        seed: int | None = None,
        check_inputs: bool = True,
    ) -> None:
        chosen = SquareSettings(
            eps,
            queries,
            p_init,
            restarts,
            loss,
            rescale_schedule,
            norm=norm,
            bounds=bounds,
            targeted=targeted,
            precision=precision,
            engine=engine,
            train_mode=train_mode,
        )
        super().__init__(model, chosen, seed, check_inputs)

    def _radius(self, x: Tensor, eps: float | Tensor | None, bounds: Bounds) -> float | Tensor:
        if x.dim() != 4:
            raise ValueError(
                f"x must have shape [B, C, H, W] for Square, whose changes are squares, got {tuple(x.shape)}"
            )
        return super()._radius(x, eps, bounds)

    def _perturb(self, batch: AttackBatch, seed: int) -> Tensor:
        # `rows` gives the samples their ids, which they keep when others leave.
        batch = batch.rows(torch.arange(batch.x.shape[0], device=batch.x.device))
        runs = [None] * self.settings.restarts
        return best_of_runs(self._run, batch, runs, seed, whole=bool(self.settings.train_mode))

    def _run(self, batch: AttackBatch, target: Tensor | None, seed: int) -> Best:
        """One random search. Broken images no longer change, and leave the batch when it is time to look.

        When few images are left, the search goes on with several queries in a pass, if each image's logits do not
        depend on the other images.
        """
        settings, rows = self.settings, torch.arange(batch.x.shape[0], device=batch.x.device)
        search, result = _Search(batch, settings, seed), Best()
        result.merge(search.best)
        independent = not settings.train_mode and batch.engine.any_batch
        for query in range(1, settings.queries):
            if not settings.train_mode and is_time_to_look(query, batch.x.device):
                going = (~search.best.succeeded).nonzero().flatten()
                if len(going) < len(rows):
                    result.merge(search.best, rows)
                    if len(going) == 0:
                        return result
                    rows = rows[going]
                    search.keep(going)
                if independent and search.is_worth_looking_ahead():
                    search.ahead(query).carry_out(result, rows)
                    return result
            search.step(query)
        result.merge(search.best, rows)
        return result


class _Search:
    """A random search on a batch that may become smaller.

    Attributes:
        best: the best images so far.
    """

    def __init__(self, batch: AttackBatch, settings: SquareSettings, seed: int) -> None:
        self._batch, self._settings, self._seed = batch, settings, seed
        self._objective = Objective(settings.loss, settings.targeted)
        self._proposals = proposals_for(batch)
        self._accepted = AcceptedShare()
        self._changed: int | Tensor = 0  # number of points that changed their images
        self._tried = 0  # number of points that were tried
        self._words = self._draw(-1, 1, self._proposals.first_words)
        self.best = Best()
        if batch.given_start is not None:
            self._try(batch.start(seed))
        else:
            self._try(self._proposals.first(self._words[:, 0]))

    def step(self, query: int) -> None:
        """Try another point for every image, from the random words of this query, 1 or more."""
        number = (query - 1) % DRAWN_AT_ONCE
        if number == 0:
            count = min(DRAWN_AT_ONCE, self._settings.queries - query)
            block = (query - 1) // DRAWN_AT_ONCE
            self._words = self._draw(block, count, self._proposals.next_words)
        side = self._proposals.side_of(share_at(query - 1, self._settings))
        self._try(self._proposals.next(self.best.images, self._words[:, number], side))

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the images."""
        self.best = self.best.rows(rows)
        self._batch, self._words = self._batch.rows(rows), self._words[rows]
        self._proposals = self._proposals.rows(rows)

    def is_worth_looking_ahead(self) -> bool:
        """Whether several queries of an image are worth one pass; called when it is time to look."""
        self._accepted.see(int(self._changed), self._tried)
        self._changed, self._tried = 0, 0
        return queries_at_once(self._batch.x, self._accepted) > 1

    def ahead(self, query: int) -> AheadSearch:
        """The rest of the search from this query on, with several queries in a pass."""
        return AheadSearch(
            self._batch,
            self.best,
            self._objective,
            partial(share_at, settings=self._settings),
            self._seed,
            query,
            self._settings.queries,
            self._accepted,
        )

    def _try(self, adv: Tensor) -> None:
        logits = self._batch.logits(adv)
        succeeded = self._batch.succeeded(logits)
        if hasattr(self.best, "succeeded"):
            succeeded = succeeded & ~self.best.succeeded
        before = getattr(self.best, "value", None)
        self.best.offer(adv, self._objective(logits, self._batch.y), succeeded)
        if before is not None:
            self._changed = self._changed + (self.best.value != before).sum()
            self._tried += len(adv)

    def _draw(self, block: int, queries: int, words: int) -> Tensor:
        """Random words for the first queries of a block, -1 for the first point, [B, queries, words] int64."""
        ids = self._batch.sample_ids
        assert ids is not None
        return words_of_queries(self._seed, ids, block, queries, words)


def share_at(query: int, settings: SquareSettings) -> float:
    """The share of the image that a square covers; it is halved after 10, 50, 200 ... of 10000 queries."""
    if settings.rescale_schedule:
        query = query * _FULL_SCHEDULE // settings.queries
    return settings.p_init * 0.5 ** sum(query > halving for halving in _HALVINGS)
