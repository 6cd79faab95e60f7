"""Working through images batch by batch: shared among processes, and without the batches finished before."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastadv.evaluation.finished_batches import FinishedBatches
from fastadv.evaluation.progress import ProgressDisplay
from fastadv.evaluation.verify import Audit, Violations
from fastadv.ranks import Ranks


@dataclass(frozen=True)
class SharedWork:
    """How an evaluation works through its images.

    Attributes:
        progress: the display of the progress.
        ranks: the processes that share the images. All of them must make every call.
        finished: keeps finished batches; None keeps nothing.
    """

    progress: ProgressDisplay = field(default_factory=lambda: ProgressDisplay(False))
    ranks: Ranks = field(default_factory=Ranks)
    finished: FinishedBatches | None = None

    def own(self, indices: Tensor) -> Tensor:
        """This process's part of some images, by int64 indices."""
        return indices[self.ranks.rank :: self.ranks.world_size]

    def collect(
        self,
        name: str,
        key: str | None,
        indices: Tensor,
        batch_size: int,
        values_of: Callable[[Tensor], Tensor],
        *,
        audit: Audit | None = None,
        done: Callable[[float], Mapping[str, str]] | None = None,
        again: Callable[[Tensor], object] | None = None,
    ) -> Tensor:
        """Find one number for each of some images.

        Args:
            name: the name in the progress display.
            key: the key of finished batches, from `file_key`; None keeps no batch.
            indices: indices of the images, int64 [M].
            batch_size: images per batch.
            values_of: returns the values [B] of a batch of indices [B].
            audit: counts violations. The counts of other processes and of finished batches are added to it.
            done: returns the figures for the bar from the mean of the values so far.
            again: called with the indices of each batch that was finished before.

        Returns:
            The values [M] float32 on the CPU, in the order of the indices.
        """
        own, finished = (
            self.own(torch.arange(len(indices), device="cpu")),
            self.finished if key else None,
        )
        values = torch.zeros(len(indices), dtype=torch.float32, device="cpu")
        total = count = 0.0
        with self.progress.count(name, len(own)) as advance:
            for places in own.split(batch_size) if len(own) else ():
                batch = indices[places]
                known = finished.load(str(key), batch) if finished else None
                if known is None:
                    values[places], violations = _audited(values_of, batch, audit)
                    if finished:
                        finished.save(str(key), batch, values[places], violations)
                else:
                    values[places], violations = known
                    if again is not None:
                        again(batch)
                if audit is not None:
                    audit.found += violations
                total, count = total + float(values[places].sum()), count + len(places)
                advance(len(places), **({} if done is None else done(total / count)))
        if self.ranks.world_size > 1:
            values = self.ranks.sum(values.to(self.ranks.device)).cpu()
            if audit is not None:
                parts = self.ranks.gather_objects(audit.found)
                audit.found = sum(parts, Violations())
        return values


def _audited(
    values_of: Callable[[Tensor], Tensor], batch: Tensor, audit: Audit | None
) -> tuple[Tensor, Violations]:
    """The values of one batch, and the violations in it, which are not added to the audit."""
    if audit is None:
        return values_of(batch).float().cpu(), Violations()
    before, audit.found = audit.found, Violations()
    values = values_of(batch).float().cpu()
    found, audit.found = audit.found, before
    return values, found
