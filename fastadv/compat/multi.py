"""Several attacks one after the other, each on the images that are still classified correctly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastadv.compat.attack import BY_LABEL, Attack, Images
from fastadv.ops.values import check_bool, shown


class MultiAttack:
    """Several attacks, each on the images for which the attacks before it have failed.

    Args:
        attacks: two or more attacks of `fastadv.compat` on one model.

    Raises:
        TypeError: if they are no attacks of `fastadv.compat`.
        ValueError: if there are fewer than two attacks, or their models differ.
    """

    def __init__(self, attacks: Sequence[Attack], verbose: bool = False) -> None:
        check_bool("verbose", verbose)
        if not isinstance(attacks, Sequence) or not all(isinstance(a, Attack) for a in attacks):
            raise TypeError(
                f"attacks must be a list of attacks of fastadv.compat, got {shown(attacks)}"
            )
        self.attacks = tuple(attacks)
        if len(self.attacks) < 2:
            raise ValueError(f"attacks must be at least two, got {len(self.attacks)}")
        if any(attack.model is not self.attacks[0].model for attack in self.attacks):
            raise ValueError("attacks must be on one model, got several")

    def __repr__(self) -> str:
        return f"MultiAttack({', '.join(map(repr, self.attacks))})"

    def __call__(
        self, inputs: Images, labels: Tensor | np.ndarray[Any, Any] | None = None
    ) -> Images:
        """Attack a batch.

        Args:
            inputs: images [B, C, H, W], as for `Attack`.
            labels: [B]; by default the model's own predictions.

        Returns:
            The adversarial images, as `Attack` returns them. An image for which all attacks fail is unchanged.

        Raises:
            ValueError: if an attack is in the mode "targeted(label)", or the attacks differ in their
                normalisation.
        """
        first = self.attacks[0]
        self._check_modes()
        x = first._taken(inputs)[0]
        y = first._labels(x, labels)
        given = inputs if isinstance(inputs, Tensor) else torch.as_tensor(inputs, device="cpu")
        found = given.float() / 255 if given.dtype == torch.uint8 else given.clone()
        left = torch.arange(len(y), device=x.device)
        for attack in self.attacks:
            if not len(left):
                break
            some = left.to(given.device)
            part = given[some]
            adv: Tensor = attack(part, y[left])
            broken = attack._logits(attack._result_taken(adv, part)).argmax(1) != y[left]
            found[some[broken.to(some.device)]] = adv[broken.to(adv.device)]
            left = left[~broken]
        return found if isinstance(inputs, Tensor) else found.numpy()

    def _check_modes(self) -> None:
        """Refuse attacks that would read the labels or the images in another way than the other attacks."""
        for attack in self.attacks:
            if attack.get_mode() == BY_LABEL:
                raise ValueError(
                    f"attacks must not be in the mode {BY_LABEL}, got {type(attack).__name__}: MultiAttack needs "
                    "the labels to tell which images are broken; set_mode_targeted_by_function takes both"
                )
        used = [attack.normalization_used for attack in self.attacks]
        numbers = [
            None if one is None else {name: part.flatten().tolist() for name, part in one.items()}
            for one in used
        ]
        if any(one != numbers[0] for one in numbers):
            raise ValueError(f"attacks must have one normalisation, got {numbers}")
