"""Models that take gradients in their own parameters during their forward pass, as those do that adapt to images.

If their parameters did not require grad, another network would be attacked: one that does not adapt.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from fastadv.engine.frozen import parameters_of
from fastadv.engine.networks import networks_of, parts_of
from fastadv.engine.recording_mode import uncompiled


class Adaptation:
    """Whether a model adapts in its forward pass.

    Attributes:
        is_known: whether a pass has told.
        adapts: whether the model adapts, for all that is known.
    """

    def __init__(self, never: bool = False) -> None:
        self.is_known, self.adapts = never, not never

    @contextmanager
    def found_out(self, model: object) -> Iterator[None]:
        """Watch one forward pass, after which it is known whether the model adapts.

        The parameters of a model that does not learn require no grad afterwards.
        """
        if self.is_known or not torch.is_grad_enabled():
            yield
            return
        # Lazy ones get their shape in the pass, and bear no hooks before.
        parameters = [
            p
            for p in parameters_of(parts_of(networks_of(model)))
            if p.requires_grad and not nn.parameter.is_lazy(p)
        ]
        taken: list[Tensor] = []
        hooks = [parameter.register_hook(taken.append) for parameter in parameters]
        try:
            # The code of a compiled part must run to be seen.
            with uncompiled(model) if isinstance(model, nn.Module) else nullcontext():
                yield
        finally:
            for hook in hooks:
                hook.remove()
        self.is_known, self.adapts = True, bool(taken)
        if not taken:
            for parameter in parameters:
                parameter.requires_grad_(False)
