"""Working through images batch by batch: shared among processes, with finished batches kept on disk."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fastadv.digest import sealed, unsealed
from fastadv.evaluation.autoattack_state import Fingerprint, StateFolder
from fastadv.evaluation.progress import ProgressDisplay
from fastadv.evaluation.verify import Audit, Violations
from fastadv.files import shortened, write_atomically
from fastadv.ranks import Ranks

_FOLDER = "batches"
_DIGITS = 12  # of a hash
_MAX_NAME_LENGTH = 150  # bytes of a key beside its hash; file systems take 255 for all of a name


class FinishedBatches:
    """The values of finished batches, one small file each, in a folder that belongs to one evaluation.

    Args:
        directory: the folder, made if missing.
        identity: the identity of the evaluation.

    Raises:
        ValueError: when the folder belongs to another evaluation.
    """

    def __init__(self, directory: str | os.PathLike[str], identity: Fingerprint) -> None:
        self._folder = StateFolder(Path(directory) / _FOLDER, identity)

    def load(self, key: str, batch: Tensor) -> tuple[Tensor, Violations] | None:
        """Return the values [B] of a batch of image indices [B], and its violations; None if it is not finished.

        Raises:
            ValueError: when the file is damaged; the message names the file.
        """
        path = self._path(key, batch)
        if not path.exists():
            return None
        try:
            found = unsealed(json.loads(path.read_text(encoding="utf-8")))
            values = torch.tensor(found["values"], dtype=torch.float32, device="cpu")
            if values.shape != batch.shape:
                raise ValueError(f"{len(values)} values for {len(batch)} images")
            return values, Violations(**found["violations"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} cannot be read ({error!r}); delete it to redo the batch"
            ) from error

    def save(self, key: str, batch: Tensor, values: Tensor, violations: Violations) -> None:
        """Write the values [B] of a finished batch."""
        content = {"values": values.tolist(), "violations": violations.as_dict()}
        write_atomically(self._path(key, batch), json.dumps(sealed(content)))

    def worst_path(self, key: str, batch: Tensor) -> Path:
        """The file of the worst images of a batch."""
        return self._path(key, batch).with_suffix(".npz")

    def _path(self, key: str, batch: Tensor) -> Path:
        images = hashlib.sha256(batch.numpy().tobytes()).hexdigest()
        return self._folder.directory / f"{key}-{images[:_DIGITS]}.json"


def key_of(name: str, *facts: object) -> str:
    """A name for files whose content depends on these facts. Their repr must show their value."""
    plain = "".join(letter if letter.isalnum() or letter in "-." else "_" for letter in name)
    kept = shortened(plain, _MAX_NAME_LENGTH)
    if kept != plain:  # such as that of an evaluation at many radii
        facts = (*facts, name)
    digest = hashlib.sha256(repr(facts).encode()).hexdigest()
    return f"{kept}-{digest[:_DIGITS]}"


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
        audit: Audit | None = None,
        done: Callable[[float], Mapping[str, str]] | None = None,
        again: Callable[[Tensor], object] | None = None,
    ) -> Tensor:
        """Find one number for each of some images.

        Args:
            name: the name in the progress display.
            key: the key of finished batches, from `key_of`; None keeps no batch.
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
