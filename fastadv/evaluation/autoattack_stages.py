"""The code that runs each attack of AutoAttack: Auto-PGD in a pool, another attack of ours, or the reference."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from fastadv.attacks import APGD, FAB, Square
from fastadv.attacks.apgd_pool import NORMS
from fastadv.attacks.attack import Attack
from fastadv.attacks.attack_warnings import nan_warnings
from fastadv.evaluation.autoattack_pool import LOSSES, PoolSearch
from fastadv.evaluation.autoattack_run import APGD_STEPS, FP32, TARGET_CLASSES, AutoAttackRun
from fastadv.evaluation.autoattack_state import BatchRecord
from fastadv.evaluation.result_row import REFERENCE
from fastadv.evaluation.verify import Audit
from fastadv.seeding import derive_seed


@dataclass(frozen=True)
class StandardAttack:
    """An attack of this package that takes a batch at a time.

    Attributes:
        kind: the attack's class.
        settings: its settings in AutoAttack's standard version.
        thorough: whether the other images of a batch are attacked in float32 as well, once a search in a narrower
            precision breaks one of them. Square breaks few images that gradient attacks leave, unless gradients
            are masked. Then its result matters, and rounding would weaken it.
    """

    kind: Callable[..., Attack]
    settings: dict[str, Any]
    thorough: bool = False


# In l1 Auto-PGD runs in balls of three sizes, which the pool does not support, and has other numbers of restarts
# and target classes (those of pyautoattack's standard version).
_RESTARTS_L1, _TARGET_CLASSES_L1 = 5, 5

BY_BATCH = {
    "fab": StandardAttack(FAB, {"steps": 100, "target_classes": None}),
    "fab-t": StandardAttack(FAB, {"steps": 100, "target_classes": TARGET_CLASSES}),
    "square": StandardAttack(Square, {"queries": 5000}, thorough=True),
}
BY_BATCH_L1 = BY_BATCH | {
    "apgd-ce": StandardAttack(APGD, {"steps": APGD_STEPS, "restarts": _RESTARTS_L1, "loss": "ce"}),
    "apgd-dlr": StandardAttack(
        APGD, {"steps": APGD_STEPS, "restarts": _RESTARTS_L1, "loss": "dlr"}
    ),
    "apgd-t": StandardAttack(
        APGD, {"steps": APGD_STEPS, "loss": "dlr-t", "target_classes": _TARGET_CLASSES_L1}
    ),
}


class Search(Protocol):
    """One attack on the images that are left."""

    @property
    def by(self) -> str:
        """The precision of the search, as in `AutoAttackRun.search`."""

    def run(self, remaining: Tensor) -> list[BatchRecord]:
        """Attack the images with indices [R], and return their records, including the records of the state."""


def search_for(run: AutoAttackRun, attack: str) -> Search:
    """The search that carries out an attack."""
    if run.search == REFERENCE:
        return ReferenceSearch(run, attack)
    if attack in LOSSES and run.runner.norm in NORMS:
        return PoolSearch(run, attack)
    return EngineSearch(run, attack)


class BatchSearch:
    """An attack that takes the images in batches, in their order.

    Args:
        run: the run of AutoAttack.
        attack: name of the attack.
    """

    by = REFERENCE

    def __init__(self, run: AutoAttackRun, attack: str) -> None:
        self._run, self._attack = run, attack
        self._rows = run.runner.batch_size

    def run(self, remaining: Tensor) -> list[BatchRecord]:
        """Attack images; see `Search.run`."""
        runner, state = self._run.runner, self._run.state
        batches = runner.samples.batches(self._rows, remaining)
        bar = runner.progress.bar(batches, f"autoattack {self._attack}", len(batches))
        records = []
        for number, indices in enumerate(bar):
            record = state.load(self._attack, number, indices) if state else None
            if record is None:
                record = self._batch(indices)
                if state:
                    state.save(self._attack, number, record)
            records.append(record)
        return records

    def _batch(self, indices: Tensor) -> BatchRecord:
        """Attack one batch and check the result, independently of the attack."""
        begun, audit = time.perf_counter(), self._run.audit()
        x, y = self._run.runner.samples.take(indices, self._run.runner.device)
        found, warnings = self._perturb(x, y, indices)
        adv, fooled = self._run.judged(indices, found, audit)
        refined, seconds, more = self._refine_batch(indices, found, adv, fooled, audit)
        return BatchRecord(
            indices=indices.clone(),
            fooled=indices[fooled],
            adversarial=adv[fooled],
            violations=audit.found.as_dict(),
            warnings=[*warnings, *more],
            seconds=time.perf_counter() - begun,
            refined=refined,
            refinement_seconds=seconds,
        )

    def _perturb(self, x: Tensor, y: Tensor, indices: Tensor) -> tuple[Tensor, list[str]]:
        """Adversarial images [B, C, H, W] and warnings."""
        raise NotImplementedError

    def _refine_batch(
        self, indices: Tensor, found: Tensor, adv: Tensor, fooled: Tensor, audit: Audit
    ) -> tuple[int, float, list[str]]:
        """Search again in float32 where the engine was wrong.

        Successes are written to ``adv`` and ``fooled``.

        Returns:
            The number of images broken in this way, the seconds, and warnings.
        """
        return 0, 0.0, []


class ReferenceSearch(BatchSearch):
    """An attack of the reference implementation, in float32."""

    def _perturb(self, x: Tensor, y: Tensor, indices: Tensor) -> tuple[Tensor, list[str]]:
        assert self._run.library is not None
        return self._run.library.perturb(self._attack, x, y)


class EngineSearch(BatchSearch):
    """An attack of this package that takes a batch at a time."""

    def __init__(self, run: AutoAttackRun, attack: str) -> None:
        super().__init__(run, attack)
        self._rows = run.rows
        self._standard = (BY_BATCH_L1 if run.runner.norm == "l1" else BY_BATCH)[attack]
        self._seed = derive_seed(run.runner.seed, f"autoattack/{attack}")
        self._narrow = self._make("auto" if run.is_narrow else FP32)
        self._narrow.share_engines(run.narrow)
        self._wide = self._make(FP32)
        self._exact = None
        if run.exact is not None:
            self._exact = self._make(FP32, engine="compiled")
            self._exact.share_engines(run.exact)
        self.by = run.search

    def _make(self, precision: str, engine: str = "fixed") -> Attack:
        standard, runner = self._standard, self._run.runner
        return standard.kind(
            runner.model,
            self._run.eps,
            norm=runner.norm,
            bounds=runner.samples.bounds,
            precision=precision,
            engine=engine,
            **standard.settings,
            **({"batch_size": self._rows} if standard.kind is FAB else {}),
        )

    def _perturb(self, x: Tensor, y: Tensor, indices: Tensor) -> tuple[Tensor, list[str]]:
        ids = self._run.ids_of(indices)
        found = self._narrow(x, y, seed=self._seed, sample_ids=ids)
        return found, _doubts(self._narrow)

    def _refine_batch(
        self, indices: Tensor, found: Tensor, adv: Tensor, fooled: Tensor, audit: Audit
    ) -> tuple[int, float, list[str]]:
        warnings: list[str] = []
        if not self._run.is_narrow:
            return 0, 0.0, warnings
        begun, refined = time.perf_counter(), 0
        x, y = self._run.runner.samples.take(indices, self._run.runner.device)
        chosen = ~fooled
        thorough = self._standard.thorough and self._run.search != FP32
        if not (thorough and bool(fooled.any())):
            chosen &= self._misclassified_by_engine(self._narrow, found, y).cpu()
        if not bool(chosen.any()):
            return 0, 0.0, warnings
        for attack in self._in_float32(x[chosen]):
            rows = chosen.nonzero().flatten()
            if len(rows) == 0:
                break
            some = indices[rows]
            ids = self._run.ids_of(some)
            tried = attack(x[chosen], y[chosen], seed=self._seed, sample_ids=ids)
            warnings += _doubts(attack)
            adv[rows], fooled[rows] = self._run.judged(some, tried, audit)
            refined += int(fooled[rows].sum())
            # The plain model attacks only the images that the copy misclassifies and the plain model does not.
            chosen[rows] = (
                self._misclassified_by_engine(attack, tried, y[chosen]).cpu() & ~fooled[rows]
            )
        return refined, time.perf_counter() - begun, warnings

    def _in_float32(self, x: Tensor) -> list[Attack]:
        """The attack on a float32 copy of the model, if there is one for such images, and on the plain model."""
        if self._exact is not None:
            try:
                self._exact.engine_for(x)
                return [self._exact, self._wide]
            except ValueError:
                self._exact = None
        return [self._wide]

    def _misclassified_by_engine(self, attack: Attack, found: Tensor, y: Tensor) -> Tensor:
        """Which images an attack's engine misclassifies, [B] bool."""
        engine = attack.engine_for(found)
        with engine.session(attack.model, self._seed, current=True):
            return engine.logits(engine.images(found)).argmax(1) != y


def _doubts(attack: Attack) -> list[str]:
    """The warnings if the last call of an attack met NaN among the logits, or useless gradients."""
    return nan_warnings(attack.last.nan_points, attack.last.nan_gradients)
