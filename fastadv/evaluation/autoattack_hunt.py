"""The common part of AutoAttack's attacks: the model, the images, how to search, and who has the last word."""

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
from fastadv.evaluation.runner import Runner, admissible_or_clean
from fastadv.evaluation.verify import Audit, predict

APGD_STEPS = 100
TARGET_CLASSES = 9
FP32 = "fp32"
# With fewer numbers in the images of a pass most of its time goes into what is paid once a pass. Beyond so many
# rows hardly anything is left of that.
_FULL, _MOST_ROWS = 64 * 3 * 32 * 32, 512


@dataclass(frozen=True)
class Refinement:
    """Steps in float32 from the best points of a search in a narrower precision, of the images that it left.

    Attributes:
        steps: of Auto-PGD; they are the last ones of a run.
        targets: how many runs of an image are carried on: the runs of highest value.
    """

    steps: int = 5
    targets: int = 3


@dataclass(frozen=True)
class Hunt:
    """One AutoAttack run.

    Attributes:
        runner: model, images and settings, in evaluation mode.
        eps: radius of the ball.
        library: the attacks of the reference implementation.
        search: ``"reference"``, or the precision in which this package searches, such as ``"bf16"``.
        narrow: Auto-PGD in this precision, on a copy of the model where there is one; ``wide`` itself where the
            search is on the plain model in float32.
        wide: Auto-PGD on the plain model in float32.
        state: where finished batches are kept, if anywhere.
        sample_ids: which random numbers each image gets, int64 [N] on the CPU; None is its index.
        refinement: of the images that a narrow search leaves.
        passes: through the network for each gradient of Auto-PGD.
        exact: Auto-PGD in float32 on a copy of the model, which refines a narrow search faster than ``wide``; None
            where there is to be none.
    """

    runner: Runner
    eps: float
    library: ReferenceAttacks
    search: str
    narrow: APGD
    wide: APGD
    state: AutoAttackState | None = None
    sample_ids: Tensor | None = None
    refinement: Refinement = Refinement()
    passes: int = 1
    exact: APGD | None = None

    @property
    def is_narrow(self) -> bool:
        """Whether the search has other logits than the judge: another precision, or a copy of the model."""
        return self.search != REFERENCE and self.narrow is not self.wide

    @property
    def refined_runs(self) -> int:
        """How many runs of an image that is left float32 goes on with, beside those it refuses.

        A search in float32 on a copy of the model made all its steps in float32 already.
        """
        return 0 if self.search == FP32 else self.refinement.targets

    @property
    def rows(self) -> int:
        """Rows of a pass of our own attacks."""
        return rows_of(self.runner.samples.image_shape, self.runner.batch_size)

    def audit(self) -> Audit:
        """A new count of violations."""
        return Audit(self.eps, self.runner.norm, self.runner.samples.bounds)

    def judged(self, indices: Tensor, points: Tensor, audit: Audit) -> tuple[Tensor, Tensor]:
        """Check what an attack returned, independently of it, by the plain model in float32.

        Args:
            indices: of the images, int64 [R] on the CPU.
            points: the adversarial images made of them, [R, C, H, W].
            audit: counts violations.

        Returns:
            Adversarial images [R, C, H, W] on the CPU, and which of them are classified wrongly, [R] bool there.
        """
        x, y = self.runner.samples.take(indices, self.runner.device)
        adv = admissible_or_clean(x, points, audit).contiguous()
        return adv.cpu(), (predict(self.runner.model, adv) != y).cpu()

    def ids_of(self, indices: Tensor) -> Tensor:
        """The sample ids of some images, on the model's device."""
        ids = indices if self.sample_ids is None else self.sample_ids[indices]
        return ids.to(self.runner.device)


def rows_of(image_shape: Sequence[int], batch_size: int) -> int:
    """Rows of a pass of our own attacks: the batch size, and more of images so small that it fills no pass.

    An interruption loses as many images, which are small and soon attacked again.
    """
    full = _FULL // max(math.prod(image_shape), 1)
    return max(batch_size, min(full, _MOST_ROWS))


class Finished:
    """Images that an attack is through with, until there are enough of them for a record of the state."""

    def __init__(self) -> None:
        self.indices: list[int] = []
        self.broken: dict[int, Tensor] = {}

    def record(self, shape: torch.Size, **facts: object) -> BatchRecord:
        """All of them as a record, in the order of the images; this list is then empty."""
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
