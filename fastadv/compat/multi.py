"""Several attacks one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastadv.compat.attack import BY_LABEL, Attack, Images
from fastadv.ops.values import shown


class MultiAttack:
    """Several attacks, each on the images that those before it have not broken.

    Args:
        attacks: attacks of this module on one model.

    Raises:
        TypeError: they are no attacks of this module.
        ValueError: there are fewer than two attacks, or their models differ.
    """

    def __init__(self, attacks: Sequence[Attack], verbose: bool = False) -> None:
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
            inputs: images [B, C, H, W], as an `Attack` here takes them.
            labels: [B]; the model's own predictions where left out.

        Returns:
            The adversarial images, as an `Attack` here returns them; an image that no attack has broken comes
            back as it was.

        Raises:
            ValueError: an attack is in the mode "targeted(label)", or the attacks differ in their normalisation.
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
        """Refuse attacks that would take the labels or the images for something else than the others do."""
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
