"""The worst adversarial images of an attack: the images of whose wrong class the model is most confident."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastadv.files import read_npz, write_atomically

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
        indices: [M] int64, the images' indices in the data.
    """

    originals: Tensor = field(repr=False)
    adversarials: Tensor = field(repr=False)
    labels: Tensor
    predictions: Tensor
    confidences: Tensor
    label_confidences: Tensor
    indices: Tensor

    def __len__(self) -> int:
        """The number of images."""
        return self.labels.shape[0]

    @property
    def margins(self) -> Tensor:
        """Probability of the predicted class minus probability of the label, [M] float32, at least 0."""
        return self.confidences - self.label_confidences

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the images atomically as a .npz file, with one array per attribute.

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
            ValueError: when it holds other content; the message names the file.
        """
        worst = cls(**read_arrays(path, _ARRAYS))
        lengths = {getattr(worst, name).shape[:1] for name in _ARRAYS}
        if len(lengths) > 1 or worst.originals.shape != worst.adversarials.shape:
            raise ValueError(f"{os.fspath(path)}: its arrays do not fit together")
        return worst

    def _first(self, keep: int) -> WorstImages:
        """The ``keep`` images with the largest margins, by margin and index."""
        order = np.lexsort((self.indices.numpy(), -self.margins.numpy()))
        # Several runs can break the same image; it is kept once, with its largest margin.
        _, first = np.unique(self.indices.numpy()[order], return_index=True)
        chosen = torch.from_numpy(order[np.sort(first)][:keep])
        return WorstImages(*(getattr(self, name)[chosen] for name in _ARRAYS))


def read_arrays(path: str | os.PathLike[str], names: Sequence[str]) -> dict[str, Tensor]:
    """Read arrays of a .npz file as tensors, by their names, with `read_npz`.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is damaged or another file; the message names the file.
    """
    try:
        return {name: torch.from_numpy(array) for name, array in read_npz(path, names).items()}
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged archive can raise nearly anything
        raise ValueError(
            f"{os.fspath(path)}: holds no adversarial images, or is damaged ({type(error).__name__}: {error})"
        ) from error


class WorstKeeper:
    """Keeps the worst images of one attack at a time while it runs.

    Args:
        keep: the largest number of images to keep; 0 keeps nothing.
    """

    def __init__(self, keep: int = 0) -> None:
        self.keep = keep
        self._attack = ""
        self._worst: WorstImages | None = None

    def see(
        self, attack: str, x: Tensor, adv: Tensor, y: Tensor, logits: Tensor, indices: Tensor
    ) -> WorstImages | None:
        """Find the worst images of one batch, and keep them.

        Args:
            attack: name of the attack; images of another attack are forgotten.
            x: clean images [B, ...].
            adv: the same images after the attack.
            y: labels [B].
            logits: logits of the adversarial images, [B, classes].
            indices: the images' indices in the data, [B].

        Returns:
            The worst images of this batch; None where nothing is kept.
        """
        if self.keep == 0:
            return None
        found = _broken(x, adv, y, logits, indices, self.keep)
        self.add(attack, found)
        return found

    def add(self, attack: str, new: WorstImages) -> None:
        """Keep the worst images of a batch, as `see` returned them."""
        if attack != self._attack:
            self._attack, self._worst = attack, None
        parts = [new] if self._worst is None else [self._worst, new]
        self._worst = _together(parts)._first(self.keep)

    def take(self, attack: str) -> WorstImages | None:
        """Return the kept images of an attack, and forget them; None where it broke no image."""
        worst = self._worst if attack == self._attack else None
        self._attack, self._worst = "", None
        return worst if worst is not None and len(worst) else None

    def worst_of_all(self, parts: Sequence[WorstImages | None]) -> WorstImages | None:
        """The worst images among those that all processes have kept; None where no image was broken."""
        found = [part for part in parts if part is not None]
        return _together(found)._first(self.keep) if found else None


def _together(parts: Sequence[WorstImages]) -> WorstImages:
    return WorstImages(*(torch.cat([getattr(part, name) for part in parts]) for name in _ARRAYS))


def _broken(
    x: Tensor, adv: Tensor, y: Tensor, logits: Tensor, indices: Tensor, keep: int
) -> WorstImages:
    """The worst images of a batch. They are chosen on the device, and only the chosen ones go to the CPU."""
    probabilities = logits.detach().float().softmax(dim=1)
    # The prediction comes from the logits, because different logits can round to equal probabilities.
    prediction = logits.argmax(dim=1)
    confidence = probabilities.gather(1, prediction.view(-1, 1)).squeeze(1)
    label_confidence = probabilities.gather(1, y.view(-1, 1)).squeeze(1)
    wrong = (prediction != y).nonzero().flatten()
    margin = (confidence - label_confidence)[wrong]
    chosen = wrong[margin.argsort(descending=True, stable=True)[:keep]]
    parts = (x, adv, y, prediction, confidence, label_confidence, indices.to(y.device))
    return WorstImages(*(part[chosen].detach().cpu().contiguous() for part in parts))
