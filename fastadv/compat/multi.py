"""Several attacks one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from fastadv.compat.attack import Attack, integer_labels


class MultiAttack:
    """Several attacks, each on the images that those before it have not broken.

    Args:
        attacks: attacks of this module on one model.

    Raises:
        ValueError: there are fewer than two attacks, or their models differ.
    """

    def __init__(self, attacks: Sequence[Attack], verbose: bool = False) -> None:
        self.attacks = tuple(attacks)
        if len(self.attacks) < 2:
            raise ValueError(f"attacks must be at least two, got {len(self.attacks)}")
        if any(attack.model is not self.attacks[0].model for attack in self.attacks):
            raise ValueError("attacks must be on one model, got several")

    def __repr__(self) -> str:
        return f"MultiAttack({', '.join(map(repr, self.attacks))})"

    def __call__(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        """Attack a batch.

        Args:
            inputs: images [B, C, H, W], as an `Attack` here takes them.
            labels: [B]; the model's own predictions where left out.

        Returns:
            The adversarial images; an image that no attack has broken comes back as it was.
        """
        first = self.attacks[0]
        x = first._taken(inputs)[0]
        y = first._predicted(x) if labels is None else integer_labels(labels).to(x.device)
        found = inputs.clone().float() / 255 if inputs.dtype == torch.uint8 else inputs.clone()
        left = torch.arange(len(y), device=x.device)
        for attack in self.attacks:
            if not len(left):
                break
            some = left.to(inputs.device)
            adv = cast(Tensor, attack(inputs[some], y[left]))
            broken = attack._logits(attack._taken(adv)[0]).argmax(1) != y[left]
            found[some[broken.to(some.device)]] = adv[broken.to(adv.device)]
            left = left[~broken]
        return found
