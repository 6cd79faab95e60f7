"""The worst adversarial images of an attack: the model is wrong about them with the highest confidence."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastadv.files import write_atomically

_ARRAYS = (
    *("originals", "adversarials", "labels", "predictions", "confidences"),
    *("label_confidences", "indices"),
)


@dataclass(frozen=True)
class WorstImages:
    """Images that an attack broke, ordered by the model's confidence in the wrong class.

    The order is by the margin: the probability of the predicted class minus the probability of the label.

    Attributes:
        originals: [M, ...] float32 within the bounds of the evaluation, on the CPU.
        adversarials: the same images after the attack.
        labels: [M] int64.
        predictions: [M] int64, classes that the model gives to the adversarial images.
        confidences: [M] float32, probability of the predicted class.
        label_confidences: [M] float32, probability of the label.
        indices: [M] int64, which images of the data they are.
    """

    originals: Tensor
    adversarials: Tensor
    labels: Tensor
    predictions: Tensor
    confidences: Tensor
    label_confidences: Tensor
    indices: Tensor

    def __len__(self) -> int:
        """How many images there are."""
        return self.labels.shape[0]

    @property
    def margins(self) -> Tensor:
        """How sure the model is of the wrong class: [M] float32, at least 0."""
        return self.confidences - self.label_confidences

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write them atomically as a .npz file, one array per attribute.

        Raises:
            OSError: when it cannot be written.
        """
        content = io.BytesIO()
        arrays = {name: getattr(self, name).numpy() for name in _ARRAYS}
        np.savez_compressed(content, **arrays)
        return write_atomically(path, content.getvalue())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> WorstImages:
        """Read a file that ``save`` wrote; nothing is unpickled.

        Raises:
            FileNotFoundError: when there is no such file.
            ValueError: when it holds something else; the message names the file.
        """
        worst = cls(**read_arrays(path, _ARRAYS))
        lengths = {getattr(worst, name).shape[:1] for name in _ARRAYS}
        if len(lengths) > 1 or worst.originals.shape != worst.adversarials.shape:
            raise ValueError(f"{os.fspath(path)}: its arrays do not fit together")
        return worst

    def _first(self, keep: int) -> WorstImages:
        """The ``keep`` with the largest margin, in a fixed order."""
        order = np.lexsort((self.indices.numpy(), -self.margins.numpy()))
        # Whole runs can break an image several times; it is kept once, in its worst form.
        _, first = np.unique(self.indices.numpy()[order], return_index=True)
        chosen = torch.from_numpy(order[np.sort(first)][:keep])
        return WorstImages(*(getattr(self, name)[chosen] for name in _ARRAYS))


def read_arrays(path: str | os.PathLike[str], names: Sequence[str]) -> dict[str, Tensor]:
    """Read arrays of a .npz file by their names, and check its checksums; nothing is unpickled.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is damaged or something else; the message names the file.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            # numpy stops at the end of an array, before the checksum, where a damaged header shortens it.
            damaged = arrays.zip.testzip()
            if damaged is not None:
                raise ValueError(f"the checksum of {damaged} is wrong")
            return {name: torch.from_numpy(arrays[name]) for name in names}
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged archive can raise nearly anything
        raise ValueError(
            f"{os.fspath(path)}: holds no adversarial images, or is damaged ({type(error).__name__}: {error})"
        ) from error


class WorstKeeper:
    """Keeps the worst images of one attack at a time while it runs, and no more of them than asked for.

    Args:
        keep: how many images at most; 0 to keep nothing.
    """

    def __init__(self, keep: int = 0) -> None:
        self.keep = keep
        self._attack = ""
        self._worst: WorstImages | None = None

    def see(
        self, attack: str, x: Tensor, adv: Tensor, y: Tensor, logits: Tensor, indices: Tensor
    ) -> WorstImages | None:
        """Look at one batch.

        Args:
            attack: name of the attack; the images of another one are forgotten.
            x: clean images [B, ...].
            adv: the same images after the attack.
            y: labels [B].
            logits: of the adversarial images, [B, classes].
            indices: which images of the data they are, [B].

        Returns:
            The worst of this batch; None where nothing is to be kept.
        """
        if self.keep == 0:
            return None
        found = _broken(x, adv, y, logits, indices, self.keep)
        self.add(attack, found)
        return found

    def add(self, attack: str, new: WorstImages) -> None:
        """Take the worst of one batch, which `see` returned."""
        if attack != self._attack:
            self._attack, self._worst = attack, None
        parts = [new] if self._worst is None else [self._worst, new]
        self._worst = _together(parts)._first(self.keep)

    def take(self, attack: str) -> WorstImages | None:
        """Hand over the images that have been kept of an attack and forget them; None where it broke no image."""
        worst = self._worst if attack == self._attack else None
        self._attack, self._worst = "", None
        return worst if worst is not None and len(worst) else None

    def worst_of_all(self, parts: Sequence[WorstImages | None]) -> WorstImages | None:
        """The worst of the images that all processes have kept of one attack; None where no image was broken."""
        found = [part for part in parts if part is not None]
        return _together(found)._first(self.keep) if found else None


def _together(parts: Sequence[WorstImages]) -> WorstImages:
    return WorstImages(*(torch.cat([getattr(part, name) for part in parts]) for name in _ARRAYS))


def _broken(
    x: Tensor, adv: Tensor, y: Tensor, logits: Tensor, indices: Tensor, keep: int
) -> WorstImages:
    """The worst of a batch. The choice is made where the images are; the chosen alone go to the CPU."""
    shares = logits.detach().float().softmax(dim=1)
    # By the logits, as shares can round to equal ones.
    prediction = logits.argmax(dim=1)
    confidence = shares.gather(1, prediction.view(-1, 1)).squeeze(1)
    of_label = shares.gather(1, y.view(-1, 1)).squeeze(1)
    wrong = (prediction != y).nonzero().flatten()
    margin = (confidence - of_label)[wrong]
    chosen = wrong[margin.argsort(descending=True, stable=True)[:keep]]
    parts = (x, adv, y, prediction, confidence, of_label, indices.to(y.device))
    return WorstImages(*(part[chosen].detach().cpu().contiguous() for part in parts))
