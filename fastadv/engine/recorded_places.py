"""Where the tensors of a recording stand: the place of each, whether it depends on images, and stale values."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from fastadv.engine.operands import storage_of
from fastadv.engine.recording import Recording

NOTHING = torch.empty(0, device="cpu", dtype=torch.float32)  # for activations of a large batch


class Places:
    """The places of the tensors that a forward pass has touched so far.

    Args:
        recording: whose values, dependences and overwritten places are kept here.
    """

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self._places: dict[int, int] = {}  # by id; `values` keeps most tensors, so ids stay theirs
        self._watched: list[weakref.ref[Tensor]] = []  # the others
        self._by_storage: dict[int, set[int]] = {}  # ids of tensors that share memory
        self._stale: set[int] = set()  # ids of tensors that a write through another has changed
        self._model_storages: set[int] = set()

    def of(self, tensor: Tensor) -> int | None:
        """The place of a tensor; None if it has none yet."""
        return self._places.get(id(tensor))

    def depends(self, tensor: Tensor) -> bool:
        """Whether a tensor depends on the images."""
        place = self._places.get(id(tensor))
        return place is not None and self._recording.depends[place]

    def is_stale(self, tensor: Tensor) -> bool:
        """Whether a write through another tensor has changed it."""
        return id(tensor) in self._stale

    def is_the_models(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in memory of the model's own tensors."""
        return storage_of(tensor) in self._model_storages

    def add(self, tensor: Tensor, depends: bool) -> int:
        """Give a tensor the next place."""
        recording = self._recording
        is_kept = recording.gradients or not depends
        recording.values.append(tensor if is_kept else NOTHING)
        recording.depends.append(depends)
        self._places[id(tensor)] = place = len(recording.values) - 1
        sharing = self._by_storage.setdefault(storage_of(tensor), set())
        sharing.add(id(tensor))
        if not is_kept:
            self._forget_with(tensor, sharing)
        return place

    def add_of_model(self, tensor: Tensor) -> int:
        """Give the next place to a tensor of the model's own."""
        self._model_storages.add(storage_of(tensor))
        return self.add(tensor, depends=False)

    def note_write(self, target: Tensor) -> None:
        """Note that the values of a tensor with a place have changed."""
        self._recording.overwritten.add(self._places[id(target)])
        self._stale.update(self._by_storage[storage_of(target)] - {id(target)})

    def _forget_with(self, tensor: Tensor, sharing: set[int]) -> None:
        """Forget a tensor when the model lets go of it: then others may have its id."""
        places, stale, own = self._places, self._stale, id(tensor)

        def forget(_: object) -> None:
            places.pop(own, None)
            sharing.discard(own)
            stale.discard(own)

        self._watched.append(weakref.ref(tensor, forget))
