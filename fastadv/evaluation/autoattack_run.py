"""The common part of AutoAttack's attacks: model, images, the attack in each precision, and the final check."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastadv.attacks import APGD
from fastadv.evaluation.autoattack_library import ReferenceAttacks
from fastadv.evaluation.autoattack_state import AutoAttackState, BatchRecord
from fastadv.evaluation.result_row import REFERENCE
from fastadv.evaluation.runner import Runner
from fastadv.evaluation.verify import Audit, admissible_or_clean, predict

APGD_STEPS = 100
TARGET_CLASSES = 9
FP32 = "fp32"
# A pass over fewer numbers than this spends most of its time on costs per pass. With more rows than this, such
# costs are negligible.
_FULL, _MOST_ROWS = 64 * 3 * 32 * 32, 512


@dataclass(frozen=True)
class Refinement:
    """Further steps in float32 for the images that a search in a narrower precision did not break.

    Attributes:
        steps: number of steps of Auto-PGD, with the step sizes of the last steps of a run.
        targets: number of runs of an image that are continued, the runs with the highest loss.
    """

    steps: int = 5
    targets: int = 3


@dataclass(frozen=True)
class AutoAttackRun:
    """One AutoAttack run.

    Attributes:
        runner: model, images and settings, in evaluation mode.
        eps: radius of the ball.
        search: ``"reference"``, or the precision of this package's attacks, such as ``"bf16"``.
        narrow: Auto-PGD in this precision, on a copy of the model where there is one; ``wide`` itself where the
            search is on the plain model in float32.
        wide: Auto-PGD on the plain model in float32.
        library: the attacks of the reference implementation, where they are the search.
        state: keeps finished batches on disk; None keeps nothing.
        sample_ids: which random numbers each image gets, int64 [N] on the CPU; None means its index.
        refinement: the further steps in float32 after a narrow search.
        passes: number of passes through the network for each gradient of Auto-PGD.
        exact: Auto-PGD in float32 on a copy of the model, which refines a narrow search faster than ``wide``; None
            to refine on ``wide``.
    """

    runner: Runner
    eps: float
    search: str
    narrow: APGD
    wide: APGD
    library: ReferenceAttacks | None = None
    state: AutoAttackState | None = None
    sample_ids: Tensor | None = None
    refinement: Refinement = Refinement()
    passes: int = 1
    exact: APGD | None = None

    @property
    def is_narrow(self) -> bool:
        """Whether the search computes other logits than the plain model in float32: by precision or by a copy."""
        return self.search != REFERENCE and self.narrow is not self.wide

    @property
    def refined_runs(self) -> int:
        """Number of runs of an unbroken image that are continued in float32, besides the unconfirmed ones.

        It is 0 for a search in float32 on a copy of the model, whose steps were in float32 already.
        """
        return 0 if self.search == FP32 else self.refinement.targets

    @property
    def rows(self) -> int:
        """Images per pass of this package's attacks."""
        return rows_of(self.runner.samples.image_shape, self.runner.batch_size)

    def audit(self) -> Audit:
        """A new count of violations."""
        return Audit(self.eps, self.runner.norm, self.runner.samples.bounds)

    def judged(self, indices: Tensor, points: Tensor, audit: Audit) -> tuple[Tensor, Tensor]:
        """Check the images that an attack returned, independently of it, by the plain model in float32.

        Args:
            indices: indices of the images, int64 [R] on the CPU.
            points: their adversarial images, [R, C, H, W].
            audit: counts violations.

        Returns:
            Adversarial images [R, C, H, W], and which of them are misclassified, [R] bool; both on the CPU.
        """
        x, y = self.runner.samples.take(indices, self.runner.device)
        adv = admissible_or_clean(x, points, audit).contiguous()
        return adv.cpu(), (predict(self.runner.model, adv) != y).cpu()

    def ids_of(self, indices: Tensor) -> Tensor:
        """The sample ids of some images, on the model's device."""
        ids = indices if self.sample_ids is None else self.sample_ids[indices]
        return ids.to(self.runner.device)


def rows_of(image_shape: Sequence[int], batch_size: int) -> int:
    """Images per pass of this package's attacks: the batch size, or more where images are small.

    An interruption loses the work on so many images. Small images are soon attacked again.
    """
    full = _FULL // max(math.prod(image_shape), 1)
    return max(batch_size, min(full, _MOST_ROWS))


class FinishedImages:
    """The images whose attack has ended, collected until there are enough for a record of the state."""

    def __init__(self) -> None:
        self.indices: list[int] = []
        self.broken: dict[int, Tensor] = {}

    def record(self, shape: torch.Size, **facts: object) -> BatchRecord:
        """Return all collected images as a record, in ascending order, and start anew."""
        indices = sorted(self.indices)
        fooled = [index for index in indices if index in self.broken]
        images = [self.broken.pop(index) for index in fooled]
        self.indices = []
        return BatchRecord(
            indices=_int64(indices),
            fooled=_int64(fooled),
            adversarial=torch.stack(images)
            if images
            else torch.empty(0, *shape, dtype=torch.float32, device="cpu"),
            **facts,  # type: ignore[arg-type]
        )


def _int64(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device="cpu")
