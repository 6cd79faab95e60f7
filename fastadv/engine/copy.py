"""The attack copy: a frozen, BatchNorm-folded image of a live model in a narrow dtype.

An attack runs a model 2K times at fixed weights, so work that depends on the weights alone is done once: BatchNorm
of eval mode becomes part of the convolution before it, weights are stored in the compute dtype and in
channels-last order, and no parameter requires grad. `AttackCopy.refresh` brings live weights over without
changing an address, so that captured graphs and compiled programs stay valid.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from fastadv.engine.graph import Constants, Part, graph_of
from fastadv.engine.layers import CopiedConv2d, CopiedLinear
from fastadv.engine.recording import Recording
from fastadv.engine.tape import Tape


class AttackCopy(nn.Module):
    """A model's attack copy. It holds no reference to the live model.

    Args:
        tape: the model's operations.
        recording: of the model as it is now.
        dtype: of weights and activations; logits come out in float32, or in float64 for a float64 copy.
        pack: hold convolutions in the form of our own CPU kernel where it serves. Such a copy is run by
            `fastadv.engine.cpu_program.Program`, not called. For bfloat16 and float32.

    Raises:
        Unrecordable: with the reason, when the model cannot be copied.
    """

    def __init__(
        self, tape: Tape, recording: Recording, dtype: torch.dtype, pack: bool = False
    ) -> None:
        super().__init__()
        graph, parts, constants = graph_of(tape, recording, dtype)
        root: dict[str, Any] = {part.name: part.module for part in parts}
        root.update(constants.tensors)
        self.graph_module = fx.GraphModule(root, graph)
        self.graph_module.graph.eliminate_dead_code()
        self.graph_module.recompile()
        # Graphs and their nodes refer to one another. With the module among them, its weights would stay in memory
        # until Python looks for such cycles, which it does by the number of objects and not by their size.
        self.graph_module.graph.owning_module = None
        self.batch_node = constants.batch_node
        self.nodes = constants.nodes
        self.dtype = dtype
        self._autocast = dtype if dtype in (torch.bfloat16, torch.float16) else None
        self._logits_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self._parts: list[Part] = parts
        self._constants: Constants = constants
        if pack:
            for part in parts:
                if isinstance(part.module, (CopiedConv2d, CopiedLinear)):
                    part.module.pack()
        self.eval()
        self.refresh(recording)

    @property
    def is_narrow(self) -> bool:
        """Whether it computes in bfloat16."""
        return self.dtype == torch.bfloat16

    @torch.no_grad()
    def refresh(self, recording: Recording) -> None:
        """Copy the weights and statistics that the live model has used into the copy's own memory."""
        for part in self._parts:
            part.module.refresh(*part.values(recording))  # type: ignore[operator]
        for name, place in self._constants.places.items():
            getattr(self.graph_module, name).copy_(recording.values[place])

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, C] of images [B, ...]."""
        with self.autocast(x.device):
            return self.graph_module.forward(x).to(self._logits_dtype)

    def autocast(self, device: torch.device) -> torch.autocast:
        """The context of a pass: it casts the operations of the model's own code on its parameters.

        Without autocast's cache, which lasts to the end of the outermost context. A recorded pass would find the
        cast images of an earlier pass there, and every replay would read these.
        """
        enabled = self._autocast is not None
        return torch.autocast(device.type, self._autocast, enabled=enabled, cache_enabled=False)
