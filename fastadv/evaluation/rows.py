"""The rows of an evaluation: running each attack, and making a row of the report from its result."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fastadv.attacks.attack_warnings import (
    nan_warnings,
    short_adam_warning,
    short_reach_warning,
)
from fastadv.evaluation.attack_list import (
    STOPS_EARLY,
    BallAttack,
    ChosenAttack,
    Clean,
    Ensemble,
    Minimum,
    UserAttack,
    averages,
    stops_early,
)
from fastadv.evaluation.autoattack import AutoAttackResult, SearchEngine, autoattack, merge_warnings
from fastadv.evaluation.distances import Distances
from fastadv.evaluation.early_checks import EarlyFindings
from fastadv.evaluation.last_points import note_of_last_points
from fastadv.evaluation.minimum import CarliniWagner, norm_of, smallest_perturbations
from fastadv.evaluation.result_row import RANDOM, Row, Stage, Status
from fastadv.evaluation.runner import Outcome, Runner
from fastadv.evaluation.worst import WorstImages
from fastadv.models.lost_normalization import doubt_about_normalization


@dataclass(frozen=True)
class Evaluator:
    """Runs attacks and makes their rows.

    Attributes:
        runner: the model and the data.
        early: what was found before the first attack.
        radii: all radii of the evaluation.
        constants: settings of the attack of Carlini and Wagner.
        engine: the argument ``engine`` of `autoattack`.
        state_dir: folder of AutoAttack's state; with several radii it has a folder for each.
        surrogate: name of the model on which adversarial images are made; empty for the judged model.
    """

    runner: Runner
    early: EarlyFindings
    radii: Sequence[float]
    constants: CarliniWagner
    engine: SearchEngine
    state_dir: str | os.PathLike[str] | None
    surrogate: str

    def row(self, attack: ChosenAttack, eps: float, left: Tensor | None) -> tuple[Row, Tensor]:
        """Run one attack.

        Args:
            attack: the attack.
            eps: radius of the ball.
            left: [N] bool, the images to attack; None means all images that are classified correctly.

        Returns:
            Its row, and the images that are left after it, [N] bool.
        """
        row, robust = self._run(attack, eps, left)
        if isinstance(attack, BallAttack) and self.runner.passes > 1:
            row = replace(row, variant=f"EOT {self.runner.passes}")
        if self.surrogate and not isinstance(attack, Clean):
            early = (STOPS_EARLY,) if stops_early(attack) else ()
            row = replace(row, surrogate=self.surrogate, notes=(*row.notes, *early))
        if self.early.is_random:
            row = self._of_random_model(attack, row)
        for doubt in (
            self._short_reach(attack, eps),
            self.early.useless_gradients.note(attack),
            doubt_about_normalization(self.runner.model)
            if isinstance(attack, Clean)
            else self.early.doubt,
        ):
            if doubt:
                status = "suspect" if row.status == "ok" else row.status
                row = replace(row, status=status, notes=(*row.notes, doubt))
        return row, robust

    def _of_random_model(self, attack: ChosenAttack, row: Row) -> Row:
        """Add the note for a model that draws random numbers. An attack with one gradient per step is suspect."""
        note = RANDOM
        weak = averages(attack) and self.runner.passes == 1
        if weak:
            note += (
                "; this attack follows one gradient a step where --eot follows the mean of several"
            )
        status = "suspect" if weak and row.status == "ok" else row.status
        return replace(row, status=status, notes=(*row.notes, note))

    def _short_reach(self, attack: ChosenAttack, eps: float) -> str:
        """The note of an attack whose steps together cannot lead far; empty for others."""
        if isinstance(attack, BallAttack) and attack.alpha is not None:
            return short_reach_warning(attack.alpha, attack.steps, eps)
        if isinstance(attack, Minimum) and attack.kind == "cwl2":
            assert attack.steps is not None
            return short_adam_warning(self.constants.lr, attack.steps)
        return ""

    def _run(self, attack: ChosenAttack, eps: float, left: Tensor | None) -> tuple[Row, Tensor]:
        if isinstance(attack, Clean):
            return self._row_of(attack, self.early.clean, 0.0), self.early.clean.robust
        if isinstance(attack, Ensemble):
            return self._autoattack(attack, eps, left)
        if isinstance(attack, Minimum):
            return self._minimum(attack)
        left = self.early.clean.robust if left is None else left
        if isinstance(attack, BallAttack):
            outcome = self.runner.gradient(attack, eps, left)
            row = self._row_of(attack, outcome, eps)
            return replace(row, alpha=attack.alpha, steps=attack.steps), outcome.robust
        assert isinstance(attack, UserAttack)
        outcome = self.runner.user_attack(attack, eps, left)
        return self._row_of(attack, outcome, eps), outcome.robust

    def _row_of(self, attack: ChosenAttack, outcome: Outcome, eps: float) -> Row:
        doubts = nan_warnings(outcome.nan_points, outcome.nan_gradients)
        if not doubts and not self.early.useless_gradients.note(attack):
            stuck = note_of_last_points(outcome.blind, outcome.followed)
            doubts += [stuck] if stuck else []
        return Row(
            name=attack.name,
            n=len(self.runner.samples),
            correct=int(outcome.robust.sum()),
            eps=eps,
            seed=self.runner.seed,
            seconds=outcome.seconds,
            status="invalid" if outcome.problems else "suspect" if doubts else "ok",
            notes=(*outcome.problems, *doubts, *outcome.notes),
            worst=self.runner.take_worst(attack.name),
        )

    def _minimum(self, attack: Minimum) -> tuple[Row, Tensor]:
        runner = self.runner
        outcome, distances = smallest_perturbations(
            runner, attack, self.constants, self.early.clean.robust
        )
        norm = norm_of(attack, runner.norm)
        radii = self.radii if norm == runner.norm else ()
        row = replace(
            self._row_of(attack, outcome, 0.0),
            alpha=self.constants.lr if attack.kind == "cwl2" else None,
            steps=attack.steps,
            variant=self.constants.variant(attack),
            distances=Distances.of(distances, norm, radii),
        )
        return row, outcome.robust

    def _autoattack(self, attack: Ensemble, eps: float, left: Tensor | None) -> tuple[Row, Tensor]:
        runner, samples = self.runner, self.runner.samples
        robust = torch.zeros(len(samples), dtype=torch.bool, device="cpu")
        if left is None:
            transfers = runner.surrogate is not None
            left = self.early.clean.robust if transfers else torch.ones_like(robust)
        attacked = left.nonzero().flatten()
        row = Row(attack.name, len(samples), 0, eps, runner.seed, 0.0)
        if len(attacked) == 0:
            return row, robust
        ranks, indices = runner.work.ranks, runner.work.own(attacked)
        result = None
        if len(indices):
            result = autoattack_of(runner, indices, eps, self.engine, self._state_of(eps))
        parts = ranks.gather_objects(_without_images(result))
        whole = joined([part for part in parts if part is not None])
        row = replace(
            row,
            seconds=whole.seconds,
            search=whole.search,
            status=whole.status,
            worst=self._worst(attack, indices, result),
        )
        if runner.surrogate is None:
            if result is not None:
                robust[indices] = result.robust
            row = replace(row, notes=whole.notes, stages=whole.stages)
        else:
            # The accuracies after each attack are about the surrogate, and not about the judged model. Warnings
            # say that the search on it found too little, so that the judged model may seem too robust.
            robust[indices] = True
            if result is not None:
                robust &= ~runner.misjudged(indices[result.fooled], result.adversarial)
            row = replace(row, notes=tuple(f"of the surrogate: {note}" for note in whole.notes))
        robust = ranks.sum(robust.to(ranks.device, torch.int32)).cpu().bool()
        return replace(row, correct=int(robust.sum())), robust

    def _worst(
        self, attack: Ensemble, indices: Tensor, result: AutoAttackResult | None
    ) -> WorstImages | None:
        if result is None:  # this process had no image, but others may have had some
            return self.runner.take_worst(attack.name)
        return self.runner.worst_of(attack.name, indices, result.fooled, result.adversarial)

    def _state_of(self, eps: float) -> str | os.PathLike[str] | None:
        """The folder of AutoAttack's state for a radius and this process."""
        if self.state_dir is None:
            return None
        folder, ranks = Path(self.state_dir), self.runner.work.ranks
        if len(self.radii) > 1:
            folder /= f"eps-{eps:.9g}"
        return (
            folder / f"rank-{ranks.rank}-of-{ranks.world_size}" if ranks.world_size > 1 else folder
        )


def autoattack_of(
    runner: Runner,
    indices: Tensor,
    eps: float,
    engine: SearchEngine = "auto",
    state_dir: str | os.PathLike[str] | None = None,
) -> AutoAttackResult:
    """Run AutoAttack in this process, on some of a runner's images and on the model that it attacks."""
    samples = runner.samples
    return autoattack(
        runner.source,
        samples.part(indices),
        eps=eps,
        norm=runner.norm,
        bounds=samples.bounds,
        batch_size=runner.batch_size,
        device=runner.device,
        seed=runner.seed,
        state_dir=state_dir,
        progress=runner.progress.enabled,
        engine=engine,
        sample_ids=indices,
    )


def _without_images(result: AutoAttackResult | None) -> AutoAttackResult | None:
    """The part of a result that processes send to each other: everything but its images."""
    if result is None:
        return None
    nothing = torch.empty(0, dtype=torch.float32, device="cpu")
    return replace(result, robust=nothing, fooled=nothing, adversarial=nothing)


def joined(results: Sequence[AutoAttackResult]) -> AutoAttackResult:
    """Join the results of several processes, each on some of the images, to one result without images.

    Args:
        results: the results, at least one.
    """
    if len(results) == 1:
        return results[0]
    stages = [
        Stage(
            name=same[0].name,
            correct=sum(stage.correct for stage in same),
            search=same[0].search,
            refined=sum(stage.refined for stage in same),
            unconfirmed=sum(stage.unconfirmed for stage in same),
            seconds=max(stage.seconds for stage in same),
            refinement_seconds=max(stage.refinement_seconds for stage in same),
        )
        for same in zip(*(result.stages for result in results), strict=True)
    ]
    statuses = [result.status for result in results]
    worst: Status = next((s for s in ("invalid", "suspect") if s in statuses), "ok")
    return replace(
        results[0],
        stages=tuple(stages),
        status=worst,
        notes=tuple(merge_warnings([note for result in results for note in result.notes])),
        seconds=max(result.seconds for result in results),
    )
