"""State of an AutoAttack run on disk: one file per batch, so that an interrupted run can continue.

A folder holds, beside the manifest of `StateFolder`, files such as ``apgd-ce-00003.pt``, one per attack
and batch. Each is written atomically when its batch is finished. The files alone determine the batches that are
still to do: reading them in order rebuilds everything else.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastadv.evaluation.state_folder import StateFolder
from fastadv.files import check_archive, write_atomically


@dataclass(frozen=True)
class BatchRecord:
    """The result of one attack on one batch.

    Attributes:
        indices: [B] int64, the images attacked.
        fooled: [M] int64, the images among them that are now classified wrongly.
        adversarial: [M, ...] float32, their adversarial images.
        violations: counts of the faults of the returned images, fields of ``Violations``.
        warnings: the warnings of the attack.
        seconds: wall-clock time.
        refined: number of images among ``fooled`` that were broken by float32 steps after the search.
        unconfirmed: number of points that the engine misclassified and the plain model did not.
        refinement_seconds: wall-clock time of these float32 steps, a part of ``seconds``.
    """

    indices: Tensor
    fooled: Tensor
    adversarial: Tensor
    violations: dict[str, Any]
    warnings: list[str]
    seconds: float
    refined: int = 0
    unconfirmed: int = 0
    refinement_seconds: float = 0.0


class AutoAttackState(StateFolder):
    """The batches of an AutoAttack finished so far, in a folder of its own; arguments as in `StateFolder`."""

    def load(self, attack: str, batch: int, indices: Tensor) -> BatchRecord | None:
        """Return the record of a batch, or None when it is not finished.

        Raises:
            ValueError: when the file is damaged or about other images; the message names the file.
        """
        record = self._read(attack, batch)
        if record is not None and not torch.equal(record.indices, indices):
            raise ValueError(self._about_others(attack, batch))
        return record

    def load_all(self, attack: str, images: Tensor) -> list[BatchRecord]:
        """Return the records of an attack whose batches hold images in the order in which they were finished.

        Args:
            attack: the attack.
            images: the indices [N] of all images for this attack.

        Raises:
            ValueError: as in `load`.
        """
        records: list[BatchRecord] = []
        known = set(images.tolist())
        while (record := self._read(attack, len(records))) is not None:
            if not known.issuperset(record.indices.tolist()):
                raise ValueError(self._about_others(attack, len(records)))
            known.difference_update(record.indices.tolist())
            records.append(record)
        return records

    def _read(self, attack: str, batch: int) -> BatchRecord | None:
        path = self._path(attack, batch)
        if not path.exists():
            return None
        try:
            record = BatchRecord(**torch.load(path, map_location="cpu", weights_only=True))
            check_archive(path)
            return record
        except Exception as error:
            raise ValueError(
                f"{path} cannot be read ({error!r}); delete it to redo the batch"
            ) from error

    def _about_others(self, attack: str, batch: int) -> str:
        path = self._path(attack, batch)
        return f"{path} is about other images than this run attacks; use a new state_dir"

    def save(self, attack: str, batch: int, record: BatchRecord) -> None:
        """Write the record of a finished batch, as `StateFolder.keep`."""
        content = io.BytesIO()
        torch.save({name: getattr(record, name) for name in record.__dataclass_fields__}, content)
        self.keep(lambda: write_atomically(self._path(attack, batch), content.getvalue()))

    def _path(self, attack: str, batch: int) -> Path:
        return self.directory / f"{attack}-{batch:05d}.pt"
