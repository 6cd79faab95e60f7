"""The values of finished batches on disk, so that an interrupted evaluation goes on."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch
from torch import Tensor

from fastadv.digest import sealed, unsealed
from fastadv.evaluation.state_folder import Fingerprint, StateFolder
from fastadv.evaluation.verify import Violations
from fastadv.evaluation.worst import WorstImages
from fastadv.files import write_atomically

_FOLDER = "batches"
_DIGITS = 12  # of a hash


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
        """Write the values [B] of a finished batch, as `StateFolder.keep`."""
        content = {"values": values.tolist(), "violations": violations.as_dict()}
        path, text = self._path(key, batch), json.dumps(sealed(content))
        self._folder.keep(lambda: write_atomically(path, text))

    def save_worst(self, key: str, batch: Tensor, images: WorstImages) -> None:
        """Write the worst images of a batch, as `StateFolder.keep`, before its values."""
        self._folder.keep(lambda: images.save(self.worst_path(key, batch)))

    def worst_path(self, key: str, batch: Tensor) -> Path:
        """The file of the worst images of a batch."""
        return self._path(key, batch).with_suffix(".npz")

    def _path(self, key: str, batch: Tensor) -> Path:
        images = hashlib.sha256(batch.numpy().tobytes()).hexdigest()
        return self._folder.directory / f"{key}-{images[:_DIGITS]}.json"
